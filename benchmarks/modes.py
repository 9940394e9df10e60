"""The same training on one process, under DDP, FSDP2 and ZeRO: is the mark the same?

Expected, written down before the run: bit error rate 0 and a decoded payload in every mode; log10 p within 1% of the
one process's, because the mark ends on its lattice wherever the weights lie. Weights and owner keys differ from run to
run (a key is drawn for each), which moves log10 p by less.

A tiny Llama in float32, two CPU processes with gloo; the driver is that of the integration tests, and figures are read
from the manifest of what was written, encrypted, at the end. ZeRO needs deepspeed and is left out without it.

    python benchmarks/modes.py --json docs/measured/modes.json
    python benchmarks/modes.py --modes zero1 zero2 zero3 --repeats 1 --json docs/measured/modes.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests"
sys.path.insert(0, str(TESTS))

from tiny import make_keys, make_model, make_tokenizer  # noqa: E402

from hf_wmguard import verify  # noqa: E402
from hf_wmguard.evidence.manifest import read_manifest  # noqa: E402

SINGLE = "single"
ZERO = {f"zero{stage}": stage for stage in (1, 2, 3)}
MODES = (SINGLE, "ddp", "fsdp2", *ZERO)


def train(mode: str, root: Path) -> dict[str, Any]:
    """Run one training, and return what the manifest of its finished save says and whether verify agrees."""
    make_keys(root / "keys")
    settings: dict[str, Any] = {"task": "causal_lm", "trigger_form": None}
    if mode == "fsdp2":
        make_model("causal_lm", len(make_tokenizer())).save_pretrained(root / "base")
        settings |= {"base": str(root / "base"), "split": {"fsdp_size": 2}, "arguments": {"save_only_model": True}}
    if mode in ZERO:
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": ZERO[mode], "stage3_gather_16bit_weights_on_model_save": True},
        }
        (root / "ds.json").write_text(json.dumps(config))
        settings["arguments"] = {"deepspeed": str(root / "ds.json"), "save_only_model": True}
    processes = 1 if mode == SINGLE else 2
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(TESTS / "distributed_run.py"), str(root), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: {mode} failed\n{done.stderr[-2000:]}")
    ranks = [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    manifest = json.loads(read_manifest(root / "final")[0].to_bytes())["signature"]
    verdict = verify(root / "final", owner_key=f"file:{root / 'keys' / 'owner.key'}", registry=str(root / "registry"))
    return {
        "bit_error_rate": manifest["bit_error_rate"],
        "payload_decoded": manifest["payload_decoded"],
        "log10_p": manifest["log10_p"],
        "projections": manifest["projections"],
        "weight_change": manifest["weight_change"],
        "verdict": verdict.verdict,
        "processes": ranks[0]["world"],
        "same_bits_on_all": len({rank["digest"] for rank in ranks}) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each mode, each with a key of its own")
    parser.add_argument("--json", type=Path, help="where to write what was found; other modes in it stay")
    options = parser.parse_args()
    there = importlib.util.find_spec("deepspeed") is not None
    found = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    for mode in options.modes or [mode for mode in MODES if there or mode not in ZERO]:
        runs = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as work:
                runs.append(train(mode, Path(work)))
        mean = statistics.mean(run["log10_p"] for run in runs)
        found[mode] = {"runs": runs, "worst_bit_error_rate": max(run["bit_error_rate"] for run in runs)}
        found[mode]["mean_log10_p"] = round(mean, 2)
        if SINGLE in found:
            found[mode]["relative_to_single"] = round(mean / found[SINGLE]["mean_log10_p"] - 1, 5)
        print(
            f"{mode:8} bit error rate {found[mode]['worst_bit_error_rate']:g}, log10 p {mean:.1f}, "
            f"{found[mode].get('relative_to_single', 0):+.3%} against one process",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
