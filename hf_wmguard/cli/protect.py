"""``wmguard protect``: a finished model as ciphertext, from folder to folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_wmguard.cli.options import JsonOption
from hf_wmguard.cli.output import byte_progress, console, err, pairs_table, print_json, printable


class Suite(StrEnum):
    """The ciphers a file may be written with, as `container.suites.SUITES` has them; not imported, for `--help`."""

    aes = "AES-256-GCM"
    chacha = "ChaCha20-Poly1305"


def protect(
    model_dir: Annotated[Path, typer.Argument(help="Folder of the model: safetensors, of any dtype.")],
    out_dir: Annotated[Path, typer.Argument(help="A new folder for the protected model.")],
    recipient: Annotated[
        list[str] | None, typer.Option("--recipient", help="Public key of who may open it, file:inference.pub; repeat.")
    ] = None,
    owner_key: Annotated[
        str | None,
        typer.Option("--owner-key", help="Key that signs the manifest; its holder can open the model too."),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option("--model-id", help="Name of the model; by default its folder's.")
    ] = None,
    iteration: Annotated[str, typer.Option("--iteration", help="Which version of this model.")] = "1",
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", help="Write shards of at most this size, 5GB; by default as it is."),
    ] = None,
    hide_names: Annotated[
        bool, typer.Option("--hide-names", help="Hide names, number and sizes of the tensors.")
    ] = False,
    suite: Annotated[
        Suite | None, typer.Option("--suite", help="The cipher; by default what suits the processor.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Encrypt a finished model for its recipients; weights are streamed, and plaintext is never written."""
    from hf_wmguard.protection import parse_size, protect_folder

    total = sum(path.stat().st_size for path in model_dir.glob("*.safetensors") if path.is_file())
    with byte_progress(total) as advance:
        result = protect_folder(
            model_dir,
            out_dir,
            recipients=tuple(recipient or ()),
            owner_key=owner_key,
            model_id=model_id,
            iteration=iteration,
            max_shard_bytes=parse_size(max_shard_size) if max_shard_size else None,
            hide_names=hide_names,
            suite=suite.value if suite else None,
            progress=advance,
        )
    if as_json:
        print_json({"out": str(out_dir), **result.to_json()})
        return
    table = pairs_table(f"protected: {result.model_id}")
    for name, value in result.to_json().items():
        table.add_row(name, ", ".join(value) if isinstance(value, tuple) else str(value))
    console.print(table)
    if not result.pinned:
        err.print(
            "signed with a key that was thrown away: whole, but nobody's; give --owner-key so that readers can pin you",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if result.left_out:
        err.print(f"not handed on: {printable(', '.join(result.left_out))}", markup=False, soft_wrap=True)
