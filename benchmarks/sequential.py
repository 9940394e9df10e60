"""What looking after every key costs: the anytime-valid p-value against the exact tail (ADR 0010).

    python benchmarks/sequential.py [--runs 40]

A model matches each try with a given rate and names another candidate, drawn at random, where it does not, which is
the worst that a miss can be: one that names none costs nothing. Tries of one key are ``alike`` (all as the first) or
``apart`` (independent). First table: grids of tilts, by how many decades they lose against the exact tail after all
keys. Second: the product's grid, mean log10 p of both tests after all keys, and the median number of keys
until each is at 1e-9 (for the exact tail: if that number of keys had been settled beforehand).
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.watermark.pvalues import log10_tally_tail, tally_of
from hf_wmguard.watermark.sequential import TILTS, SequentialTest, log_e_value

KEYS = 64
RATES = (0.3, 0.5, 0.7, 0.9, 1.0)
WIDTHS = (8, 16, 45, 256)
TRIES = ("1", "4 alike", "4 apart")
LEVEL = -9.0
LN10 = math.log(10.0)
GRIDS = {
    "4": (4.0,),
    "1 to 8, x 2": (1.0, 2.0, 4.0, 8.0),
    "0.25 to 16, x 2": tuple(0.25 * 2**j for j in range(7)),
    "0.25 to 16, x 1.4": tuple(0.25 * 2 ** (j / 2) for j in range(13)),
    "0.5 to 11, x 1.4": tuple(0.5 * 2 ** (j / 2) for j in range(10)),
    "0.5 to 11, x 1.2": tuple(0.5 * 2 ** (j / 4) for j in range(19)),
    "0.25 to 11, x 1.2": tuple(0.25 * 2 ** (j / 4) for j in range(23)),
    "1 to 10, + 1": tuple(float(j) for j in range(1, 11)),
    "0.5 to 10, + 0.5": tuple(0.5 * j for j in range(1, 21)),
}
EVERY = tuple(sorted({tilt for grid in (*GRIDS.values(), TILTS) for tilt in grid}))


@dataclass(frozen=True)
class Runs:
    """Both tests on simulated answers.

    Args:
        exact: log10 p of the exact tail after each number of keys where it was computed, [runs].
        needed: Keys until the exact tail is at the level, [runs]; infinite where it never is.
        log_e: ln of the e-value of each tilt after each key, [runs, keys, EVERY].
        product: log10 p of `SequentialTest` after all keys, [runs].
    """

    exact: Tensor
    needed: Tensor
    log_e: Tensor
    product: Tensor

    def of(self, grid: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Return log10 p after all keys and the keys until the level of a mixture over a grid, [runs] each."""
        part = self.log_e[:, :, [EVERY.index(tilt) for tilt in grid]]
        log10_p = (-(part.logsumexp(2) - math.log(len(grid))) / LN10).cummin(1).values.clamp_max(0.0)
        reached = log10_p <= LEVEL
        first = torch.where(reached.any(1), reached.int().argmax(1) + 1.0, torch.inf)
        return log10_p[:, -1], first


def simulate(rate: float, k: int, tries: str, *, runs: int) -> Runs:
    """Return both tests over simulated models of one kind."""
    draw = torch.Generator().manual_seed(k)
    count = int(tries[0])
    own = 1 if "alike" in tries else count
    # Candidate 0 is the response: which one it is makes no difference to either test.
    missed = torch.rand(runs, KEYS, own, generator=draw) >= rate
    named = (missed * torch.randint(1, k, (runs, KEYS, own), generator=draw)).expand(runs, KEYS, count).tolist()
    exact, needed, log_e, product = [], [], [], []
    for run in named:
        tallies = [tally_of(one, k) for one in run]
        matches = list(itertools.accumulate(one.count(0) for one in run))

        def tail(keys: int, matches: list[int] = matches, tallies: list[tuple[int, dict[int, int]]] = tallies) -> float:
            return log10_tally_tail(matches[keys - 1], tallies[:keys])

        exact.append(tail(KEYS))
        needed.append(next((keys for keys in range(1, KEYS + 1) if tail(keys) <= LEVEL), math.inf))
        log_e.append([[log_e_value(tally, 0, tilt) for tilt in EVERY] for tally in tallies])
        test = SequentialTest()
        for one in run:
            test.update(one, 0, k)
        product.append(test.log10_p)
    # A median over keys where some never get there is still right: they are at the far end.
    return Runs(
        torch.tensor(exact, dtype=torch.float64),
        torch.tensor(needed),
        torch.tensor(log_e, dtype=torch.float64).cumsum(1),
        torch.tensor(product, dtype=torch.float64),
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = list(itertools.product(WIDTHS, RATES, TRIES))
    results = {kind: simulate(kind[1], kind[0], kind[2], runs=options.runs) for kind in kinds}
    print("| tilts | lost, mean | lost, most | where | more keys until 1e-9, mean |")
    print("|---|--:|--:|---|--:|")
    for name, grid in GRIDS.items():
        lost = {kind: float((runs.of(grid)[0] - runs.exact).mean()) for kind, runs in results.items()}
        most = max(lost, key=lambda kind: lost[kind])
        more = [float(runs.of(grid)[1].median() - runs.needed.median()) for runs in results.values()]
        more = [one for one in more if math.isfinite(one)]
        where = f"k {most[0]}, rate {most[1]}, tries {most[2]}"
        mean, later = sum(lost.values()) / len(lost), sum(more) / len(more)
        print(f"| {name} | {mean:.2f} | {lost[most]:.2f} | {where} | {later:.1f} |")
    print("\n| k | tries |" + "".join(f" rate {rate} |" for rate in RATES))
    print("|--:|---|" + "--:|" * len(RATES))
    for k, tries in itertools.product(WIDTHS, TRIES):
        cells = []
        for rate in RATES:
            runs = results[k, rate, tries]
            log10_p, first = runs.of(TILTS)
            if (log10_p - runs.product).abs().max() > 1e-9:
                raise SystemExit("error: the benchmark's mixture is not that of SequentialTest")
            keys = "/".join(
                f"{x:.0f}" if math.isfinite(x) else "-" for x in (float(runs.needed.median()), float(first.median()))
            )
            cells.append(f" {runs.exact.mean():.1f} / {log10_p.mean():.1f} ({keys}) |")
        print(f"| {k} | {tries} |" + "".join(cells))
    print("Mean log10 p of the exact tail / of the sequential test after 64 keys (median keys until 1e-9 of each).")


if __name__ == "__main__":
    main()
