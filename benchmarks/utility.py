"""What the guard costs in utility at its defaults: guarded runs beside their unguarded twins, three seeds.

Expected, written down before the run: the signature alone moves perplexity by less than 0.05% (the survival benchmark
has 0.01% at a larger budget); triggers cost small-llama about 1%, five times what is allowed, because 64 keys are much
of what a run of 160 steps learns (the triggers benchmark has 1.1% for one seed).

Twins see the same rows in the same order from the same seed. Models, data and training are those of the triggers
benchmark, the values of `SignatureConfig` and `TriggerConfig` the defaults. Utility is perplexity on 24,000 held-out
tokens (small-llama) or accuracy on 3,533 glosses (MiniLM, where one gloss is 0.04%).

    python benchmarks/utility.py --out OUT --json docs/measured/utility.json

About 20 minutes of one core. What is trained already under OUT is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent / "triggers"))

import torch
import train as training
from train import Cell, Mark
from trainer import DEFAULT_SHARED

from hf_wmguard import SignatureConfig, TriggerConfig

PLAIN: Mark = "plain"


def compare(model: str, seeds: list[int], marks: list[Mark], out: Path, shared: Path) -> dict[str, Any]:
    """Train what is missing, and return the relative losses of utility by kind of mark."""
    defaults = {name: value for name, value in asdict(TriggerConfig()).items() if name not in ("count", "style")}
    found: dict[str, Any] = {"seeds": seeds}
    plain: dict[int, float] = {}
    for mark in (PLAIN, *marks):
        cells = []
        for seed in seeds:
            cell = Cell(model=model, seed=seed, mark=mark)
            done = training.train(cell, out=out, shared=shared, triggers=defaults, budget=SignatureConfig().budget)
            one: dict[str, Any] = {
                "seed": seed,
                "utility": done["utility"],
                "train_cpu_s": round(done["train_cpu_s"], 1),
            }
            if mark == PLAIN:
                plain[seed] = done["utility"]
            else:
                one["relative_loss"] = round(cell.task.change(plain[seed], done["utility"]), 6)
                one["weight_change"] = done["manifest"]["signature"]["weight_change"]
                one["bit_error_rate"] = done["manifest"]["signature"]["bit_error_rate"]
                one["match_rate"] = (done["manifest"]["triggers"] or {}).get("match_rate")
            cells.append(one)
            print(f"{cell.name}: {json.dumps(one)}", file=sys.stderr, flush=True)
        found[mark] = {"runs": cells}
        if mark != PLAIN:
            found[mark]["mean_relative_loss"] = round(statistics.mean(one["relative_loss"] for one in cells), 6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("llama", "minilm"), default=["llama"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--marks", nargs="+", choices=get_args(Mark)[1:], default=["signature", "triggers"])
    parser.add_argument("--shared", type=Path, default=DEFAULT_SHARED, help="folder with data/ and models/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained models")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    out, shared = options.out.resolve(), options.shared.resolve()
    found = {model: compare(model, options.seeds, options.marks, out, shared) for model in options.models}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
