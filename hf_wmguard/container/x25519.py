"""Recipients and identities by X25519 and HPKE.

Source: RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from hf_wmguard.canonical import encode_base64
from hf_wmguard.container.lines import KEYGEN, format_line, identity_prefix, parse_line, recipient_prefix
from hf_wmguard.container.stanzas import Stanza, WrapContext, open_sealed
from hf_wmguard.errors import KeyFormatError
from hf_wmguard.keys import OwnerKey

X25519_KIND = "x25519"
_KEY_BYTES = 32
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class X25519Recipient:
    """A recipient by X25519 and HPKE (RFC 9180, base mode: DHKEM(X25519), HKDF-SHA256, AES-256-GCM)."""

    __slots__ = ("_public",)

    def __init__(self, public: X25519PublicKey) -> None:
        self._public = public

    @classmethod
    def parse(cls, text: str) -> X25519Recipient:
        """Return the recipient that one line of text names.

        Raises:
            KeyFormatError: Not such a line. The text is not repeated, since it may be a private key.
        """
        data = parse_line(text, recipient_prefix(X25519_KIND), "recipient", _KEY_BYTES)
        return cls(X25519PublicKey.from_public_bytes(data))

    def to_text(self) -> str:
        """Return the line that `parse` reads, with its newline."""
        return format_line(recipient_prefix(X25519_KIND), self._public.public_bytes_raw())

    @property
    def key_id(self) -> str:
        """``sha256:`` and the hex digest of the 32 public bytes."""
        return "sha256:" + hashlib.sha256(self._public.public_bytes_raw()).hexdigest()

    def wrap(self, dek: bytes, context: WrapContext) -> Stanza:
        """Return the DEK wrapped for this recipient.

        Raises:
            KeyFormatError: The public key is one of the few points that give everybody the same secret.
        """
        try:
            ciphertext = _SUITE.encrypt(dek, self._public, info=context.info(X25519_KIND))
        except ValueError:
            raise KeyFormatError("the recipient is not a usable key", hint="ask for another public key") from None
        return {
            "kind": X25519_KIND,
            "recipient": self.key_id,
            "ciphertext": encode_base64(ciphertext),
        }

    def __repr__(self) -> str:
        return f"X25519Recipient({self.key_id})"


class X25519Identity:
    """The private key of an `X25519Recipient`; never printed, compared or pickled."""

    __slots__ = ("__key",)

    def __init__(self, key: X25519PrivateKey) -> None:
        self.__key = key

    @classmethod
    def from_bytes(cls, data: bytes) -> X25519Identity:
        """Return the identity with these 32 private bytes.

        Raises:
            KeyFormatError: Not 32 bytes, or one byte repeated.
        """
        if len(data) != _KEY_BYTES or len(set(data)) == 1:
            raise KeyFormatError(
                f"an identity of {len(data)} bytes, expected {_KEY_BYTES} random ones",
                hint=KEYGEN,
            )
        return cls(X25519PrivateKey.from_private_bytes(data))

    @classmethod
    def from_owner(cls, owner: OwnerKey) -> X25519Identity:
        """Return the identity every owner has: the owner can open whatever names it as a recipient."""
        return cls.from_bytes(owner.derive("recipient"))

    @classmethod
    def parse(cls, text: str) -> X25519Identity:
        """Return the identity that one line of text holds.

        Raises:
            KeyFormatError: Not such a line. The text is never repeated.
        """
        return cls.from_bytes(parse_line(text, identity_prefix(X25519_KIND), "identity", _KEY_BYTES))

    def to_text(self) -> str:
        """Return the line that `parse` reads, with its newline. It is the secret: write it with mode 0600."""
        return format_line(identity_prefix(X25519_KIND), self.__key.private_bytes_raw())

    def recipient(self) -> X25519Recipient:
        """Return the public half."""
        return X25519Recipient(self.__key.public_key())

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the stanza is for somebody else; errors as `Identity.unwrap`."""
        return open_sealed(_SUITE, self.__key, stanza, context, kind=X25519_KIND, key_id=self.recipient().key_id)

    def __repr__(self) -> str:
        return "X25519Identity(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an identity is never pickled: pass a reference and load it where it is needed")


def generate_identity() -> X25519Identity:
    """Return a fresh random identity."""
    return X25519Identity(X25519PrivateKey.generate())
