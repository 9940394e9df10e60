"""``wmguard stress``: attack a marked model and report what is left of the mark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_wmguard.cli.options import JsonOption, ModelIdOption, OwnerKeyOption, RegistryOption
from hf_wmguard.cli.output import console, count_progress, print_json

if TYPE_CHECKING:
    from hf_wmguard.robustness.results import Outcome

_COLOURS = {"detected": "green", "not_detected": "red", "inconclusive": "yellow"}


def stress(
    model_dir: Annotated[Path, typer.Argument(help="The marked model: a plain folder, or one the owner key opens.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the results; an interrupted run goes on there.")],
    owner_key: OwnerKeyOption,
    registry: RegistryOption,
    model_id: ModelIdOption = None,
    base: Annotated[Path | None, typer.Option("--base", help="Folder of what the model was fine-tuned from.")] = None,
    other: Annotated[Path | None, typer.Option("--other", help="Folder of another fine-tune of the base.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Plain text, for a causal model: perplexity.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Parquet, csv or jsonl with text and label: accuracy.")
    ] = None,
    attacks: Annotated[str | None, typer.Option("--attacks", help="Names, separated by commas; default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Weakest and strongest of each, on fewer rows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Attack a marked model in every known way, and report verdict and utility after each."""
    from hf_wmguard.robustness.plots import check_available
    from hf_wmguard.robustness.report import write_report
    from hf_wmguard.robustness.suite import run_suite

    check_available()
    with count_progress("reading the model") as advance:
        outcome = run_suite(
            model_dir,
            out,
            owner_key=owner_key,
            registry=registry,
            model_id=model_id,
            base=base,
            other=other,
            text=text,
            data=data,
            names=[name.strip() for name in attacks.split(",")] if attacks is not None else (),
            quick=quick,
            progress=advance,
        )
    page = write_report(outcome, out)[-1]
    if as_json:
        print_json(outcome.to_json())
    else:
        _print(outcome, page)


def _print(outcome: Outcome, page: Path) -> None:
    from hf_wmguard.robustness.report import COLUMNS, table_rows

    # Figures whole; on a narrow terminal the name of the attack is folded, and what is left out stands in the report.
    table = Table(title="what the mark survives", box=None, padding=(0, 2, 0, 0))
    shown = COLUMNS[:-2]
    for index, column in enumerate(shown):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=index > 0)
    for row in table_rows(outcome):
        table.add_row(*(f"[{_COLOURS.get(cell, 'default')}]{escape(cell)}[/]" for cell in row[: len(shown)]))
    console.print(table)
    for one in outcome.skipped:
        console.print(f"not run: {one.attack}: {one.reason}", markup=False, soft_wrap=True, highlight=False)
    console.print(f"report: {page}", markup=False, soft_wrap=True, highlight=False)
