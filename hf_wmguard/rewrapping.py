"""Change who can open a protected folder, without reading its ciphertext.

Only ``wmguard_recipients.json`` is written. The manifest commits to the DEK and not to who has it, and the ciphertext
does not know: so no signature and no owner key is needed, and it takes as long for 16 GB as for 16 KB. Whoever can
open a folder can do this.

What it cannot do is take back: a recipient that was removed may have kept the DEK, the old file or the plaintext.
A new DEK is a new save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_wmguard.atomic import write_atomic
from hf_wmguard.container.recipients import (
    Identity,
    RecipientsFile,
    Stanza,
    load_identity,
    load_recipient,
)
from hf_wmguard.container.x25519 import X25519_KIND
from hf_wmguard.errors import ManifestError, UsageError
from hf_wmguard.evidence.manifest import RECIPIENTS_NAME, read_manifest
from hf_wmguard.evidence.signing import load_signer
from hf_wmguard.folders import locked
from hf_wmguard.suspects.protected import open_dek, read_recipients


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped:
    """Who can open a folder after `rewrap`.

    Args:
        added: Names (``key_id``) of the new recipients.
        removed: Names of those that were taken out.
        recipients: Kind and name of each, in the file's order; the owner is the first, where a save has one and it was
            not removed.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    recipients: tuple[dict[str, str], ...]


def list_recipients(folder: Path) -> tuple[dict[str, str], ...]:
    """Return kind and name of each recipient of a protected folder; needs no key, and proves nothing without one.

    Raises:
        NotFoundError: There is no recipients file.
        FormatError: It is malformed.
        EnvironmentFault: It cannot be read.
    """
    return _listed(RecipientsFile.parse(read_recipients(folder)).stanzas)


def rewrap(
    folder: Path,
    *,
    identity: str | Identity,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    remove_owner: bool = False,
    signer: str | None = None,
) -> Rewrapped:
    """Add and remove recipients of a protected folder: all of it, or nothing.

    Args:
        folder: The protected folder.
        identity: Reference to a key that opens it, or the key itself.
        add: References to new recipients.
        remove: References to recipients, or their names as `list_recipients` gives them.
        remove_owner: Whether the first of the list may be removed, who is the owner where there is one.
        signer: Reference to the owner's public key that must have signed the manifest.
    Raises:
        UsageError: Nothing to do, a recipient to remove that there is not, the first or the last one.
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
        ManifestError: Somebody who does not wait for us replaced the save meanwhile.
        KeyServiceError: A service that must wrap or unwrap does not answer.
    """
    if not add and not remove:
        raise UsageError("nothing to change", hint="name recipients to --add or to --remove")
    opener = load_identity(identity) if isinstance(identity, str) else identity
    recipients = [load_recipient(ref) for ref in add]
    pinned = load_signer(signer) if signer else None
    # Of two at once the later would undo the earlier, and the DEK of a save that came between them would be lost.
    with locked(folder):
        manifest, _ = read_manifest(folder, signer=pinned)
        data = read_recipients(folder)
        dek = open_dek(folder, manifest, (opener,), recipients=data)
        file = RecipientsFile.parse(data)
        removed = _named(file, remove, remove_owner=remove_owner)
        kept = [stanza for stanza in file.stanzas if stanza["recipient"] not in removed]
        # Who is there already keeps the stanza that works; who is removed and added at once gets a new one.
        new = {one.key_id: one for one in recipients if one.key_id not in {stanza["recipient"] for stanza in kept}}
        if not kept and not new:
            raise UsageError("this would remove the last recipient", hint="nobody could open the folder any more")
        stanzas = [*kept, *(one.wrap(dek, file.context) for one in new.values())]
        if read_manifest(folder)[0].set_id != manifest.set_id:
            raise ManifestError(f"{folder} was saved again meanwhile", hint="run it again, on the new save")
        write_atomic(folder / RECIPIENTS_NAME, RecipientsFile.sealed(dek, file.context, stanzas).encode())
    return Rewrapped(added=tuple(new), removed=tuple(removed), recipients=_listed(stanzas))


def _named(file: RecipientsFile, remove: Sequence[str], *, remove_owner: bool) -> list[str]:
    present = [stanza["recipient"] for stanza in file.stanzas]
    names = list(dict.fromkeys(ref if ref in present else load_recipient(ref).key_id for ref in remove))
    for name in names:
        if name not in present:
            raise UsageError(
                f"{name} is no recipient of this folder",
                hint="wmguard inspect lists them; names can be removed",
            )
    # Nothing says who the owner is, but an owner is a key pair, and comes first.
    first = file.stanzas[0]
    if first["recipient"] in names and first["kind"] == X25519_KIND and not remove_owner:
        raise UsageError(
            "this would remove the first recipient, who is the owner unless the save was made without one",
            hint="pass --remove-owner if nobody is the owner, or the owner must not open it any more",
        )
    return names


def _listed(stanzas: Sequence[Stanza]) -> tuple[dict[str, str], ...]:
    return tuple({"kind": stanza["kind"], "recipient": stanza["recipient"]} for stanza in stanzas)
