"""``wmguard push`` and ``wmguard pull``: a protected folder to where it is kept, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_wmguard.cli.options import JsonOption, SignerOption
from hf_wmguard.cli.output import byte_progress, console, err, pairs_table, print_json, printable


def push(
    protected: Annotated[Path, typer.Argument(help="A protected folder.")],
    dest: Annotated[str, typer.Argument(help="hub://org/name, also with @branch, or s3://bucket/prefix.")],
    tag: Annotated[str | None, typer.Option("--tag", help="Hub: name of the new version.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="Hub: message of the commit.")] = None,
    kms_key: Annotated[
        str | None, typer.Option("--kms-key", help="S3: key of AWS KMS that the store encrypts with, too.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Bring the folder's README.md, its model card, up to date first.")
    ] = True,
    allow_public: Annotated[
        bool, typer.Option("--allow-public", help="Send it even to where everybody can read it.")
    ] = False,
    replace_other: Annotated[
        bool, typer.Option("--replace-other", help="Send it over another signer's save, or another model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Send a protected folder to a private Hub repo or to S3; a folder with plaintext weights is refused."""
    from hf_wmguard.delivery.parcel import Parcel
    from hf_wmguard.delivery.pushing import push as send

    total = sum(path.stat().st_size for path in protected.glob("*.safetensors") if path.is_file())
    with byte_progress(2 * total) as advance:
        # Every byte is read twice: checked, and sent.
        def started(parcel: Parcel) -> None:
            if parcel.left_out:
                err.print(f"not sent: {printable(', '.join(parcel.left_out))}", markup=False, soft_wrap=True)

        pushed = send(
            protected,
            dest,
            card=card,
            allow_public=allow_public,
            replace_other=replace_other,
            checked=advance,
            started=started,
            progress=advance,
            tag=tag,
            commit_message=message,
            kms_key=kms_key,
        )
    if as_json:
        print_json(pushed.to_json())
        return
    table = pairs_table(f"pushed: {printable(pushed.uri)}")
    table.add_row("revision", pushed.revision)
    table.add_row("files", f"{len(pushed.files)}, {pushed.size_bytes:,} bytes")
    if pushed.skipped:
        table.add_row("there already", f"{len(pushed.skipped)} files")
    if pushed.url:
        table.add_row("url", printable(pushed.url))
    console.print(table)
    for note in pushed.notes:
        err.print(printable(note), markup=False, soft_wrap=True)
    if pushed.unchecked:
        unchecked = printable("; ".join(pushed.unchecked))
        err.print(f"could not be asked: {unchecked}", style="yellow", markup=False, soft_wrap=True)


def pull(
    source: Annotated[str, typer.Argument(metavar="SRC", help="hub://org/name@revision or s3://bucket/prefix.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the protected model.")],
    signer: SignerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a protected folder, still ciphertext, and check every file against its signed manifest."""
    from hf_wmguard.delivery.pulling import pull as fetch

    with byte_progress(None) as advance:
        pulled = fetch(source, out, signer=signer, started=advance.total, progress=advance)
    if as_json:
        print_json(pulled.to_json())
        return
    table = pairs_table(f"pulled: {printable(pulled.folder)}")
    table.add_row("from", printable(pulled.uri))
    table.add_row("model", printable(f"{pulled.model_id} {pulled.iteration}"))
    table.add_row("signer", f"{pulled.signer}{'' if pulled.pinned else ' (self-asserted: pin it with --signer)'}")
    table.add_row("files", f"{len(pulled.files)}, {pulled.size_bytes:,} bytes")
    console.print(table)
    if pulled.left_out:
        err.print(f"not fetched: {printable(', '.join(pulled.left_out))}", markup=False, soft_wrap=True)
