"""Verify an 8B-shaped bf16 checkpoint of 16 GB from a warm page cache: where the seconds go, and peak memory.

    python benchmarks/verify_speed.py [--model DIR] [--layers 32] [--work DIR] [--runs 3] [--threads 1]

Without --model a random checkpoint is written first, and deleted at the end. It is marked post hoc, which takes room
for a second copy. Each run is a process of its own; the files are read once beforehand. `wmguard plan` is timed on the
same folder, imports included.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from big_checkpoint import write_checkpoint

from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.embedding import embed_folder
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.shards import find_shards

_VERIFY = """
import resource, sys, time
begin = time.perf_counter()
import torch
torch.set_num_threads(int(sys.argv[4]))
from hf_wmguard import verification
from hf_wmguard.suspects import signature
from hf_wmguard.suspects.locate import Location
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import Reading
seconds = {"imports": time.perf_counter() - begin}

def timed(owner, name, label):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start
    setattr(owner, name, outer)

timed(verification, "_describe", "digest")
timed(verification, "_committed", "registry")
timed(WatermarkRecord, "carrier_keys", "key derivation")
timed(Reading, "score", "scoring")
timed(WatermarkRecord, "decode_payload", "decoding")
timed(Location, "read", "reading tiles")
timed(signature, "try_projections", "projecting")
timed(Baseline, "stretch", "norms")
start = time.perf_counter()
report = verification.verify(sys.argv[1], owner_key=sys.argv[2], registry=sys.argv[3])
total = time.perf_counter() - start
seconds["all else"] = total - sum(value for name, value in seconds.items() if name != "imports")
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu = usage.ru_utime + usage.ru_stime
print(f"verify {total:.2f} s, imports {seconds.pop('imports'):.2f} s, CPU of all {cpu:.2f} s,"
      f" peak memory {usage.ru_maxrss / 2**10:.0f} MiB, bytes read {report.signature.bytes_read:,},"
      f" {report.verdict}, log10 p {report.log10_p:.0f}, alignment {report.signature.alignment}")
print("  " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
"""
_PLAN = """
import sys, time, resource
begin = time.perf_counter()
from hf_wmguard.robustness.plan import make_plan
imported = time.perf_counter()
plan = make_plan(sys.argv[1])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(f"plan {time.perf_counter() - begin:.2f} s, of which imports {imported - begin:.2f} s, "
      f"CPU {usage.ru_utime + usage.ru_stime:.2f} s, peak memory {usage.ru_maxrss / 2**10:.0f} MiB")
print(f"  {plan.projections} projections in {plan.carriers} of {plan.matrices} matrices, weight change "
      f"{plan.weight_change:.2%}, a verification reads {plan.bytes_read:,} bytes, {plan.share_read:.2%}")
"""


def run(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, help="where there is room; the system's temporary folder by default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch; shards are hashed side by side anyway")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        model = options.model
        if model is None:
            model = work / "model"
            print(f"wrote {write_checkpoint(model, options.layers):,} bytes", flush=True)
        OwnerKey.generate().write(work / "owner.key")
        reference = f"file:{work / 'owner.key'}"
        config = WatermarkConfig(
            model_id="benchmark",
            owner_key=reference,
            registry=str(work / "registry"),
            signature=SignatureConfig(),
            triggers=None,
        )
        embed_folder(model, work / "marked", config)
        if options.model is None:
            shutil.rmtree(model)
        model = work / "marked"
        for file in find_shards(model).files:
            warm(model / file)
        for _ in range(options.runs):
            run(_VERIFY, model, reference, work / "registry", options.threads)
        for _ in range(options.runs):
            run(_PLAN, model)


def warm(path: Path) -> None:
    """Read a file once, so that it is in the page cache where that is large enough."""
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
