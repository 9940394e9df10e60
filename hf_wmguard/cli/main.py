"""``wmguard``: parse, one call, print. Results on stdout; messages, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from hf_wmguard.cli.delivery import pull, push
from hf_wmguard.cli.embed import embed
from hf_wmguard.cli.keys import ask_passphrase, keygen, rewrap
from hf_wmguard.cli.options import (
    IDENTITY_HELP,
    AlphaOption,
    IdentityOption,
    JsonOption,
    ModelIdOption,
    OwnerKeyOption,
    RegistryOption,
    SignerOption,
)
from hf_wmguard.cli.output import (
    byte_progress,
    console,
    count_progress,
    err,
    pairs_table,
    print_json,
    print_report,
    printable,
)
from hf_wmguard.cli.plan import plan
from hf_wmguard.cli.probe import probe
from hf_wmguard.cli.protect import protect
from hf_wmguard.cli.storage import storage
from hf_wmguard.cli.stress import stress
from hf_wmguard.container.asking import asking
from hf_wmguard.errors import EnvironmentFault, WmguardError
from hf_wmguard.hardening import switch_off_core_dumps

_INTERRUPTED, _FAULT = 130, 70
_WHOLE = "the output folder is whole or does not exist"
# What an interrupted command leaves behind, where it writes anything.
_LEFT = {
    "embed": f"{_WHOLE}; a commitment that was made stays in the registry and is harmless",
    "decrypt": _WHOLE,
    "protect": _WHOLE,
    "push": "readers see the old version or the new one: the same command goes on where this one stopped",
    "pull": f"{_WHOLE}; the same command goes on where this one stopped",
    "rewrap": "the recipients are either the old ones or the new ones: wmguard inspect lists them",
    "probe": "with --transcript the same command goes on where this one stopped; without it nothing was kept",
    "storage": "lockdown: the same command shows what is left to change and goes on there; audit changes nothing",
    "stress": "the same command goes on where this one stopped",
}


class _Commands(TyperGroup):
    """The commands; typer itself ends an interrupted one without a word, or in other versions with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted", _LEFT.get(ctx.invoked_subcommand, "nothing was changed: run it again"))
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    name="wmguard",
    help="Ownership watermarks and encrypted saves for models fine-tuned with the Hugging Face Trainer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def verify(
    suspect: Annotated[
        str,
        typer.Argument(
            help="A folder (model, adapter, protected), .safetensors, .gguf, .bin or .pt; or hub://org/name@revision, "
            "s3://bucket/prefix, of which only the parts that carry are read."
        ),
    ],
    owner_key: OwnerKeyOption,
    registry: RegistryOption,
    model_id: ModelIdOption = None,
    identity: IdentityOption = None,
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            help="Folder of your own model, from before marking or marked: permuted, rotated and scaled neurons, "
            "heads, residual channels and moved layers of the suspect are undone by it, and that reading is tried too.",
        ),
    ] = None,
    transcript: Annotated[
        Path | None,
        typer.Option(
            "--transcript",
            help="Finished transcript of wmguard probe, of the same suspect: one verdict out of weights and answers.",
        ),
    ] = None,
    alpha_log10: AlphaOption = -9.0,
    as_json: JsonOption = False,
) -> None:
    """Judge a suspect by its weights and, if given, its answers. Exit 0: detected, 1: not detected or inconclusive."""
    from hf_wmguard.verification import verify as judge

    with count_progress(f"reading {suspect}") as advance:
        report = judge(
            suspect,
            owner_key=owner_key,
            registry=registry,
            model_id=model_id,
            identity=identity,
            original=original,
            transcript=transcript,
            alpha_log10=alpha_log10,
            progress=advance,
        )
    print_report(report, as_json)


