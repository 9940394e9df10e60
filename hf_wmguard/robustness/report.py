"""What a run says: ``results.json``, ``table.md``, pictures, and one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
import re
from itertools import groupby
from pathlib import Path

from hf_wmguard.atomic import write_atomic
from hf_wmguard.robustness.plots import plot_family, plot_overview
from hf_wmguard.robustness.results import Outcome, Result

COLUMNS = ("attack", "verdict", "log10 p", "errors", "payload", "utility", "lost", "change", "seconds")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { margin-top: 2.2rem; font-size: 1.15rem; text-transform: capitalize; }
p, li { max-width: 52rem; } .note { color: #5b6875; } code { font-size: .85em; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e8ec; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2), td.reason { text-align: left; }
td.reason { white-space: normal; } th { background: #f4f6f8; }
.detected { color: #1d6b50; font-weight: 600; } .not_detected, .inconclusive { color: #b03030; font-weight: 600; }
"""
_READING = """
<ul>
<li><b>log10 p</b> is a proven upper bound on the chance that a model made without this key looks like this one,
corrected for every commitment that was tried. The verdict is <i>detected</i> at -9 or below.</li>
<li><b>errors</b>: share of wrong code bits before error correction; 0.5 is what chance gives. <b>payload</b>:
whether all its bits could still be read.</li>
<li><b>utility</b> is accuracy or perplexity, <b>lost</b> how much worse
than the unattacked model's, on rows that no attack was trained on. An attack that loses more than 5% (marked *) is no
win for a thief. Attacks that only rename or rearrange lose nothing, and are not measured.</li>
<li><b>change</b>: norm of the change over the norm of the matrices of the numbered blocks.</li>
</ul>
"""


def table_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return the cells of the table under `COLUMNS`, one row for each result."""
    return [_row(result) for result in outcome.results]


def _row(result: Result) -> tuple[str, ...]:
    utility = result.utility
    # + 0.0 turns a negative zero into a plain one.
    return (
        result.label,
        result.verdict,
        f"{result.log10_p + 0.0:.1f}",
        f"{result.bit_error_rate:.3f}",
        "exact" if result.payload_decoded else "lost",
        "-" if utility is None else f"{utility.value:.4g}",
        "-" if utility is None else f"{100 * utility.loss:+.2f}%{'*' if result.costly else ''}",
        "-" if result.weight_change is None else f"{100 * result.weight_change:.2f}%",
        f"{result.seconds:.1f}",
    )


def write_report(outcome: Outcome, out: Path) -> tuple[Path, ...]:
    """Write everything that a run says into its folder, each file whole or not at all.

    Args:
        outcome: What was found.
        out: An existing folder.
    Returns:
        The files, the page last.
    Raises:
        EnvironmentFault: The system refused to write.
    """
    families = {family: list(group) for family, group in groupby(outcome.results, key=lambda result: result.family)}
    pictures = {"overview": plot_overview(outcome.results)} | {
        family: plot_family(group) for family, group in families.items() if family != "unattacked"
    }
    files = {
        "results.json": json.dumps(outcome.to_json(), indent=2, allow_nan=False).encode(),
        "table.md": _markdown(outcome).encode(),
        **{f"{_slug(name)}.png": picture for name, picture in pictures.items()},
        "report.html": _page(outcome, families, pictures).encode(),
    }
    for name, content in files.items():
        write_atomic(out / name, content)
    return tuple(out / name for name in files)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _markdown(outcome: Outcome) -> str:
    lines = [COLUMNS, ("---", "---", *("--:" for _ in COLUMNS[2:])), *table_rows(outcome)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    skipped = "".join(f"* {one.attack}: {one.reason}\n" for one in outcome.skipped)
    return table + (f"\nNot run:\n\n{skipped}" if skipped else "")


def _page(outcome: Outcome, families: dict[str, list[Result]], pictures: dict[str, bytes]) -> str:
    subject = "".join(
        f"<li>{html.escape(name)}: <code>{html.escape(str(value))}</code></li>"
        for name, value in outcome.subject.items()
        if value is not None
    )
    found = sum(result.verdict == "detected" for result in outcome.results)
    sections = "".join(
        f"<h2>{html.escape(family)}</h2>{_image(pictures[family], family) if family in pictures else ''}{_table(group)}"
        for family, group in families.items()
    )
    skipped = "".join(
        f"<tr><td>{html.escape(one.attack)}</td><td class=reason>{html.escape(one.reason)}</td></tr>"
        for one in outcome.skipped
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>wmguard stress</title><style>{_STYLE}</style></head><body>
<h1>What the mark survives</h1>
<p class="note">{found} of {len(outcome.results)} models below are detected, the unattacked one included.</p>
<h2>How to read it</h2>{_READING}
<h2>Overview</h2>{_image(pictures["overview"], "overview")}
{sections}
{f"<h2>Not run</h2><table>{skipped}</table>" if skipped else ""}
<h2>What was attacked</h2><ul>{subject}</ul>
</body></html>
"""


def _image(picture: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def _table(results: list[Result]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{f' class={cell}' if column == 'verdict' else ''}>{html.escape(cell)}</td>"
            for column, cell in zip(COLUMNS, _row(result), strict=True)
        )
        + "</tr>"
        for result in results
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
