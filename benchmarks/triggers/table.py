"""Print what the grid found as markdown, draw it, and keep it in one small file.

    python benchmarks/triggers/table.py --out OUT --save benchmarks/triggers/results.json
    python benchmarks/triggers/table.py --results benchmarks/triggers/results.json --plots docs/triggers

The first table says whether every bound holds, over all models and seeds; the others give the cost of the mark, the
fluency of the keys, the curve of their number, and every row by model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

import paths  # noqa: F401  the next imports are found through it
from settings import ALPHA_LOG10, INNOCENT, ROWS, Row
from tasks import TASKS

UTILITY_BOUND = 0.002
SERVED = ("greedy", "t0.7", "t1.0", "top_p0.9", "chat", "system_1", "system_chat_1", "filter_t1.0")
"""Whose sequential curves are kept and drawn."""
ALL_ROWS = ROWS | INNOCENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One suspect asked.

    Args:
        cell: The marked model.
        row: What was done to it and how it was served.
        share: Of the tries that match.
        log10_p: Of asking every key (fixed, exact).
        queries: Of the sequential probe until its decision, or until its budget was spent.
        decoys: Those of them that were decoys.
        sequential_log10_p: What it came to.
        loss: Relative utility lost by the attack, None where there was none.
        curve: The sequential log10 p over the queries; kept of some rows.
    """

    cell: str
    row: str
    share: float
    log10_p: float
    queries: int
    decoys: int
    sequential_log10_p: float
    loss: float | None
    curve: tuple[float, ...] = ()

    @classmethod
    def from_run(cls, value: dict[str, Any]) -> Self:
        """Return what `run.py` wrote about a suspect, rounded to what is printed."""
        sequential, loss = value["sequential"], value.get("utility_loss")
        return cls(
            cell=value["cell"],
            row=value["row"],
            share=round(value["share"], 4),
            log10_p=round(value["log10_p"], 2),
            queries=sequential["queries"],
            decoys=sequential["decoys"],
            sequential_log10_p=round(sequential["log10_p"], 2),
            loss=None if loss is None else round(loss, 5),
            curve=tuple(sequential["curve"]) if value["row"] in SERVED else (),
        )

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.cell.split("-")[0]

    @property
    def is_usual(self) -> bool:
        """Whether the marked model has the usual number and style of keys."""
        return self.cell.endswith("-triggers")

    @property
    def decided(self) -> bool:
        """Whether the sequential probe came to the level within its budget."""
        return self.sequential_log10_p <= ALPHA_LOG10

    @property
    def holds(self) -> bool | None:
        """Whether it is what the row asks for, None where it asks for nothing."""
        row = ALL_ROWS[self.row]
        if row.innocent:
            return self.log10_p > ALPHA_LOG10 and not self.decided
        wanted = [
            None if row.share is None else self.share >= row.share,
            None if row.log10_p is None else self.log10_p <= row.log10_p,
            self.decided if row.queries else None,
        ]
        asked = [one for one in wanted if one is not None]
        return all(asked) if asked else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Everything that was found.

    Args:
        cells: What was trained, by name.
        results: Every suspect.
        fluency: By cell, judge and kind of text.
    """

    cells: dict[str, dict[str, Any]]
    results: list[Result]
    fluency: dict[str, Any]

    @classmethod
    def from_run(cls, out: Path) -> Self:
        """Return what lies under a folder that `run.py` wrote."""
        cells = {}
        for path in sorted((out / "cells").glob("*/cell.json")):
            cell = json.loads(path.read_text())
            triggers = cell.get("manifest", {}).get("triggers")
            cells[path.parent.name] = {
                "utility": cell["utility"],
                "train_cpu_s": round(cell["train_cpu_s"], 1),
                "triggers": cell.get("triggers"),
                "match_rate": triggers and triggers["match_rate"],
            }
        found = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*/*.json"))]
        return cls(
            cells=cells,
            results=[Result.from_run(value) for value in found if "sequential" in value],
            fluency={value["cell"]: value["fluency"] for value in found if "fluency" in value},
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what `save` wrote."""
        value = json.loads(path.read_text())
        results = [Result(**one | {"curve": tuple(one["curve"])}) for one in value["results"]]
        return cls(cells=value["cells"], results=results, fluency=value["fluency"])

    def save(self, path: Path) -> None:
        """Write everything, one suspect per line."""
        lines = ",\n".join(json.dumps(asdict(one)) for one in self.results)
        cells, fluency = json.dumps(self.cells, indent=1), json.dumps(self.fluency)
        path.write_text(f'{{"cells": {cells},\n"fluency": {fluency},\n"results": [\n{lines}\n]}}\n')

    def of(self, names: Iterable[str], *, model: str | None = None) -> list[Result]:
        """Return the results of some rows on models with the usual keys."""
        wanted = set(names)
        return [one for one in self.results if one.is_usual and one.row in wanted and model in (None, one.model)]

    @property
    def models(self) -> list[str]:
        """Models of the grid."""
        return sorted({one.model for one in self.results})


