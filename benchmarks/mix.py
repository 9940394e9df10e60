"""What a mix of steps is worth against single steps at an equal budget, and the energy at which a payload decodes.

``python benchmarks/mix.py [--cost 11500] [--trials 400]``. The cost is 12 x weights x (0.95 x budget)^2: 11,500 is a
small encoder (10.6 million weights in its blocks) at a budget of 1%. The first table is `predict`, attack by attack:
log10 p, and the energy sum n rho^2. The second one is simulated: projections of the mix and of a single step under
growing Gaussian errors, cosines weighted as the verdict weights them, the share of 256-bit payloads that are lost.
"""

from __future__ import annotations

import argparse
import math

import torch

from hf_wmguard.watermark.payload import PAYLOAD_BYTES, decode, encode
from hf_wmguard.watermark.planner import ERROR_LEVELS, Attack, Mix, choose_mix, payload_decodes, predict, weights_for
from hf_wmguard.watermark.prf import Stream

ATTACKS = {
    "error 0.267 (prune 50%)": Attack(error=0.267),
    "error 0.465 (prune 70%)": Attack(error=0.465),
    "error 0.749 (prune 90%)": Attack(error=0.749),
    "error 1.0": Attack(error=1.0),
    "merge 0.5": Attack(owner_weight=0.5),
    "merge 0.3": Attack(owner_weight=0.3, error=0.05),
    "merge 0.1": Attack(owner_weight=0.1, error=0.05),
}
KEY = bytes(range(32))


def losses(mix: Mix, error: float, trials: int) -> float:
    """Return the share of random payloads that are not read back under an error in units of the rms."""
    draw = torch.Generator().manual_seed(round(1e4 * error))
    steps = torch.tensor([step for step, count in mix.parts for _ in range(count)], dtype=torch.float64)
    steps = steps[torch.randperm(len(steps), generator=draw)]
    # The weighting that is nearest: the verdict takes the one with the smallest p-value.
    weights = weights_for(min(ERROR_LEVELS, key=lambda level: abs(level - error)), steps)
    lost = 0
    for _ in range(trials):
        payload = bytes(torch.randint(0, 256, (PAYLOAD_BYTES,), generator=draw).tolist())
        bits = encode(payload, len(steps), Stream(KEY, "code")).double()
        moved = error * torch.randn(len(steps), generator=draw, dtype=torch.float64) / steps
        lost += decode(torch.cos(math.pi * bits + 2 * math.pi * moved) * weights, Stream(KEY, "code")) != payload
    return lost / trials


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", type=float, default=11_500.0, help="sum of the squared steps that the budget allows")
    parser.add_argument("--trials", type=int, default=400, help="payloads for each error")
    options = parser.parse_args()
    mix = choose_mix(options.cost)
    plans = {"mix": mix, **{f"D = {step:g}": choose_mix(options.cost, step) for step in (1.0, 2.0, 4.0)}}
    print("mix: " + ", ".join(f"{count} x {step:g} rms" for step, count in mix.parts))
    print("| attack |" + "".join(f" {name} ({plan.projections}) |" for name, plan in plans.items()))
    print("|---|" + "---|" * len(plans))
    for name, attack in ATTACKS.items():
        cells = ""
        for plan in plans.values():
            log10_p, energy = predict(plan, attack)
            cells += f" {log10_p:.0f}, {energy:.0f}{' *' if payload_decodes(energy) else ''} |"
        print(f"| {name} |{cells}")
    print("In each cell: log10 p, energy; * where the payload is expected to decode.\n")
    print("| plan | error | energy | payloads lost |")
    print("|---|---|---|---|")
    for name, plan, errors in (
        ("mix", mix, (0.3, 0.32, 0.34, 0.36, 0.38, 0.42)),
        ("D = 2", plans["D = 2"], (0.36, 0.38, 0.4, 0.42, 0.44, 0.48)),
    ):
        for error in errors:
            energy = predict(plan, Attack(error=error))[1]
            print(f"| {name} | {error} | {energy:.0f} | {losses(plan, error, options.trials):.3f} |", flush=True)


if __name__ == "__main__":
    main()
