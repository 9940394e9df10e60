"""Who may open a save: its DEK wrapped once per recipient, in one file beside the ciphertext.

The nouns are those of age: a *recipient* is a public key that can wrap a DEK, an *identity* is the private
key that unwraps it, a *stanza* is one wrapped DEK. Some keys are both: passphrases, raw keys, keys of a service.
Recipients change without touching ciphertext.

HPKE has no sender: whoever knows a recipient's public key can wrap a DEK of his own for it. Such a file opens
and then fits no ciphertext, because every protected file commits to its DEK. Whoever replaces both makes a
model of his own, which only the signed manifest (it records `dek_commitment`) can tell from the owner's.
A stanza names its recipient by the hash of the public key: readers of the file see who can open it.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_wmguard.canonical import canonical_json, parse_canonical, require_object
from hf_wmguard.container.checks import reading
from hf_wmguard.container.format import DEK_BYTES, derive_key
from hf_wmguard.container.kinds import parse_stanza
from hf_wmguard.container.passphrase import MAX_PASSPHRASE_STANZAS, PASSPHRASE_KIND
from hf_wmguard.container.references import load_identity, load_recipient
from hf_wmguard.container.stanzas import Identity, Recipient, Stanza, WrapContext
from hf_wmguard.container.x25519 import X25519Identity, X25519Recipient, generate_identity
from hf_wmguard.errors import AuthenticationError, FormatError, ManifestError, UsageError

__all__ = [
    "Identity",
    "Recipient",
    "RecipientsFile",
    "Stanza",
    "WrapContext",
    "X25519Identity",
    "X25519Recipient",
    "dek_commitment",
    "generate_identity",
    "load_identity",
    "load_recipient",
    "open_recipients",
    "seal_recipients",
]

VERSION = 1
MAX_RECIPIENTS_FILE_BYTES = 1024 * 1024
MAX_STANZAS = 1000

_FILE_FIELDS = {
    "version": (int,),
    **dict.fromkeys(("set_id", "model_id", "dek_commitment", "mac"), (str,)),
    "stanzas": (list,),
}


def dek_commitment(dek: bytes, set_id: str) -> str:
    """Return 32 bytes in hex that only this DEK gives for this save, and that say nothing about it.

    Raises:
        KeyFormatError: The DEK is not 32 bytes.
    """
    return derive_key(dek, "dek commitment", set_id).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipientsFile:
    """What ``wmguard_recipients.json`` says.

    Attributes:
        context: The save.
        dek_commitment: `dek_commitment` of its DEK.
        stanzas: One per recipient.
        mac: HMAC-SHA256 (hex) over the rest, with a key derived from the DEK: only who can open the save can
            add or remove a recipient unnoticed.
    """

    context: WrapContext
    dek_commitment: str
    stanzas: tuple[Stanza, ...]
    mac: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.stanzas) <= MAX_STANZAS:
            raise UsageError(f"{len(self.stanzas)} recipients", hint=f"name 1 to {MAX_STANZAS}")
        if len({stanza["recipient"] for stanza in self.stanzas}) != len(self.stanzas):
            raise UsageError("a recipient is named twice", hint="name each recipient once")
        if sum(stanza["kind"] == PASSPHRASE_KIND for stanza in self.stanzas) > MAX_PASSPHRASE_STANZAS:
            # Each costs its reader an Argon2id.
            raise UsageError(
                f"more than {MAX_PASSPHRASE_STANZAS} passphrases", hint="give more readers key pairs, not passphrases"
            )

    @classmethod
    def parse(cls, data: bytes) -> RecipientsFile:
        """Return the contents of a file, well formed but not yet authentic.

        Raises:
            FormatError: Too large, not canonical, or not such a file.
        """
        what = "recipients file"
        document = parse_canonical(data, what, MAX_RECIPIENTS_FILE_BYTES)
        # Before the fields: another version may well have others.
        version = document.get("version") if isinstance(document, dict) else None
        if type(version) is not int or version != VERSION:
            raise FormatError(f"{what}: version {version!r}, expected {VERSION}", hint="update hf-wmguard")
        document = require_object(document, _FILE_FIELDS, what)
        with reading(what):
            return cls(
                context=WrapContext(set_id=document["set_id"], model_id=document["model_id"]),
                dek_commitment=document["dek_commitment"],
                stanzas=tuple(parse_stanza(entry) for entry in document["stanzas"]),
                mac=document["mac"],
            )

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return canonical_json({**self._fields(), "mac": self.mac})

    def expected_mac(self, dek: bytes) -> str:
        """Return the MAC (hex) that this DEK gives."""
        key = derive_key(dek, "recipients", self.context.set_id)
        return hmac.digest(key, canonical_json(self._fields()), "sha256").hex()

    def _fields(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "set_id": self.context.set_id,
            "model_id": self.context.model_id,
            "dek_commitment": self.dek_commitment,
            "stanzas": list(self.stanzas),
        }

    @classmethod
    def sealed(cls, dek: bytes, context: WrapContext, stanzas: Sequence[Stanza]) -> RecipientsFile:
        """Return the file with these stanzas, kept or new, and its MAC.

        Raises:
            UsageError: No recipient, too many, or one of them twice.
            KeyFormatError: The DEK is not 32 bytes.
        """
        commitment = dek_commitment(dek, context.set_id)
        file = cls(context=context, dek_commitment=commitment, stanzas=tuple(stanzas))
        file = replace(file, mac=file.expected_mac(dek))
        if len(file.encode()) > MAX_RECIPIENTS_FILE_BYTES:
            raise UsageError(
                f"{len(stanzas)} recipients take more than {MAX_RECIPIENTS_FILE_BYTES} bytes", hint="name fewer"
            )
        return file

    def unwrap(self, identities: Sequence[Identity]) -> bytes:
        """Return the DEK, once the whole file has proved authentic under it; errors as `open_recipients`."""
        for identity in identities:
            for stanza in self.stanzas:
                dek = identity.unwrap(stanza, self.context)
                if dek is not None:
                    self._check(dek)
                    return dek
        raise AuthenticationError(
            f"none of {len(identities)} identities can open this save",
            hint=f"it has {len(self.stanzas)} recipients: pass the identity of one of them, "
            "or ask its owner to save it for yours too",
        )

    def _check(self, dek: bytes) -> None:
        # The commitment first: it tells a wrapped key of another save from a changed list of recipients.
        if len(dek) != DEK_BYTES or not hmac.compare_digest(
            dek_commitment(dek, self.context.set_id).encode(), self.dek_commitment.encode()
        ):
            raise AuthenticationError(
                "the wrapped key is not the key of this save", hint="fetch the recipients file again"
            )
        if not hmac.compare_digest(self.expected_mac(dek).encode(), self.mac.encode()):
            raise AuthenticationError(
                "the recipients file was changed by somebody who cannot open the save",
                hint="fetch it again from a source you trust",
            )


def seal_recipients(dek: bytes, recipients: Sequence[Recipient], *, set_id: str, model_id: str) -> bytes:
    """Return the contents of ``wmguard_recipients.json``: the DEK wrapped for every recipient.

    A recipient that is named twice gets one stanza.

    Raises:
        UsageError: No recipient, or more than ``MAX_STANZAS``.
        KeyFormatError: The DEK is not 32 bytes, or a public key is not usable.
    """
    context = WrapContext(set_id=set_id, model_id=model_id)
    unique = {recipient.key_id: recipient for recipient in recipients}
    stanzas = [recipient.wrap(dek, context) for recipient in unique.values()]
    return RecipientsFile.sealed(dek, context, stanzas).encode()


def open_recipients(
    data: bytes, identities: Sequence[Identity], *, set_id: str | None = None, model_id: str | None = None
) -> bytes:
    """Return the DEK of a save, 32 bytes.

    Args:
        data: The contents of ``wmguard_recipients.json``.
        identities: Tried in turn.
        set_id: The save it must belong to, as the manifest says; None takes what the file says.
        model_id: The model it must belong to, likewise.
    Raises:
        FormatError: Not a well-formed recipients file.
        ManifestError: The file of another save or model.
        AuthenticationError: No identity fits, or the file was changed.
    """
    file = RecipientsFile.parse(data)
    for what, found, expected in (
        ("set_id", file.context.set_id, set_id),
        ("model_id", file.context.model_id, model_id),
    ):
        if expected is not None and found != expected:
            raise ManifestError(
                f"recipients file: {what} is {found!r}, expected {expected!r}",
                hint="it belongs to another save: the folder was copied in part, or a save into it was interrupted; "
                "fetch the whole folder again, or go back to another checkpoint",
            )
    return file.unwrap(identities)
