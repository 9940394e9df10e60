"""What every command prints with: results on stdout; messages, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
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


def print_json(value: Any) -> None:
    """Print one JSON object on one line of stdout."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


@contextmanager
def byte_progress(total_bytes: int) -> Iterator[Any]:
    """Show a bar on a terminal; yield what is called with a name and the bytes just done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=total_bytes)

        def advance(name: str, count: int) -> None:
            bar.update(task, advance=count, description=escape(name[-40:]))

        yield advance
