"""Commands about keys: make them, and change who can open a protected folder."""

from __future__ import annotations

import secrets
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_wmguard.cli.options import IDENTITY_HELP, JsonOption, SignerOption
from hf_wmguard.cli.output import console, pairs_table, print_json
from hf_wmguard.errors import ConfigError, UsageError


class KeyKind(StrEnum):
    """What ``keygen`` makes."""

    owner = "owner"
    recipient = "recipient"
    key = "key"


_KINDS = "owner: marks and signs; recipient: decrypts for inference; key: 32 random bytes, for rawkey:file:FILE."


def ask_passphrase(what: str, new: bool) -> str:
    """Return what is typed on the terminal, without showing it.

    Raises:
        ConfigError: There is no terminal.
    """
    # getpass would fall back to reading a pipe, echo and all.
    if not sys.stdin.isatty():
        raise ConfigError(
            f"no terminal to ask for the {what} on", hint="write passphrase:env:NAME or passphrase:file:PATH"
        )
    return str(typer.prompt(what.capitalize(), hide_input=True, confirmation_prompt=new, err=True))


def keygen(
    kind: Annotated[KeyKind, typer.Argument(help=_KINDS)],
    out: Annotated[Path, typer.Option("--out", help="The private file; the public one is FILE.pub.")],
    post_quantum: Annotated[
        bool, typer.Option("--post-quantum", help="recipient: ML-KEM-768 together with X25519.")
    ] = False,
    sealed: Annotated[
        str | None,
        typer.Option("--sealed", help="owner: what seals it: passphrase:prompt, awskms:..., vault:..."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an owner key or a recipient pair (FILE, mode 0600, and FILE.pub), or a raw key (FILE only)."""
    if (post_quantum and kind is not KeyKind.recipient) or (sealed and kind is not KeyKind.owner):
        raise UsageError(
            f"an option that keygen {kind.value} does not have",
            hint="--post-quantum is for a recipient, --sealed for an owner",
        )
    make = {KeyKind.owner: _owner, KeyKind.recipient: _recipient, KeyKind.key: _raw}[kind]
    name = make(out, post_quantum, sealed)
    public = None if kind is KeyKind.key else f"{out}.pub"
    if as_json:
        print_json({"kind": kind.value, "private": str(out), "public": public, "id": name})
        return
    half = f"public half: {public}\n" if public else ""
    console.print(
        f"{kind.value} key: {out} (keep it secret, back it up)\n{half}id: {name}", markup=False, soft_wrap=True
    )


def _owner(out: Path, _: bool, sealed: str | None) -> str:
    from hf_wmguard.container.owner import write_sealed
    from hf_wmguard.keys import OwnerKey

    owner = OwnerKey.generate()
    if sealed:
        write_sealed(owner, out, sealed)
    else:
        owner.write(out)
    return owner.key_id()


def _recipient(out: Path, post_quantum: bool, _: str | None) -> str:
    from hf_wmguard.container.hybrid import HybridIdentity
    from hf_wmguard.container.recipients import generate_identity
    from hf_wmguard.keys import write_key_pair

    identity = HybridIdentity.generate() if post_quantum else generate_identity()
    public = identity.recipient().to_text()
    write_key_pair(out, identity.to_text().encode(), public.encode())
    return public.strip()


def _raw(out: Path, _: bool, __: str | None) -> str:
    from hf_wmguard.container.symmetric import RawKey
    from hf_wmguard.keys import write_new_file

    key = secrets.token_bytes(32)
    write_new_file(out, key, mode=0o600)
    return RawKey(key).key_id


def rewrap(
    protected: Annotated[Path, typer.Argument(help="A protected folder.")],
    identity: Annotated[str, typer.Option("--identity", help=f"What opens it now: {IDENTITY_HELP}.")],
    add: Annotated[list[str] | None, typer.Option("--add", help="Reference to a new recipient; repeatable.")] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="Reference to a recipient, or its name as inspect shows it; repeatable."),
    ] = None,
    remove_owner: Annotated[bool, typer.Option("--remove-owner", help="Let --remove take the owner out too.")] = False,
    signer: SignerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add and remove recipients of a protected folder; the ciphertext is not touched, and not read."""
    from hf_wmguard.rewrapping import rewrap as change

    done = change(
        protected, identity=identity, add=add or (), remove=remove or (), remove_owner=remove_owner, signer=signer
    )
    if as_json:
        names = {"added": list(done.added), "removed": list(done.removed)}
        print_json({"folder": str(protected), **names, "recipients": list(done.recipients)})
        return
    table = pairs_table("recipients")
    for one in done.recipients:
        table.add_row(one["kind"], one["recipient"])
    console.print(table)