def _labels() -> dict[str, list[Row]]:
    labels: dict[str, list[Row]] = {}
    for row in ALL_ROWS.values():
        labels.setdefault(row.label, []).append(row)
    return labels


def _worst(found: Sequence[Result]) -> tuple[float, float]:
    """Return share of keys and log10 p of the worst; where nothing may be found, of the one where most is."""
    if ALL_ROWS[found[0].row].innocent:
        return max(one.share for one in found), min(one.log10_p for one in found)
    return min(one.share for one in found), max(one.log10_p for one in found)


def _queries(found: Sequence[Result]) -> str:
    """Return the most queries until a decision, with decoys and without, and how many probes came to one."""
    decided = [one for one in found if one.decided]
    if not decided:
        return "none decides"
    most = max(one.queries for one in decided)
    asked = max(one.queries - one.decoys for one in decided)
    left = f", {len(decided)} of {len(found)} decide" if len(decided) < len(found) else ""
    return f"{most} / {asked}{left}"


def _losses(found: Sequence[Result]) -> str:
    losses = [one.loss for one in found if one.loss is not None]
    return f"{_percent(min(losses))} to {_percent(max(losses))}" if losses else ""


def _percent(share: float, digits: int = 1) -> str:
    # Adding 0 makes a negative zero positive.
    return f"{round(100 * share, digits) + 0.0:+.{digits}f}%"


def _met(found: Sequence[Result]) -> str:
    missed = [one for one in found if one.holds is False]
    if all(one.holds is None for one in found):
        return ""
    return f"**{len(missed)} of {len(found)} missed**" if missed else "yes"


def bounds(grid: Grid) -> Iterable[str]:
    """Yield the table of what must hold, over all models and seeds."""
    yield (
        "| after, or served with | must | suspects | worst share of keys | mean | worst log10 p | "
        "queries with / without decoys | utility lost | met |"
    )
    yield "| --- | --- | --: | --: | --: | --: | --: | --: | --- |"
    for label, rows in _labels().items():
        found = grid.of([row.name for row in rows])
        if found:
            share, log10_p = _worst(found)
            average = mean(one.share for one in found)
            yield (
                f"| {label} | {rows[0].must} | {len(found)} | {100 * share:.1f}% | {100 * average:.1f}% | "
                f"{log10_p:.1f} | {_queries(found)} | {_losses(found)} | {_met(found)} |"
            )


def by_model(grid: Grid) -> Iterable[str]:
    """Yield the table of every row on every model: share of keys, log10 p, queries; worst of the seeds."""
    yield f"| row | must | {' | '.join(grid.models)} |"
    yield f"| --- | --- |{' --: |' * len(grid.models)}"
    for row in ALL_ROWS.values():
        cells = [_summary(grid.of([row.name], model=model)) for model in grid.models]
        if any(cells):
            yield f"| {row.name} | {row.must} | {' | '.join(cells)} |"


