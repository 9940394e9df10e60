"""Pictures of a run: one small figure per family of attacks, and an overview of all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from hf_wmguard.errors import MissingDependencyError
from hf_wmguard.robustness.results import Result
from hf_wmguard.verification import DEFAULT_ALPHA_LOG10

_COLOURS = ("#1f4e79", "#d1662a", "#2a7f62", "#8e4585", "#b8860b", "#4b8bbe", "#7a7a7a")
_RED = "#b03030"
_DPI = 130
# -log10 p is drawn linear up to here, and by its logarithm beyond.
_LINEAR = 10.0


def check_available() -> None:
    """Refuse before hours of work and not after it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "the report needs matplotlib", hint="run pip install 'hf-wmguard[stress]'"
        ) from None


def _figure(width: float, height: float) -> Any:
    # Not through pyplot, which would choose a backend for the whole process and keep every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def plot_family(results: Sequence[Result]) -> bytes:
    """Return a PNG of one family: -log10 p on the left, bit error rate on the right, utility loss beside each.

    Args:
        results: All of one family; curves over the strength where it is a scale, bars where it is not.
    """
    scale = all(result.axis for result in results)
    names = list(dict.fromkeys(result.attack for result in results))
    figure = _figure(11, 3.6 if scale else max(2.2, 0.8 + 0.34 * len(results)))
    left, right = figure.subplots(1, 2, sharey=not scale)
    if scale:
        _curves(figure, left, right, results, names)
    else:
        _bars(left, right, results)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _strength(result: Result) -> float:
    return max(0.0, -result.log10_p)


def _curves(figure: Any, left: Any, right: Any, results: Sequence[Result], names: list[str]) -> None:
    losses = any(result.utility for result in results)
    for axes, value, title in (
        (left, _strength, "-log10 p: what is left of the mark"),
        (right, lambda result: result.bit_error_rate, "bit error rate"),
    ):
        beside = axes.twinx() if losses else None
        for colour, name in zip(_COLOURS * 3, names, strict=False):
            mine = sorted((one for one in results if one.attack == name), key=lambda one: one.strength)
            x = [one.strength for one in mine]
            axes.plot(x, [value(one) for one in mine], "o-", color=colour, label=name, markersize=4)
            if beside is not None:
                y = [100 * one.utility.loss if one.utility else float("nan") for one in mine]
                beside.plot(x, y, "x:", color=colour, alpha=0.65, markersize=4, linewidth=1)
        axes.set_xlabel(results[0].axis)
        axes.set_title(title, fontsize=10, loc="left")
        if beside is not None:
            _loss_axis(beside, "y")
            beside.set_ylabel("utility lost, % (dotted)", fontsize=8)
            beside.spines["top"].set_visible(False)
    _p_axis(left, "y")
    right.set_ylim(-0.02, 0.55)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _bars(left: Any, right: Any, results: Sequence[Result]) -> None:
    rows = range(len(results))
    colours = [_COLOURS[2] if result.verdict == "detected" else _COLOURS[6] for result in results]
    left.barh(rows, [_strength(result) for result in results], color=colours)
    left.set_yticks(rows, [result.label for result in results], fontsize=8)
    left.invert_yaxis()
    left.set_title("-log10 p: what is left of the mark", fontsize=10, loc="left")
    _p_axis(left, "x")
    right.barh(rows, [result.bit_error_rate for result in results], color=colours)
    right.set_xlim(0, 0.55)
    right.set_title("bit error rate", fontsize=10, loc="left")
    if any(result.utility for result in results):
        beside = right.twiny()
        losses = [100 * result.utility.loss if result.utility else float("nan") for result in results]
        beside.plot(losses, rows, "x", color=_RED, markersize=6)
        _loss_axis(beside, "x")
        beside.set_xlabel("utility lost, % (crosses)", fontsize=8, color=_RED)
        beside.spines["right"].set_visible(False)


def _p_axis(axes: Any, which: str) -> None:
    getattr(axes, f"set_{which}scale")("symlog", linthresh=_LINEAR)
    getattr(axes, f"set_{which}lim")(0, None)
    line = axes.axhline if which == "y" else axes.axvline
    line(-DEFAULT_ALPHA_LOG10, color=_RED, linestyle="--", linewidth=1)


def _loss_axis(axes: Any, which: str) -> None:
    # From a gain of 1% on: below 10% to scale, beyond by its logarithm, so that ruined models fit in.
    getattr(axes, f"set_{which}scale")("symlog", linthresh=10)
    low, high = getattr(axes, f"get_{which}lim")()
    getattr(axes, f"set_{which}lim")(min(low, -1), max(high, 10))


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
    figure = _figure(2.6 + 1.25 * width, 1.3 + 0.34 * len(rows))
    axes = figure.subplots()
    norm = SymLogNorm(linthresh=_LINEAR, vmin=0, vmax=max(100.0, float(np.nanmax(grid))))
    image = axes.imshow(grid, cmap="YlGn", norm=norm, aspect="auto")
    for index, row in enumerate(rows):
        for column, result in enumerate(row):
            _cell(axes, index, column, result, dark=norm(_strength(result)) > 0.65)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xticks([])
    axes.set_xlabel("strengths, from first to last in the table", fontsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title("log10 p (red: not detected; *: costs more than 5% utility)", fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, label="-log10 p", shrink=0.6)
    return _png(figure)


def _cell(axes: Any, row: int, column: int, result: Result, *, dark: bool) -> None:
    colour = _RED if result.verdict != "detected" else "white" if dark else "black"
    star = "*" if result.costly else ""
    head = f"{result.strength:g}: " if result.strength else ""
    axes.text(column, row, f"{head}{result.log10_p:.0f}{star}", ha="center", va="center", fontsize=7, color=colour)
