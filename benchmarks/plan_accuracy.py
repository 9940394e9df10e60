"""How well `wmguard plan` predicts: mark a model post hoc, attack it, and compare.

    python benchmarks/plan_accuracy.py MODEL_DIR [--budget 0.01] [--markings 3]

Prints, for each attack, the predicted and the measured log10 p and whether the payload decodes, over several markings
with fresh keys.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.embedding import embed_folder
from hf_wmguard.keys import OwnerKey
from hf_wmguard.robustness.merging import merge_linear
from hf_wmguard.robustness.plan import MEASURED, make_plan
from hf_wmguard.verification import SignatureResult, verify

Weights = Mapping[str, Tensor]


def attacks(unmarked: Weights) -> dict[str, Callable[[Weights], dict[str, Tensor]]]:
    """Return every attack of a plan that can be made with the weights alone."""
    made = dict(MEASURED)
    for owner in (0.5, 0.3, 0.1):
        made[f"merging, owner {owner}"] = lambda weights, w=owner: merge_linear(weights, unmarked, w)
    return made


def measure(folder: Path, work: Path, budget: float) -> dict[str, SignatureResult]:
    """Return what the signature says after each attack on a fresh marking."""
    OwnerKey.generate().write(work / "owner.key")
    config = WatermarkConfig(
        model_id="benchmark",
        owner_key=f"file:{work / 'owner.key'}",
        registry=str(work / "registry"),
        signature=SignatureConfig(budget=budget),
        triggers=None,
    )
    embedded = embed_folder(folder, work / "marked", config)
    print(f"marked: weight change {embedded.weight_change:.3%}, {embedded.projections} projections", flush=True)
    unmarked, marked = load_file(folder / "model.safetensors"), load_file(work / "marked" / "model.safetensors")
    found = {}
    for name, attack in attacks(unmarked).items():
        report = verify(attack(marked), owner_key=config.owner_key, registry=config.registry)
        if report.signature is not None:
            found[name] = report.signature
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--markings", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    plan = make_plan(options.model, budget=options.budget)
    print(f"plan: weight change {plan.weight_change:.3%}, {plan.projections} projections")
    runs = []
    for _ in range(options.markings):
        with tempfile.TemporaryDirectory() as work:
            runs.append(measure(options.model, Path(work), options.budget))
    print(f"\n{'attack':<24}{'predicted':>10}{'measured (log10 p)':>32}{'payload':>10}  decoded")
    for one in plan.predictions:
        if one.attack in runs[0]:
            measured = [run[one.attack] for run in runs]
            values = "".join(f"{m.log10_p:>11.1f}" for m in measured)
            decoded = f"{sum(m.payload_decoded for m in measured)} of {len(measured)}"
            print(f"{one.attack:<24}{one.log10_p:>10.1f}{values:>32}{one.payload_decodes!s:>10}  {decoded}")


if __name__ == "__main__":
    main()
