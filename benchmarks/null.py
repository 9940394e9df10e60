"""The empirical null: how often wrong keys reach a p-value on real weights, against what the p-value claims.

``python benchmarks/null.py MODEL... --marked MODEL`` reads each model, and one more that another owner has marked,
with wrong keys in two ways:

* ``full``: a fresh owner key per trial through the whole product: `new_record` at the default budget, baselines and
  all, `carrier_keys`, `read_attempts`, and the p-value of the verdict, corrected for every test.
* ``fast``: many more keys, each read along 33 x 33 directions of one matrix, the matrices taking turns. Directions,
  order of the steps and dithers are the bytes that the product draws, the reading and the p-value are its own (the
  first keys of every matrix are compared with `CarrierKey.derive` and `Reading.log10_p`); what is left out is the code
  of the payload, whose place random code bits take, and the inverses that only embedding needs. The statistic is that
  of `Reading.score`: the best of all weightings, corrected for their number.

The fast share compares statistics with the smallest one at which `log10_p_weighted` reaches a level, found by
bisection, instead of computing each p-value: the bound falls with the statistic, so that the counts are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from scipy.stats import beta
from torch import Tensor

from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import new_record
from hf_wmguard.suspects.signature import read_attempts
from hf_wmguard.suspects.sources import InMemory
from hf_wmguard.watermark.carriers import Carrier, is_carrier
from hf_wmguard.watermark.planner import ERROR_LEVELS, Mix, choose_mix, weights_for
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_p_weighted
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections, read_signature, residual

Weights = dict[str, Tensor]
SHOWN = (-1.0, -2.0, -3.0, -4.0)
LEVELS = tuple(-0.1 * k for k in range(1, 61))
BATCH = 100
COMPARED = 2
# 33 x 33 projections hold a payload; the mix is that of a small encoder at a budget of 1%.
SIDE = 33
MIX = choose_mix(11_500.0)
# The owner whose mark the last model bears.
MARKER = 1 << 40
CONFIG = WatermarkConfig(
    model_id="benchmark/null",
    owner_key="env:NONE",
    registry="none",
    signature=SignatureConfig(),
    triggers=None,
)


def _name(path: Path) -> str:
    parts = path.resolve().parts
    return parts[-2] if parts[-1] == "model" else parts[-1]


def load(model: Path) -> Weights:
    """Return the matrices of a model that may carry, float32."""
    weights = {}
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            if is_carrier(name, tuple(file.get_slice(name).get_shape())):
                weights[name] = file.get_tensor(name).float()
    return weights


def secret(number: int) -> bytes:
    """Return the wrong owner key of one trial."""
    return number.to_bytes(32, "big")


def record_of(weights: Weights, number: int) -> WatermarkRecord:
    """Return what the owner of one key would commit to for this model."""
    return new_record(
        OwnerKey(secret(number)),
        CONFIG,
        salt=secret(number + 1),
        shapes={name: (tile.shape[0], tile.shape[1]) for name, tile in weights.items()},
        read=lambda name, start, rows: weights[name][start : start + rows],
    )


def verdict_log10_p(weights: Weights, record: WatermarkRecord, number: int) -> float:
    """Return the corrected p-value of the verdict with one owner's key."""

    keys = record.carrier_keys(OwnerKey(secret(number)))
    attempts = read_attempts(record, keys, InMemory(weights))
    scores = [(attempt, attempt.reading.score()) for attempt in attempts]
    tests = sum(attempt.tests * score.tests for attempt, score in scores)
    return log10_bonferroni(min(score.log10_p for _, score in scores), tests)


def mark(weights: Weights, number: int) -> tuple[Weights, float]:
    """Return the weights with the whole mark of one owner, and the verdict with the right key."""
    record = record_of(weights, number)
    marked = {name: tile.clone() for name, tile in weights.items()}
    for key in record.carrier_keys(OwnerKey(secret(number))):
        tile = marked[key.carrier.name][key.carrier.row_start : key.carrier.row_start + key.carrier.rows]
        move_(tile, key, residual(read_projections(tile, key), key))
    return marked, verdict_log10_p(marked, record, number)