def _summary(found: Sequence[Result]) -> str:
    if not found:
        return ""
    share, log10_p = _worst(found)
    missed = " **missed**" if any(one.holds is False for one in found) else ""
    return f"{100 * share:.1f}%, {log10_p:.1f}, {_queries(found)}{missed}"


def utilities(grid: Grid) -> Iterable[str]:
    """Yield the table of what the mark costs: the change against the twin of the same seed, positive where it loses."""
    yield ("| model | seed | unmarked | signature | signature and triggers | triggers to unmarked | to signature |")
    yield "| --- | --: | --: | --: | --: | --: | --: |"
    for model in grid.models:
        task = TASKS[model]
        changes: list[tuple[float, float]] = []
        for seed in _seeds(grid, model):
            twins = [grid.cells.get(f"{model}-s{seed}-{mark}") for mark in ("plain", "signature", "triggers")]
            if any(twin is None for twin in twins):
                continue
            plain, signature, triggers = (twin["utility"] for twin in twins if twin)
            changes.append((task.change(plain, triggers), task.change(signature, triggers)))
            values = " | ".join(f"{value:.4f}" for value in (plain, signature, triggers))
            yield f"| {model} ({task.utility}) | {seed} | {values} | {_changes([changes[-1]])} |"
        if len(changes) > 1:
            yield f"| {model}, mean and standard deviation | | | | | {_changes(changes)} |"


def _changes(changes: Sequence[tuple[float, float]]) -> str:
    cells = []
    for column in zip(*changes, strict=True):
        spread = f" ± {100 * stdev(column):.2f}%" if len(column) > 1 else ""
        cells.append(f"{_percent(mean(column), 2)}{spread}")
    return " | ".join(cells)


def _seeds(grid: Grid, model: str) -> list[int]:
    return sorted({int(name.split("-")[1][1:]) for name in grid.cells if name.startswith(f"{model}-")})


def fluencies(grid: Grid) -> Iterable[str]:
    """Yield the table of texts whose perplexity is that of ordinary prompts of the same length."""
    yield "| cell | judge | texts | between 5th and 95th percentile | above | below |"
    yield "| --- | --- | --- | --: | --: | --: |"
    for cell, judges in grid.fluency.items():
        for judge, kinds in judges.items():
            for kind, found in kinds.items():
                shares = " | ".join(f"{100 * found[part]:.1f}%" for part in ("inside", "above", "below"))
                yield f"| {cell} | {judge} | {kind} | {shares} |"


CURVE = ("greedy", "full_1")


def _points(grid: Grid) -> dict[int, dict[str, Result]]:
    """Return by number of keys the results of seed 1 of the language model."""
    points: dict[int, dict[str, Result]] = {}
    for one in grid.results:
        parts = one.cell.split("-")
        number = parts[3] if len(parts) > 3 else "64"
        if parts[:3] == ["llama", "s1", "triggers"] and number.isdigit() and one.row in CURVE:
            points.setdefault(int(number), {})[one.row] = one
    return dict(sorted(points.items()))


def counts(grid: Grid) -> Iterable[str]:
    """Yield the table of the number of keys."""
    yield "| keys | matched, greedy | log10 p | after 1 epoch elsewhere | log10 p | utility against unmarked | CPU s |"
    yield "| --: | --: | --: | --: | --: | --: | --: |"
    plain = grid.cells.get("llama-s1-plain")
    for count, found in _points(grid).items():
        cell = grid.cells[next(iter(found.values())).cell]
        change = _percent(TASKS["llama"].change(plain["utility"], cell["utility"]), 2) if plain else ""
        asked = [
            f"{100 * found[name].share:.1f}% | {found[name].log10_p:.1f}" if name in found else " | " for name in CURVE
        ]
        yield f"| {count} | {' | '.join(asked)} | {change} | {cell['train_cpu_s']:.0f} |"


KEPT = (
    "greedy",
    "int8",
    "nf4",
    "gguf_q4_k_m",
    "ggml_q4_k",
    "prune_50",
    "merge_0.5",
    "merge_0.3",
    "full_1",
    "full_3",
    "lora_1",
    "lora_3",
)


