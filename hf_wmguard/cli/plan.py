"""``wmguard plan``: what a mark would cost and survive, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_wmguard.cli.options import BudgetOption, JsonOption
from hf_wmguard.cli.output import console, err, pairs_table, print_json

if TYPE_CHECKING:
    from hf_wmguard.robustness.plan import Plan

_COLOURS = {"payload exact": "green", "holds": "cyan", "doubtful": "yellow", "lost": "red"}


def plan(
    model: Annotated[Path, typer.Argument(help="Folder or weight file of the model, as verify reads it.")],
    budget: BudgetOption = 0.01,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also write a PNG here; needs the extra hf-wmguard[stress].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict the weight change, and log10 p after each attack, before any training."""
    from hf_wmguard.atomic import write_atomic
    from hf_wmguard.robustness.plan import make_plan
    from hf_wmguard.robustness.plots import check_available, plot_plan

    if plot is not None:
        check_available()
    with err.status(escape(f"reading {model}")):
        made = make_plan(model, budget=budget)
    if plot is not None:
        write_atomic(plot, plot_plan(made))
    if as_json:
        print_json(made.to_json())
    else:
        _print(str(model), made)


def _print(name: str, made: Plan) -> None:
    table = pairs_table(escape(name))
    table.add_row("weight change", f"{made.weight_change:.2%} (budget {made.budget:.2%})")
    table.add_row("projections", f"{made.projections} in {made.carriers} of {made.matrices} matrices")
    table.add_row("steps", ", ".join(f"{count} x {step:g} rms" for step, count in made.steps))
    table.add_row("a verification reads", f"{made.bytes_read:,} bytes, {made.share_read:.2%} of the checkpoint")
    console.print(table)
    attacks = Table()
    attacks.add_column("attack")
    for column in ("error / rms", "log10 p"):
        attacks.add_column(column, justify="right")
    attacks.add_column("verdict")
    attacks.add_column("error is")
    for one in made.predictions:
        colour = _COLOURS[one.verdict]
        attacks.add_row(one.attack, f"{one.error:.3f}", f"{one.log10_p:.1f}", f"[{colour}]{one.verdict}[/]", one.source)
    console.print(attacks)