@dataclass(frozen=True)
class Tiles:
    """Whole matrices, each a carrier by itself, of as many projections and the same mix of steps.

    Args:
        weights: The matrices.
        carriers: One for each, in the order of their names.
        mix: The steps of each.
    """

    weights: Weights
    carriers: tuple[Carrier, ...]
    mix: Mix

    @classmethod
    def of(cls, weights: Weights) -> Tiles:
        """Return the matrices of a model that are large enough for a payload of their own."""
        fit = {name: tile for name, tile in sorted(weights.items()) if min(tile.shape) >= 8 * SIDE}
        carriers = tuple(
            Carrier(
                name=name,
                shape=(tile.shape[0], tile.shape[1]),
                row_start=0,
                rows=tile.shape[0],
                sides=(SIDE, SIDE),
                rms=float(tile.norm()) / math.sqrt(tile.numel()),
            )
            for name, tile in fit.items()
        )
        if not carriers:
            raise SystemExit(f"error: no matrix has {8 * SIDE} rows and columns")
        return cls(fit, carriers, MIX.of(SIDE**2))

    def draw(self, carrier: Carrier, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return left and right directions, relative steps, dithers and code bits of one key."""
        key = secret(number)
        levels = torch.tensor([step for step, count in self.mix.parts for _ in range(count)], dtype=torch.float64)
        steps = levels[Stream(key, "steps").uniform(SIDE**2).argsort(stable=True)]
        stream = Stream(key, "carrier", carrier.name, carrier.row_start, carrier.rows, *carrier.sides)
        left = stream.signs(carrier.rows, SIDE) / math.sqrt(carrier.rows)
        right = stream.signs(carrier.shape[1], SIDE) / math.sqrt(carrier.shape[1])
        dithers = stream.uniform(SIDE**2) * (steps * carrier.rms)
        return left, right, steps, dithers, Stream(key, "bits").bits(SIDE**2).double()

    def sums(self, index: int, numbers: range) -> Tensor:
        """Return the sums of one carrier's signed cosines at each step, float64 [keys, steps]."""
        carrier = self.carriers[index]
        drawn = [self.draw(carrier, number) for number in numbers]
        left, right, steps, dithers, bits = (torch.stack(one) for one in zip(*drawn, strict=True))
        rows = left.transpose(1, 2).reshape(-1, carrier.rows) @ self.weights[carrier.name]
        projections = torch.bmm(rows.reshape(len(drawn), SIDE, -1), right).double().flatten(1)
        cosines = (1 - 2 * bits) * torch.cos(2 * math.pi * (projections - dithers) / (steps * carrier.rms))
        return torch.stack([(cosines * (steps == step)).sum(1) for step, _ in self.mix.parts], 1)

    def compare(self) -> None:
        """Stop unless these are the directions and the readings of the product."""
        numbers = range(1, 1 + COMPARED)
        for index, carrier in enumerate(self.carriers):
            sums = self.sums(index, numbers)
            for number, expected in zip(numbers, sums, strict=True):
                left, right, steps, dithers, bits = self.draw(carrier, number)
                key = CarrierKey.derive(secret(number), carrier, bits, steps)
                same = [(key.left, left), (key.right, right), (key.dither.flatten(), dithers)]
                reading = read_signature([key], lambda carrier: self.weights[carrier.name])
                score = log10_bonferroni(*self.score(expected))
                if not all(torch.equal(*pair) for pair in same) or abs(score - reading.log10_p) > 1e-3:
                    raise SystemExit("error: the fast share reads something else than the product")

    def weightings(self) -> list[list[float]]:
        """Return the weights of the steps that `Reading.score` tries."""
        steps = torch.tensor([step for step, _ in self.mix.parts], dtype=torch.float64)
        return [weights_for(error, steps).tolist() for error in ERROR_LEVELS]

    def score(self, sums: Tensor) -> tuple[float, int]:
        """Return the best log10 p of all weightings of one key's sums, float64 [steps], and their number."""
        counts = [count for _, count in self.mix.parts]
        tried = self.weightings()
        return min(log10_p_weighted(float(sums @ sums.new_tensor(one)), one, counts) for one in tried), len(tried)

    def reached(self, sums: Tensor) -> list[int]:
        """Return how many keys reach each of `LEVELS`, corrected for the weightings."""
        counts = [count for _, count in self.mix.parts]
        reached = torch.zeros(len(LEVELS), len(sums), dtype=torch.bool)
        for weights in self.weightings():
            statistics = sums @ sums.new_tensor(weights)
            for row, level in enumerate(LEVELS):
                low, high = 0.0, sum(w * n for w, n in zip(weights, counts, strict=True))
                for _ in range(30):
                    middle = 0.5 * (low + high)
                    p = log10_bonferroni(log10_p_weighted(middle, weights, counts), len(ERROR_LEVELS))
                    low, high = (low, middle) if p <= level else (middle, high)
                reached[row] |= statistics >= high
        return reached.sum(1).tolist()

    def smallest(self, sums: Tensor) -> float:
        """Return the smallest corrected log10 p of all keys."""
        ends = {int((sums @ sums.new_tensor(weights)).argmax()) for weights in self.weightings()}
        return min(log10_bonferroni(*self.score(sums[end])) for end in ends)


_STATE: dict[str, Any] = {}


def start(weights: Weights, tiles: Tiles) -> None:
    """Give a process what all its trials share."""
    torch.set_num_threads(1)
    _STATE.update(weights=weights, tiles=tiles)


def full_trial(number: int) -> float:
    """Return the verdict's log10 p with a wrong owner key through the whole product."""
    return verdict_log10_p(_STATE["weights"], record_of(_STATE["weights"], number), number)


def fast_trials(batch: int, keys: int) -> Tensor:
    """Return the sums of one batch of keys; the matrices take turns."""
    tiles: Tiles = _STATE["tiles"]
    first = 1 + batch * BATCH
    return tiles.sums(batch % len(tiles.carriers), range(first, min(first + BATCH, keys + 1)))


def upper(count: int, trials: int) -> float:
    """Return the exact upper limit of a rate, one-sided, at 99% confidence (Clopper & Pearson 1934)."""
    return float(beta.ppf(0.99, count + 1, trials - count)) if count < trials else 1.0


def judge(name: str, weights: Weights, *, keys: int, full: int, processes: int, right: float | None) -> dict[str, Any]:
    """Return the results of one model."""
    tiles = Tiles.of(weights)
    tiles.compare()
    begun = time.monotonic()
    with ProcessPoolExecutor(processes, initializer=start, initargs=(weights, tiles)) as pool:
        batches = range(math.ceil(keys / BATCH))
        sums = torch.cat(list(pool.map(fast_trials, batches, [keys] * len(batches), chunksize=2)))
        fast_s = time.monotonic() - begun
        values = sorted(pool.map(full_trial, range(1_000_001, 1_000_001 + full)))
    shares = {
        "fast": (keys, tiles.reached(sums), tiles.smallest(sums)),
        "full": (full, [sum(value <= level for value in values) for level in LEVELS], values[0] if values else 0.0),
    }
    return {
        "model": name,
        "log10_p_of_the_right_key": right,
        "matrices": len(weights),
        "fast_matrices": len(tiles.carriers),
        "fast_projections": tiles.mix.projections,
        "fast_steps": tiles.mix.parts,
        "fast_s": round(fast_s, 1),
        "full_s": round(time.monotonic() - begun - fast_s, 1),
        "levels_log10": [round(level, 1) for level in LEVELS],
        "shares": {
            share: {
                "keys": trials,
                "smallest_log10_p": low,
                "reached": reached,
                "upper_99": [upper(count, trials) for count in reached],
            }
            for share, (trials, reached, low) in shares.items()
            if trials
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the counts as a table."""
    lines = ["| model | share | keys | smallest p |" + "".join(f" p <= 1e{level:.0f} |" for level in SHOWN)]
    lines.append("|---|---|---|---|" + "---|" * len(SHOWN))
    for result in results:
        for share, one in result["shares"].items():
            cells = ""
            for level in SHOWN:
                at = result["levels_log10"].index(level)
                cells += f" {one['reached'][at]} ({one['upper_99'][at]:.1e}) |"
            lines.append(
                f"| {result['model']} | {share} | {one['keys']} | {10 ** one['smallest_log10_p']:.1e} |" + cells
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Write the share of keys that reach a p-value against that p-value; the bound is the diagonal."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5))
    for result in results:
        for share, one in result["shares"].items():
            points = [
                (10**x, n / one["keys"]) for x, n in zip(result["levels_log10"], one["reached"], strict=True) if n
            ]
            if points:
                style = "-" if share == "fast" else ":"
                axes.plot(*zip(*points, strict=True), style, label=f"{result['model']}, {share}, {one['keys']} keys")
    axes.plot([1e-6, 1], [1e-6, 1], "k--", label="what is claimed")
    axes.set(xscale="log", yscale="log", xlabel="claimed p", ylabel="share of wrong keys that reach it")
    axes.set(xlim=(1e-6, 1), ylim=(1e-6, 1))
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Run the trials, print the table, and write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders with a model.safetensors")
    parser.add_argument("--marked", type=Path, help="one more model, read after another owner has marked it")
    parser.add_argument("--keys", type=int, default=100_000, help="wrong keys of the fast share, at each model")
    parser.add_argument("--full", type=int, default=100, help="wrong owner keys through the whole product")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    suspects: list[tuple[str, Weights, float | None]] = [(_name(path), load(path), None) for path in options.models]
    if options.marked:
        suspects.append((f"{_name(options.marked)}, marked", *mark(load(options.marked), MARKER)))
    results = []
    for name, weights, right in suspects:
        results.append(
            judge(name, weights, keys=options.keys, full=options.full, processes=options.processes, right=right)
        )
        (options.out / "null.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "null.png")
    print(table(results))
    print("In brackets: exact upper limit of the rate, 99% confidence.")


if __name__ == "__main__":
    main()