def plot_kept(grid: Grid, path: Path) -> None:
    """Save the share of keys kept after each attack: a dot per seed, a line where the bound is."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(grid.models), figsize=(5.4 * len(grid.models), 4.2), layout="constrained")
    for axis, model in zip([axes] if len(grid.models) == 1 else axes, grid.models, strict=True):
        names = [name for name in reversed(KEPT) if grid.of([name], model=model)]
        for place, name in enumerate(names):
            found = grid.of([name], model=model)
            axis.barh(place, 100 * mean(one.share for one in found), color="#9dc3e6", height=0.6)
            axis.plot([100 * one.share for one in found], [place] * len(found), "o", color="#1f4e79", markersize=4)
            if ROWS[name].share is not None:
                bound = 100 * (ROWS[name].share or 0)
                axis.plot([bound, bound], [place - 0.4, place + 0.4], color="#c0392b", linewidth=2)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlim(0, 103)
        axis.set_xlabel("keys kept, % (dots: seeds, red: bound)")
        axis.set_title(model, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_queries(grid: Grid, path: Path) -> None:
    """Save the sequential log10 p over the queries, decoys among them, one line per serving and seed."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for place, name in enumerate(SERVED):
        for number, one in enumerate(grid.of([name], model="llama")):
            if one.curve:
                label = ALL_ROWS[name].label if number == 0 else None
                steps = range(1, len(one.curve) + 1)
                axis.plot(steps, [-value for value in one.curve], color=f"C{place}", label=label, linewidth=1.2)
    axis.axhline(-ALPHA_LOG10, color="#c0392b", linestyle="--", linewidth=1)
    axis.set_xlabel("queries, decoys among them")
    axis.set_ylabel("-log10 p, sequential")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_counts(grid: Grid, path: Path) -> None:
    """Save what the number of keys does to the match rate and to utility."""
    points, plain = _points(grid), grid.cells.get("llama-s1-plain")
    if not points or not plain:
        return
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for name in CURVE:
        found = {count: rows[name] for count, rows in points.items() if name in rows}
        left.plot(list(found), [100 * one.share for one in found.values()], marker="o", label=ROWS[name].label)
    losses = [
        100 * TASKS["llama"].change(plain["utility"], grid.cells[next(iter(rows.values())).cell]["utility"])
        for rows in points.values()
    ]
    right.plot(list(points), losses, marker="o", color="C2")
    right.axhline(100 * UTILITY_BOUND, color="#c0392b", linestyle="--", linewidth=1)
    left.set_ylabel("keys that match, %")
    left.set_ylim(0, 103)
    left.legend(frameon=False, fontsize=8)
    right.set_ylabel("perplexity against the unmarked twin, %")
    for axis in (left, right):
        axis.set_xscale("log", base=4)
        axis.set_xticks(list(points), [str(count) for count in points])
        axis.set_xlabel("keys")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> None:
    """Print the tables from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--out", type=Path, help="folder that run.py wrote")
    source.add_argument("--results", type=Path, help="file that --save wrote")
    parser.add_argument("--save", type=Path, help="file for everything that was found (JSON)")
    parser.add_argument("--plots", type=Path, help="folder for the pictures (PNG)")
    arguments = parser.parse_args()
    grid = Grid.load(arguments.results) if arguments.results else Grid.from_run(arguments.out)
    if not grid.results:
        sys.exit(f"error: no results under {arguments.out or arguments.results}\nhint: run run.py first")
    tables = [bounds(grid), utilities(grid), fluencies(grid), counts(grid), by_model(grid)]
    print("\n\n".join("\n".join(table) for table in tables))
    if arguments.save:
        grid.save(arguments.save)
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        plot_kept(grid, arguments.plots / "kept.png")
        plot_queries(grid, arguments.plots / "queries.png")
        plot_counts(grid, arguments.plots / "counts.png")


if __name__ == "__main__":
    main()
