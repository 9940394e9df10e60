"""Mark an 8B-shaped bf16 checkpoint on the disk without training: seconds and peak memory.

    python benchmarks/embed_memory.py [--model DIR] [--layers 32] [--work DIR]

Without --model a random checkpoint is written first (16 GB; the copy needs as much again). Everything that was
written is deleted at the end. Peak memory is the high-water mark of the process that marks, libraries included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from big_checkpoint import write_checkpoint

from hf_wmguard.keys import OwnerKey

_SCRIPT = """
import resource, sys, time
from pathlib import Path
begin = time.perf_counter()
from hf_wmguard import SignatureConfig, WatermarkConfig, embed_folder
imported = time.perf_counter()
work, model = Path(sys.argv[1]), Path(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = WatermarkConfig(model_id="benchmark", owner_key=f"file:{work / 'owner.key'}", registry=str(work / "registry"),
                         signature=SignatureConfig(budget=0.01), triggers=None)
result = embed_folder(model, work / "marked", config)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(f"import {imported - begin:.1f} s, embed {time.perf_counter() - imported:.1f} s "
      f"({usage.ru_utime + usage.ru_stime:.1f} s of CPU)")
print(f"peak memory {usage.ru_maxrss / 2**10:.0f} MiB, of which imports {before / 2**10:.0f} MiB")
print(result)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, help="where there is room; the system's temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        model = options.model
        if model is None:
            model = work / "model"
            print(f"wrote {write_checkpoint(model, options.layers):,} bytes", flush=True)
        OwnerKey.generate().write(work / "owner.key")
        # A process of its own: its peak is not that of the writer above.
        subprocess.run([sys.executable, "-c", _SCRIPT, str(work), str(model)], check=True)


if __name__ == "__main__":
    main()