@app.command()
def inspect(
    protected: Annotated[Path, typer.Argument(help="A protected folder.")],
    signer: SignerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a protected folder says of itself, and check its signature and every signed file; needs no key."""
    from hf_wmguard.container.files import inspect_file
    from hf_wmguard.evidence.manifest import (
        ENVELOPE_NAME,
        MANIFEST_NAME,
        RECIPIENTS_NAME,
        check_files,
        read_manifest,
    )
    from hf_wmguard.evidence.signing import load_signer
    from hf_wmguard.rewrapping import list_recipients
    from hf_wmguard.suspects.protected import weight_names

    manifest, key_id = read_manifest(protected, signer=load_signer(signer) if signer else None)
    with byte_progress(sum(entry.size_bytes for entry in manifest.files)) as advance:
        check_files(protected, manifest, progress=advance)
    value = json.loads(manifest.to_bytes())
    value["sealed_state"] = manifest.sealed_state is not None
    value |= {"signer": key_id, "signer_pinned": signer is not None}
    covered = {entry.name for entry in manifest.files} | {MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME}
    value["not_covered"] = sorted(
        path.name for path in protected.iterdir() if path.is_file() and path.name not in covered
    )
    names = list_recipients(protected)
    value["recipients"] = list(names)
    value["headers"] = {name: inspect_file(protected / name) for name in weight_names(manifest)}
    if as_json:
        print_json(value)
        return
    table = pairs_table(escape(str(protected)))
    for name in ("model_id", "iteration", "state", "step", "created", "commitment", "commitment_time"):
        table.add_row(name, escape(str(value[name])))
    table.add_row("signer", f"{key_id}{'' if signer else ' (self-asserted: pin it with --signer)'}")
    for one in names:
        table.add_row("recipient", escape(f"{one['kind']} {one['recipient']}"))
    for name, number in (value["signature"] or {}).items():
        table.add_row(f"signature.{name}", str(number))
    for name, number in (value["triggers"] or {}).items():
        table.add_row(f"triggers.{name}", str(number))
    for entry in manifest.files:
        table.add_row(escape(entry.name), f"{entry.size_bytes:,} bytes, sha256 as signed")
    for name in value["not_covered"]:
        table.add_row(escape(name), "not covered by the signature")
    console.print(table)


@app.command()
def decrypt(
    protected: Annotated[Path, typer.Argument(help="A protected folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the plaintext.")],
    identity: Annotated[str, typer.Option("--identity", help=f"What opens it: {IDENTITY_HELP}.")],
    signer: SignerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a protected folder's plaintext, explicitly, into a new folder."""
    from hf_wmguard.decryption import decrypt_folder
    from hf_wmguard.evidence.manifest import read_manifest

    manifest, _ = read_manifest(protected)
    with byte_progress(
        sum(entry.size_bytes for entry in manifest.files if entry.name.endswith(".safetensors"))
    ) as advance:
        done = decrypt_folder(protected, out, identity=identity, signer=signer, progress=advance)
    if as_json:
        print_json({"out": str(out), **done.to_json()})
        return
    err.print(f"plaintext weights are now in {out}", style="yellow", markup=False, soft_wrap=True)
    for file in done.files:
        console.print(str(file), markup=False, highlight=False, soft_wrap=True)
    for names, what in ((done.unsigned, "copied, but signed by nobody"), (done.left_out, "signed by nobody, left out")):
        if names:
            err.print(f"{what}: {printable(', '.join(names))}", markup=False, soft_wrap=True)


app.command()(keygen)
app.command()(rewrap)
app.command()(embed)
app.command()(plan)
app.command()(probe)
app.command()(protect)
app.command()(push)
app.command()(pull)
app.command()(stress)
app.add_typer(storage, name="storage")


def main() -> None:
    """Run the command line; every error of ours becomes two lines on stderr and the exit code of its class."""
    switch_off_core_dumps()
    sys.excepthook = _end_by_fault
    try:
        with asking(ask_passphrase):
            app()
    except WmguardError as error:
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except OSError as error:
        # The system's own words and no more: those of a library may quote what it was given.
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or type(error).__name__}", "check the path, its permissions and free space")
        sys.exit(EnvironmentFault.exit_code)


def _end_by_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a run that failed by a fault of this package: not with 1, which is a verdict of `verify` and `probe`."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_FAULT)


def _complain(message: str, hint: str) -> None:
    # Names in a message may be a stranger's.
    err.print(f"error: {printable(message)}", style="red", markup=False, soft_wrap=True, highlight=False)
    if hint:
        err.print(f"hint: {printable(hint)}", markup=False, soft_wrap=True, highlight=False)
