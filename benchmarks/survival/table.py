"""Print what the grid found as markdown, draw it, and keep it in one small file.

    python benchmarks/survival/table.py --out OUT --save benchmarks/survival/results.json
    python benchmarks/survival/table.py --results benchmarks/survival/results.json --plots docs/survival

The first table says whether every bound holds, over all cells; the last one gives every attack on every model and form.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from attacks import ATTACKS, NOTHING, PAYLOAD, SYMMETRIES
from tasks import TASKS

NO_WIN = 0.05
"""An attack that costs the thief more of the utility is no win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One suspect judged.

    Args:
        cell: The marked model.
        attack: What was done to it.
        verdict: As `verify` says it.
        log10_p: Corrected for every test.
        bit_error_rate: Of the code bits, before error correction.
        payload_decoded: Whether all 256 bits were read.
        alignment: What was undone before reading.
        verify_s: CPU seconds of the verdict.
        loss: Relative utility lost by the attack, None where it was not measured.
    """

    cell: str
    attack: str
    verdict: str
    log10_p: float
    bit_error_rate: float
    payload_decoded: bool
    alignment: str
    verify_s: float
    loss: float | None

    @classmethod
    def from_run(cls, value: dict[str, Any]) -> Self:
        """Return what `run.py` wrote about a suspect, rounded to what is printed."""
        report, utility = value["report"], value["utility"]
        signature = report["signature"]
        return cls(
            cell=value["cell"],
            attack=value["attack"],
            verdict=report["verdict"],
            log10_p=round(report["log10_p"], 2),
            bit_error_rate=round(signature["bit_error_rate"], 4),
            payload_decoded=signature["payload_decoded"],
            alignment=signature["alignment"],
            verify_s=round(value["verify_cpu_s"], 2),
            loss=round(utility["loss"], 5) if utility else None,
        )

    @property
    def column(self) -> str:
        """Model and form."""
        return "-".join(self.cell.split("-")[:2])

    @property
    def holds(self) -> bool | None:
        """Whether it is what the attack must leave, None where nothing is asked."""
        must = ATTACKS[self.attack].must
        if must is None:
            return None
        if must == PAYLOAD:
            return self.payload_decoded and self.verdict == "detected"
        if must == NOTHING:
            return self.verdict == "not_detected"
        return self.log10_p <= float(must)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Everything that was found.

    Args:
        cells: What was trained, by name.
        results: Every suspect.
    """

    cells: dict[str, dict[str, Any]]
    results: list[Result]

    @classmethod
    def from_run(cls, out: Path) -> Self:
        """Return what lies under a folder that `run.py` wrote."""
        cells = {}
        for path in sorted((out / "cells").glob("*/cell.json")):
            cell = json.loads(path.read_text())
            kept = {name: cell[name] for name in ("utility", "train_cpu_s")}
            cells[path.parent.name] = kept | {
                name: cell["manifest"][name] for name in ("weight_change", "bit_error_rate") if "manifest" in cell
            }
        paths = sorted((out / "results").glob("*/*.json"))
        return cls(cells=cells, results=[Result.from_run(json.loads(path.read_text())) for path in paths])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what `save` wrote."""
        value = json.loads(path.read_text())
        return cls(cells=value["cells"], results=[Result(**one) for one in value["results"]])

    def save(self, path: Path) -> None:
        """Write everything, one suspect per line."""
        cells = json.dumps(self.cells, indent=1)
        lines = ",\n".join(json.dumps(asdict(one)) for one in self.results)
        path.write_text(f'{{"cells": {cells},\n"results": [\n{lines}\n]}}\n')

    def of(self, names: Iterable[str], column: str | None = None) -> list[Result]:
        """Return the results of some attacks."""
        wanted = set(names)
        return [one for one in self.results if one.attack in wanted and column in (None, one.column)]

    @property
    def columns(self) -> list[str]:
        """Models and forms."""
        return sorted({one.column for one in self.results})


def _merges(weight: float) -> list[str]:
    return [name for name in ATTACKS if name.startswith("merge_") and name.endswith(f"_{weight}")]


ROWS: dict[str, list[str]] = {
    "as saved, bf16, fp16": ["untouched", "bf16", "fp16"],
    "resharded, renamed, prefixed, `.bin`, transposed": ["reshard", "rename", "prefix", "bin", "transpose"],
    "bare adapter, in bf16, re-extracted by SVD": ["adapter", "adapter_bf16", "adapter_svd"],
    "INT8 per row, LLM.int8": ["int8_row", "torchao_int8", "quanto_int8", "bnb_llm_int8"],
    "NF4, INT4 group 64, GPTQ W4": ["bnb_nf4", "int4_g64", "torchao_int4", "quanto_int4", "gptq_w4"],
    "GGUF Q8_0, Q4_K_M; Q4_K across rows": ["gguf_q8_0", "gguf_q4_k_m", "ggml_q4_k"],
    "INT3 group 64": ["int3_g64", "torchao_int3"],
    "GGUF Q2_K; Q2_K across rows": ["gguf_q2_k", "ggml_q2_k"],
    "INT2": ["torchao_int2", "quanto_int2"],
    "magnitude pruning 30, 50%": ["prune_30", "prune_50"],
    "magnitude pruning 70%": ["prune_70"],
    "magnitude pruning 90%": ["prune_90"],
    "Gaussian noise 0.1, 0.3 x rms": ["noise_0.1", "noise_0.3"],
    "Gaussian noise 1.0 x rms": ["noise_1.0"],
    "fine-tuning elsewhere, 3 epochs, 2e-5, 1e-4": ["fine_tune_2e-5", "fine_tune_1e-4"],
    "LoRA r16 elsewhere, merged": ["fine_tune_lora"],
    "merging at owner weight 0.5": _merges(0.5),
    "merging at owner weight 0.3": _merges(0.3),
    "merging at owner weight 0.1": _merges(0.1),
    "overwriting with 5 other keys at 3x": ["overwrite_5"],
    "SVD of the delta to rank 64, 32": ["delta_svd_64", "delta_svd_32"],
    "SVD of the delta to rank 16": ["delta_svd_16"],
    "SVD of the delta to rank 8": ["delta_svd_8"],
    "SVD of the delta to rank 4": ["delta_svd_4"],
    "one-bit delta": ["delta_one_bit"],
    "25% of layers dropped, blind": ["drop_layers_25"],
    "25% of layers dropped; swapped and doubled; with the original": ["drop_layers_25_original", "move_layers"],
    "every symmetry, with the original": [f"sym_{name}" for name in SYMMETRIES],
    "all symmetries at once, with the original": ["sym_all"],
    "distillation into the public base": ["distillation"],
    "unmarked sibling, public base": ["unmarked_full", "unmarked_lora", "public_base"],
    "the same, with the original": [f"{name}_original" for name in ("unmarked_full", "unmarked_lora", "public_base")],
}
"""Attacks that are judged together."""


def _must(name: str) -> str:
    must = ATTACKS[name].must
    return f"<= {must:g}" if isinstance(must, float) else {PAYLOAD: "payload exact", None: ""}.get(must, str(must))


def _worst(results: Sequence[Result]) -> tuple[float, float]:
    """Return log10 p and bit error rate of the worst; where nothing may be found, of the one where most is."""
    pick = min if ATTACKS[results[0].attack].must == NOTHING else max
    return pick(one.log10_p for one in results) + 0.0, pick(one.bit_error_rate for one in results)


def _percent(share: float) -> str:
    # Adding 0 makes a negative zero positive.
    return f"{round(100 * share, 1) + 0.0:+.1f}%"


def _met(results: Sequence[Result]) -> str:
    missed = [one for one in results if one.holds is False]
    if results[0].holds is None:
        return ""
    if not missed:
        return "yes"
    no_win = all(one.loss is not None and one.loss > NO_WIN for one in missed)
    return f"**{len(missed)} of {len(results)} missed**" + (", at a loss above 5%" if no_win else "")


def bounds(grid: Grid) -> Iterable[str]:
    """Yield the table of what must hold, over all cells."""
    yield "| attack | must hold | worst log10 p | worst bit error rate | payloads exact | utility lost | met |"
    yield "| --- | --- | --: | --: | --: | --: | --- |"
    for label, names in ROWS.items():
        found = grid.of(names)
        if found:
            log10_p, error = _worst(found)
            losses = [one.loss for one in found if one.loss is not None]
            loss = f"{_percent(min(losses))} to {_percent(max(losses))}" if losses else ""
            exact = sum(one.payload_decoded for one in found)
            yield (
                f"| {label} | {_must(names[0])} | {log10_p:.1f} | {error:.3f} | {exact}/{len(found)} | {loss} | "
                f"{_met(found)} |"
            )


def marks(grid: Grid) -> Iterable[str]:
    """Yield the table of what the mark itself costs; the loss is against the unmarked twin of the same seed."""
    yield "| cell | relative weight change | bit error rate | utility | unmarked twin | relative loss | CPU s |"
    yield "| --- | --: | --: | --: | --: | --: | --: |"
    for name, cell in grid.cells.items():
        if name.endswith("-marked"):
            twin = grid.cells.get(name.replace("-marked", "-plain"))
            task = TASKS[name.split("-")[0]]
            digits = 4 if task.utility == "accuracy" else 2
            compared = " | "
            if twin:
                change = 100 * task.change(twin["utility"], cell["utility"])
                compared = f"{twin['utility']:.{digits}f} | {change:+.2f}%"
            yield (
                f"| {name.removesuffix('-marked')} | {100 * cell['weight_change']:.2f}% | {cell['bit_error_rate']:g} | "
                f"{cell['utility']:.{digits}f} | {compared} | {cell['train_cpu_s']:.0f} |"
            )


def everything(grid: Grid) -> Iterable[str]:
    """Yield the table of every attack on every model and form."""
    yield f"| attack | must hold | {' | '.join(grid.columns)} |"
    yield f"| --- | --- |{' --: |' * len(grid.columns)}"
    for name in ATTACKS:
        row = [_summary(grid.of([name], column)) for column in grid.columns]
        if any(row):
            yield f"| {name} | {_must(name)} | {' | '.join(row)} |"


def _summary(results: Sequence[Result]) -> str:
    if not results:
        return ""
    log10_p, error = _worst(results)
    exact = sum(one.payload_decoded for one in results)
    losses = [one.loss for one in results if one.loss is not None]
    loss = f", {_percent(max(losses))}" if losses else ""
    missed = " **missed**" if any(one.holds is False for one in results) else ""
    return f"{log10_p:.1f}, {error:.3f}, {exact}/{len(results)}{loss}{missed}"


FAMILIES: dict[str, tuple[Sequence[float], str, bool]] = {
    "INT group 64, bits": ((4, 3), "int{}_g64", True),
    "magnitude pruning, %": ((30, 50, 70, 90), "prune_{}", False),
    "Gaussian noise, x rms": ((0.1, 0.3, 1.0), "noise_{}", False),
    "linear merge with the base, owner's weight": ((0.5, 0.3, 0.1), "merge_linear_base_{}", True),
    "SLERP with another, owner's weight": ((0.5, 0.3, 0.1), "merge_slerp_other_{}", True),
    "rank left of the delta": ((64, 32, 16, 8, 4), "delta_svd_{}", True),
}
"""By title: strengths, names, and whether the strongest attack is the smallest number."""


def plot(grid: Grid, titles: Sequence[str], path: Path) -> None:
    """Save log10 p, bit error rate and utility against the strength of attacks, one line per model and form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(titles), figsize=(3.9 * len(titles), 8.4), layout="constrained", sharex="col")
    for index, title in enumerate(titles):
        strengths, name, falls = FAMILIES[title]
        for column in grid.columns:
            points = {one: grid.of([name.format(one)], column) for one in strengths}
            _draw(axes[:, index], {one: results for one, results in points.items() if results}, column)
        top = axes[0, index]
        top.axhline(9, color="#c0392b", linestyle="--", linewidth=1)
        top.set_yscale("symlog", linthresh=10)
        top.set_ylim(bottom=-1, top=1e5)
        top.set_title(title, fontsize=11)
        axes[1, index].set_ylim(-0.02, 0.52)
        axes[2, index].set_yscale("symlog", linthresh=1)
        axes[2, index].set_ylim(-5, 5e3)
        axes[2, index].axhline(100 * NO_WIN, color="#c0392b", linestyle="--", linewidth=1)
        if "rank" in title:
            top.set_xscale("log", base=2)
        for axis in axes[:, index]:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xticks(strengths, [f"{one:g}" for one in strengths])
        if falls:
            top.invert_xaxis()
    for axis, label in zip(axes[:, 0], ("-log10 p, worst seed", "bit error rate", "utility lost, %"), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    for axis, line, height in ((axes[0, 0], "detected above", 9), (axes[2, 0], "no win above", 100 * NO_WIN)):
        axis.annotate(
            line, (0.01, height), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="#c0392b"
        )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw(axes: Any, points: dict[float, list[Result]], label: str) -> None:
    strengths = list(points)
    axes[0].plot(strengths, [-_worst(seeds)[0] for seeds in points.values()], marker="o", label=label)
    axes[1].plot(strengths, [_worst(seeds)[1] for seeds in points.values()], marker="o")
    losses = {one: [r.loss for r in seeds if r.loss is not None] for one, seeds in points.items()}
    measured = {one: 100 * max(values) for one, values in losses.items() if values}
    axes[2].plot(list(measured), list(measured.values()), marker="o")


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
    print("\n".join([*bounds(grid), "", *marks(grid), "", *everything(grid)]))
    if arguments.save:
        grid.save(arguments.save)
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        titles = list(FAMILIES)
        plot(grid, titles[:3], arguments.plots / "weights.png")
        plot(grid, titles[3:], arguments.plots / "deltas.png")


if __name__ == "__main__":
    main()
