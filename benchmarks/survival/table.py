"""Print what the grid found as one markdown table, and draw it.

    python benchmarks/survival/table.py --out OUT [--plot PICTURE.png]

Each cell of the table is the worst of its seeds: log10 p, bit error rate, payload read exactly or not, and the relative
loss of utility by the attack where it was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attacks import ATTACKS, NOTHING, PAYLOAD, Attack

Results = dict[tuple[str, str], list[dict[str, Any]]]
"""By attack and by model-form: one result per seed."""


def read_results(out: Path) -> Results:
    """Return every result under a benchmark's folder."""
    found: Results = defaultdict(list)
    for path in sorted((out / "results").glob("*/*.json")):
        result = json.loads(path.read_text())
        found[result["attack"], _column(result["cell"])].append(result)
    return found


def read_cells(out: Path) -> dict[str, dict[str, Any]]:
    """Return every finished cell by its name."""
    paths = sorted((out / "cells").glob("*/cell.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def _column(cell: str) -> str:
    return "-".join(cell.split("-")[:2])


def holds(attack: Attack, result: dict[str, Any]) -> bool | None:
    """Return whether a result is what the attack must leave, None where nothing is asked."""
    report = result["report"]
    if attack.must is None:
        return None
    if attack.must == PAYLOAD:
        return bool(report["signature"]["payload_decoded"])
    if attack.must == NOTHING:
        return bool(report["verdict"] == "not_detected")
    return bool(report["log10_p"] <= attack.must)


def summary(attack: Attack, results: Sequence[dict[str, Any]]) -> str:
    """Return one cell of the table: the worst of the seeds, and whether all of them hold."""
    if not results:
        return ""
    # For an attack after which nothing may be found, the worst seed is the one where most is found.
    pick = min if attack.must == NOTHING else max
    log10_p = pick(result["report"]["log10_p"] for result in results)
    error = pick(result["report"]["signature"]["bit_error_rate"] for result in results)
    exact = sum(result["report"]["signature"]["payload_decoded"] for result in results)
    losses = [result["utility"]["loss"] for result in results if result["utility"]]
    loss = f", {100 * max(losses):+.1f}%" if losses else ""
    met = [holds(attack, result) for result in results]
    mark = "" if None in met else " **missed**" if not all(met) else " ok"
    return f"{log10_p + 0.0:.1f}, {error:.3f}, {exact}/{len(results)}{loss}{mark}"


def markdown(results: Results, cells: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Yield the lines of the report."""
    columns = sorted({column for _, column in results})
    yield from _training(cells)
    yield ""
    yield "Worst of the seeds: log10 p, bit error rate, payloads exact, utility lost by the attack."
    yield ""
    yield f"| attack | must | {' | '.join(columns)} |"
    yield f"| --- | --- |{' --: |' * len(columns)}"
    for name, attack in ATTACKS.items():
        row = [summary(attack, results.get((name, column), [])) for column in columns]
        if any(row):
            must = f"<= {attack.must:g}" if isinstance(attack.must, float) else attack.must or ""
            yield f"| {name} | {must} | {' | '.join(row)} |"


def _training(cells: dict[str, dict[str, Any]]) -> Iterable[str]:
    yield "| cell | relative weight change | bit error rate as saved | utility | unmarked twin | CPU s |"
    yield "| --- | --: | --: | --: | --: | --: |"
    for name, cell in cells.items():
        if name.endswith("-marked"):
            twin = cells.get(name.replace("-marked", "-plain"))
            manifest = cell["manifest"]
            other = f"{twin['utility']:.4f}" if twin else ""
            yield (
                f"| {name} | {100 * manifest['weight_change']:.2f}% | {manifest['bit_error_rate']:g} | "
                f"{cell['utility']:.4f} | {other} | {cell['train_cpu_s']:.0f} |"
            )


FAMILIES = {
    "magnitude pruning, %": ("prune_", (30, 50, 70, 90)),
    "Gaussian noise, x rms": ("noise_", (0.1, 0.3, 1.0)),
    "linear merge with the base, owner's weight": ("merge_linear_base_", (0.5, 0.3, 0.1)),
    "rank left of the delta": ("delta_svd_", (64, 32, 16, 8, 4)),
}


def plot(results: Results, path: Path) -> None:
    """Save log10 p, bit error rate and utility against the strength of four attacks, one line per column."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = sorted({column for _, column in results})
    figure, axes = plt.subplots(3, len(FAMILIES), figsize=(4.2 * len(FAMILIES), 9), layout="constrained", sharex="col")
    for index, (title, (prefix, levels)) in enumerate(FAMILIES.items()):
        for column in columns:
            points = [(level, results[f"{prefix}{level}", column]) for level in levels]
            points = [(level, seeds) for level, seeds in points if seeds]
            _draw(axes[:, index], points, column)
        top = axes[0, index]
        top.axhline(9, color="#c0392b", linestyle="--", linewidth=1)
        top.set_yscale("symlog", linthresh=10)
        top.set_ylim(bottom=-1)
        axes[1, index].set_ylim(-0.02, 0.52)
        top.set_title(title)
        for axis in axes[:, index]:
            axis.spines[["top", "right"]].set_visible(False)
        if prefix in ("merge_linear_base_", "delta_svd_"):
            top.invert_xaxis()
    for axis, label in zip(axes[:, 0], ("-log10 p, worst seed", "bit error rate", "utility lost, %"), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, points: Sequence[tuple[float, list[dict[str, Any]]]], label: str) -> None:
    levels = [level for level, _ in points]
    axes[0].plot(levels, [-max(r["report"]["log10_p"] for r in seeds) for _, seeds in points], marker="o", label=label)
    errors = [max(r["report"]["signature"]["bit_error_rate"] for r in seeds) for _, seeds in points]
    axes[1].plot(levels, errors, marker="o")
    losses = [[r["utility"]["loss"] for r in seeds if r["utility"]] for _, seeds in points]
    axes[2].plot(levels, [100 * max(values, default=float("nan")) for values in losses], marker="o")


def main() -> None:
    """Print the table from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that run.py wrote")
    parser.add_argument("--plot", type=Path, help="picture to write (PNG)")
    arguments = parser.parse_args()
    results = read_results(arguments.out)
    if not results:
        sys.exit(f"error: no results under {arguments.out}\nhint: run run.py first")
    print("\n".join(markdown(results, read_cells(arguments.out))))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
