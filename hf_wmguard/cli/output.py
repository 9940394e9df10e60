"""What every command prints with: results on stdout; messages, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console()
err = Console(stderr=True)


def pairs_table(title: str) -> Table:
    """Return an empty table of names and values."""
    # Folded, not cut: of a hash that lost its end nothing can be said.
    table = Table(title=title, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


def printable(text: str) -> str:
    """Return a text in which nothing moves a terminal's cursor or ends the line: such characters are escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def print_json(value: Any) -> None:
    """Print one JSON object on one line of stdout."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


class ByteProgress:
    """What is called with a name and the bytes just done."""

    def __init__(self, bar: Progress, total_bytes: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total_bytes)

    def __call__(self, name: str, count: int) -> None:
        self._bar.update(self._task, advance=count, description=escape(name[-40:]))

    def total(self, total_bytes: int) -> None:
        """Say how many bytes there will be, where that was not known before."""
        self._bar.update(self._task, total=total_bytes)


@contextmanager
def byte_progress(total_bytes: int | None) -> Iterator[ByteProgress]:
    """Show a bar on a terminal; yield what is called with a name and the bytes just done."""
    with _bar(DownloadColumn(), TimeRemainingColumn()) as bar:
        yield ByteProgress(bar, total_bytes)


@contextmanager
def count_progress(first: str) -> Iterator[Any]:
    """Show a bar on a terminal; yield what is called with things done, things in all, and the name of the next one.

    Args:
        first: What is done before the first thing.
    """
    with _bar(MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(escape(first), total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(name))

        yield advance


@contextmanager
def question_progress(first: str) -> Iterator[Any]:
    """Show a bar on a terminal; yield what is called with questions answered, questions in all, and log10 p if known.

    Args:
        first: What is done before the first question.
    """
    with _bar(MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(escape(first), total=None)

        def advance(done: int, total: int, log10_p: float | None) -> None:
            shown = first if log10_p is None else f"{first}, log10 p = {log10_p:.1f}"
            bar.update(task, completed=done, total=total, description=escape(shown))

        yield advance


def _bar(*columns: ProgressColumn) -> Progress:
    shown = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*shown, console=err, transient=True, disable=not err.is_terminal)


def print_report(report: Any, as_json: bool) -> None:
    """Print a report of `verify` or `probe` and end with its exit code."""
    value = report.to_json()
    if as_json:
        print_json(value)
    else:
        colour = {"detected": "green", "not_detected": "cyan", "inconclusive": "yellow"}[report.verdict]
        table = pairs_table(f"[bold {colour}]{report.verdict}[/]  log10 p = {report.log10_p:.1f}")
        if report.reason:
            table.add_row("reason", escape(report.reason))
        table.add_row("suspect", escape(" ".join(filter(None, (report.suspect["uri"], report.suspect.get("model"))))))
        if "read" in report.suspect:
            read = report.suspect["read"]
            table.add_row("read", f"{read['bytes']:,} bytes in {read['requests']} ranges; --json has their digests")
        if report.transcript is not None:
            asked = (report.transcript["uri"], report.transcript["model"], report.transcript["time"])
            table.add_row("answers of", escape(" ".join(filter(None, asked))))
        table.add_row("level", f"log10 p <= {report.alpha_log10:g}, corrected for {report.tests_corrected_for} tests")
        table.add_row("model", escape(f"{report.model_id} {report.iteration}"))
        for channel in ("signature", "triggers"):
            for name, number in (value[channel] or {}).items():
                # Where it did not decode these are the digits of nothing.
                if name == "payload" and not value[channel]["payload_decoded"]:
                    continue
                table.add_row(f"{channel}.{name}", f"{number:.4g}" if isinstance(number, float) else str(number))
        table.add_row("committed", f"{report.commitment['time']} {report.commitment['entry']}")
        console.print(table)
    raise typer.Exit(0 if report.verdict == "detected" else 1)
