"""The nouns of wrapping, as in age: recipients, identities and stanzas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hpke import Suite

from hf_wmguard.canonical import canonical_json, decode_base64
from hf_wmguard.container.checks import check_text
from hf_wmguard.errors import AuthenticationError

STANZA_VERSION = 1

Stanza = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapContext:
    """The save a stanza belongs to; a stanza moved to another save does not unwrap.

    Raises:
        UsageError: An empty or overlong text.
    """

    set_id: str
    model_id: str

    def __post_init__(self) -> None:
        check_text(self.set_id, "set_id")
        check_text(self.model_id, "model_id")

    def info(self, kind: str) -> bytes:
        """Return the bytes that bind a stanza to this save and to its own kind."""
        return canonical_json(["hf-wmguard/1/recipient", kind, STANZA_VERSION, self.set_id, self.model_id])


class Recipient(Protocol):
    """A public key that can wrap a DEK."""

    @property
    def key_id(self) -> str:
        """The public name of the key."""

    def wrap(self, dek: bytes, context: WrapContext) -> Stanza:
        """Return the DEK wrapped: an object of strings with ``kind`` and ``recipient`` (the `key_id`)."""


class Identity(Protocol):
    """A private key that can unwrap a DEK."""

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the stanza is for somebody else.

        Raises:
            AuthenticationError: The stanza is for this identity, and was changed or moved from another save.
        """


def open_sealed(
    suite: Suite, key: Any, stanza: Stanza, context: WrapContext, *, kind: str, key_id: str
) -> bytes | None:
    """Return the DEK of a stanza that HPKE sealed for one key pair, or None where it is for somebody else.

    Args:
        suite: The HPKE suite of this kind of stanza.
        key: The private key, as the suite takes it.
        stanza: The stanza.
        context: The save it must belong to.
        kind: The only kind of stanza that this key opens.
        key_id: The public name of the key.
    Raises:
        AuthenticationError: It is for this key, and was changed or moved from another save.
        FormatError: Its ciphertext is not base64.
    Source: RFC 9180, sec. 6.1.
    """
    if stanza["kind"] != kind or stanza["recipient"] != key_id:
        return None
    try:
        return suite.decrypt(decode_base64(stanza["ciphertext"], "stanza"), key, info=context.info(kind))
    except InvalidTag:
        raise AuthenticationError(
            "the wrapped key for this identity was changed, or comes from another save",
            hint="fetch the recipients file again from a source you trust",
        ) from None
