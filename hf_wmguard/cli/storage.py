"""``wmguard storage``: lock a bucket down, and list what is open in a bucket or a repo."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_wmguard.cli.options import JsonOption
from hf_wmguard.cli.output import console, err, print_json, printable
from hf_wmguard.errors import UsageError

if TYPE_CHECKING:
    from hf_wmguard.storage.planning import Plan

storage = typer.Typer(help="Lock a bucket down; list what is open in a bucket or a Hub repo.", no_args_is_help=True)
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="Of an S3-compatible store; by default AWS's, or AWS_ENDPOINT_URL_S3."),
]
_COLOURS = {"critical": "bold red", "high": "red", "medium": "yellow", "low": "cyan", "info": "dim"}


@storage.command()
def lockdown(
    address: Annotated[str, typer.Argument(help="s3://bucket/prefix")],
    admin: Annotated[
        list[str], typer.Option("--admin", help="ARN of a role or user that may do anything, you among them; repeat.")
    ],
    reader: Annotated[
        list[str] | None, typer.Option("--reader", help="ARN, or an account's digits: gets objects; repeat.")
    ] = None,
    writer: Annotated[
        list[str] | None, typer.Option("--writer", help="ARN, or an account's digits: puts objects; repeat.")
    ] = None,
    kms_key: Annotated[
        str | None, typer.Option("--kms-key", help="Default encryption with this key of AWS KMS.")
    ] = None,
    minimum_tls: Annotated[str | None, typer.Option("--minimum-tls", help="Refuse older TLS: 1.2 or 1.3.")] = None,
    terraform: Annotated[
        Path | None, typer.Option("--terraform", help="Write the same as Terraform into this file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Apply the plan without asking.")] = False,
    lock_me_out: Annotated[
        bool, typer.Option("--lock-me-out", help="Apply it although you could not undo it.")
    ] = False,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close a bucket to everyone but those who are named: shown as a plan first, applied after a yes."""
    from hf_wmguard.atomic import write_atomic
    from hf_wmguard.storage.lockdown import Lockdown, make_lock
    from hf_wmguard.storage.terraform import to_terraform
    from hf_wmguard.stores.location import parse_location

    lock = make_lock(
        parse_location(address),
        readers=reader or (),
        writers=writer or (),
        admins=admin,
        kms_key=kms_key,
        minimum_tls=minimum_tls,
    )
    with closing(Lockdown(lock, endpoint_url=endpoint_url)) as bucket:
        with err.status(escape(f"reading the settings of {lock.bucket}")):
            plan = bucket.plan()
        if terraform is not None:
            write_atomic(terraform, to_terraform(plan).encode())
        if not as_json:
            _print_plan(plan)
        applied: tuple[str, ...] = ()
        if plan.changes and not dry_run:
            if not yes:
                _ask(plan)
            applied = bucket.apply(plan, lock_me_out=lock_me_out, progress=lambda name: err.print(f"setting {name}"))
    if as_json:
        print_json({**plan.to_json(), "applied": list(applied)})
    elif applied:
        err.print(f"applied: {', '.join(applied)}", markup=False, soft_wrap=True)


@storage.command()
def audit(
    address: Annotated[str, typer.Argument(help="s3://bucket/prefix or hub://org/name")],
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is open, the worst first. Exit 0: nothing is, 1: something is."""
    from hf_wmguard.storage.audit import audit as look
    from hf_wmguard.stores.location import parse_location

    with err.status(escape(f"looking at {printable(address)}")) as status:
        found = look(
            parse_location(address),
            endpoint_url=endpoint_url,
            progress=lambda what: status.update(escape(printable(what))),
        )
    if as_json:
        print_json(found.to_json())
    elif not found.findings:
        console.print(f"nothing found at {found.uri}", markup=False, highlight=False, soft_wrap=True)
    else:
        table = Table("severity", "where", "what, and what to do", title=escape(found.uri), show_lines=True)
        for one in found.findings:
            remedy = f"\n[dim]{escape(printable(one.remedy))}[/]" if one.remedy else ""
            table.add_row(
                f"[{_COLOURS[one.severity]}]{one.severity}[/]",
                escape(printable(one.where)),
                f"{one.what}: {escape(printable(one.detail))}{remedy}",
            )
        console.print(table)
    raise typer.Exit(1 if found.is_open else 0)


def _print_plan(plan: Plan) -> None:
    for title, lines in (
        ("open to the public now, and closed:", plan.openings),
        ("know before you say yes:", (*([f"LOCKS YOU OUT: {plan.lock_out}"] if plan.lock_out else []), *plan.notes)),
        ("this store does not have, set it by its own means:", plan.unsupported),
    ):
        if lines:
            err.print(title, style="yellow", markup=False)
        for line in lines:
            err.print(f"  {printable(line)}", markup=False, highlight=False, soft_wrap=True)
    for change in plan.changes:
        for line in change.diff.splitlines():
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
            console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)
    if not plan.changes:
        console.print(f"nothing to change: {plan.lock.bucket} is locked as asked", markup=False, soft_wrap=True)


def _ask(plan: Plan) -> None:
    if not sys.stdin.isatty():
        raise UsageError(
            f"{len(plan.changes)} changes of {plan.lock.bucket} are not confirmed; nothing was changed",
            hint="look at them with --dry-run, and apply them with --yes",
        )
    if not typer.confirm(f"Apply these {len(plan.changes)} changes to {plan.lock.bucket}?", err=True):
        err.print("nothing was changed")
        raise typer.Exit(1)
