"""Pictures: of a plan, and of a run one small figure per family of attacks and an overview of all."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from hf_wmguard.errors import MissingDependencyError
from hf_wmguard.robustness.plan import Plan
from hf_wmguard.robustness.results import COSTLY, Result
from hf_wmguard.verification import DEFAULT_ALPHA_LOG10

_COLOURS = ("#1f4e79", "#d1662a", "#2a7f62", "#8e4585", "#b8860b", "#4b8bbe", "#5c5c5c")
# Curves often lie on each other: they differ in more than colour.
_LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X"))
_GREY = "#9aa5b1"
_RED = "#b03030"
_DPI = 130
_LINEAR = 10.0
_P_TICKS = (0, 5, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
_LOSS_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 1000, 10_000, 100_000, 1_000_000)


def check_available() -> None:
    """Refuse before hours of work and not after it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError("plots need matplotlib", hint="run pip install 'hf-wmguard[stress]'") from None


def _figure(width: float, height: float) -> Any:
    # Not through pyplot, which would choose a backend for the whole process and keep every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def plot_plan(plan: Plan) -> bytes:
    """Return a PNG of the expected -log10 p against the strength of noise, pruning and merging.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_available()
    figure = _figure(11, 3.6)
    # On one scale: what ends the mark in one panel may be harmless in the next.
    row = figure.subplots(1, len(plan.curves), sharey=True)
    for axes, (kind, points) in zip(row, plan.curves.items(), strict=True):
        axes.plot([strength for strength, _ in points], [-log10_p for _, log10_p in points], marker=".", clip_on=False)
        axes.set_xlabel(kind, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    expected = [-log10_p for points in plan.curves.values() for _, log10_p in points]
    for axes in row:
        _log_axis(axes, "y", _P_TICKS, expected, -DEFAULT_ALPHA_LOG10)
    row[0].set_ylabel("evidence, -log10 p", fontsize=9)
    row[0].set_title("expected after each attack (red: detected from here on)", fontsize=10, loc="left")
    return _png(figure)


def plot_family(results: Sequence[Result]) -> bytes:
    """Return a PNG of one family: -log10 p, bit error rate and, where it was measured, the utility lost, side by side.

    Args:
        results: All of one family; curves over the strength where it is a scale, bars where it is not.
    """
    panels: list[tuple[str, Callable[[Result], float]]] = [
        ("-log10 p (red: detected from here on)", _strength),
        ("bit error rate", lambda result: result.bit_error_rate),
    ]
    if any(result.utility for result in results):
        panels.append(
            (
                "utility lost, % (red: no win beyond)",
                lambda result: 100 * result.utility.loss if result.utility else math.nan,
            )
        )
    scale = all(result.axis for result in results)
    figure = _figure(4.2 * len(panels), 3.6 if scale else 1.1 + 0.3 * len(results))
    row = figure.subplots(1, len(panels), sharey=not scale)
    for axes, (title, value) in zip(row, panels, strict=True):
        (_curves if scale else _bars)(axes, results, value)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    which = "y" if scale else "x"
    _log_axis(row[0], which, _P_TICKS, [_strength(result) for result in results], -DEFAULT_ALPHA_LOG10)
    getattr(row[1], f"set_{which}lim")(-0.01, 0.56)
    if len(panels) == 3:
        losses = [100 * result.utility.loss for result in results if result.utility]
        _log_axis(row[2], which, _LOSS_TICKS, losses, 100 * COSTLY)
    if scale:
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    else:
        row[0].invert_yaxis()
    return _png(figure)


def _strength(result: Result) -> float:
    return max(0.0, -result.log10_p)


def _curves(axes: Any, results: Sequence[Result], value: Callable[[Result], float]) -> None:
    names = dict.fromkeys(result.attack for result in results)
    for index, name in enumerate(names):
        mine = sorted((one for one in results if one.attack == name), key=lambda one: one.strength)
        line, marker = _LINES[index % len(_LINES)]
        colour = _COLOURS[index % len(_COLOURS)]
        x, y = [one.strength for one in mine], [value(one) for one in mine]
        axes.plot(x, y, line, marker=marker, color=colour, label=name, markersize=5, alpha=0.85, clip_on=False)
    axes.set_xlabel(results[0].axis, fontsize=9)


def _bars(axes: Any, results: Sequence[Result], value: Callable[[Result], float]) -> None:
    colours = [_COLOURS[2] if result.verdict == "detected" else _GREY for result in results]
    axes.barh(range(len(results)), [value(result) for result in results], color=colours, height=0.65)
    axes.set_yticks(range(len(results)), [result.label for result in results])
    axes.axvline(0, color="black", linewidth=0.8)


def _log_axis(axes: Any, which: str, ticks: Sequence[int], values: Sequence[float], bound: float) -> None:
    """Scale an axis linearly around zero and by the logarithm beyond, with round figures, and draw the bound in red."""
    low, high = 1.2 * min(0, *values), 1.3 * max(bound, *values)
    getattr(axes, f"set_{which}scale")("symlog", linthresh=_LINEAR)
    shown = [tick for tick in ticks if low <= tick <= high]
    getattr(axes, f"set_{which}ticks")(shown, [f"{tick:,}" for tick in shown])
    getattr(axes, f"set_{which}ticks")([], minor=True)
    getattr(axes, f"set_{which}lim")(low, high)
    line = axes.axhline if which == "y" else axes.axvline
    line(bound, color=_RED, linestyle="--", linewidth=1)


def plot_overview(results: Sequence[Result]) -> bytes:
    """Return a PNG heat map: a row for each attack, its strengths from left to right, coloured by -log10 p."""
    import numpy as np
    from matplotlib.colors import SymLogNorm

    names = list(dict.fromkeys(result.attack for result in results))
    rows = [[result for result in results if result.attack == name] for name in names]
    width = max(map(len, rows))
    grid = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = [_strength(result) for result in row]
    figure = _figure(2.6 + 1.25 * max(3, width), 1.3 + 0.34 * len(rows))
    axes = figure.subplots()
    norm = SymLogNorm(linthresh=_LINEAR, vmin=0, vmax=max(100.0, float(np.nanmax(grid))))
    axes.imshow(grid, cmap="YlGn", norm=norm, aspect="auto")
    for index, row in enumerate(rows):
        for column, result in enumerate(row):
            _cell(axes, index, column, result, dark=norm(_strength(result)) > 0.65)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    title = "in each cell, strength of the attack: log10 p after it\nred: not detected; *: costs more than 5% utility"
    axes.set_title(title, fontsize=9, loc="left")
    return _png(figure)


def _cell(axes: Any, row: int, column: int, result: Result, *, dark: bool) -> None:
    colour = _RED if result.verdict != "detected" else "white" if dark else "black"
    star = "*" if result.costly else ""
    head = f"{result.strength:g}: " if result.strength else ""
    axes.text(column, row, f"{head}{round(result.log10_p)}{star}", ha="center", va="center", fontsize=7, color=colour)
