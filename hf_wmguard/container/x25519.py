"""Recipients and identities by X25519 and HPKE, and the one-line text files they live in.

Source: RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from hf_wmguard.canonical import decode_base64, encode_base64
from hf_wmguard.container.stanzas import Stanza, WrapContext
from hf_wmguard.errors import AuthenticationError, KeyFormatError
from hf_wmguard.keys import OwnerKey, read_reference

X25519_KIND = "x25519"
_IDENTITY_PREFIX = "wmguard-identity-x25519-v1:"
_RECIPIENT_PREFIX = "wmguard-recipient-x25519-v1:"
_KEY_BYTES = 32
_KEYGEN = "make one with: wmguard keygen recipient --out FILE"
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
        data = _parse_line(text, _RECIPIENT_PREFIX, "recipient")
        return cls(X25519PublicKey.from_public_bytes(data))

    def to_text(self) -> str:
        """Return the line that `parse` reads, with its newline."""
        return f"{_RECIPIENT_PREFIX}{encode_base64(self._public.public_bytes_raw())}\n"

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
                hint=_KEYGEN,
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
        return cls.from_bytes(_parse_line(text, _IDENTITY_PREFIX, "identity"))

    def to_text(self) -> str:
        """Return the line that `parse` reads, with its newline. It is the secret: write it with mode 0600."""
        return f"{_IDENTITY_PREFIX}{encode_base64(self.__key.private_bytes_raw())}\n"

    def recipient(self) -> X25519Recipient:
        """Return the public half."""
        return X25519Recipient(self.__key.public_key())

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the stanza is for somebody else; errors as `Identity.unwrap`."""
        if stanza["kind"] != X25519_KIND or stanza["recipient"] != self.recipient().key_id:
            return None
        ciphertext = decode_base64(stanza["ciphertext"], "stanza")
        try:
            return _SUITE.decrypt(ciphertext, self.__key, info=context.info(X25519_KIND))
        except InvalidTag:
            raise AuthenticationError(
                "the wrapped key for this identity was changed, or comes from another save",
                hint="fetch the recipients file again from a source you trust",
            ) from None

    def __repr__(self) -> str:
        return "X25519Identity(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an identity is never pickled: pass a reference and load it where it is needed")


def generate_identity() -> X25519Identity:
    """Return a fresh random identity."""
    return X25519Identity(X25519PrivateKey.generate())


def load_recipient(ref: str) -> X25519Recipient:
    """Return the recipient a reference points to; errors as `read_reference` and `X25519Recipient.parse`."""
    return X25519Recipient.parse(_load_line(ref, what="recipient", private=False))


def load_identity(ref: str) -> X25519Identity:
    """Return the identity a reference points to; errors as `read_reference` and `X25519Identity.parse`."""
    return X25519Identity.parse(_load_line(ref, what="identity", private=True))


def _load_line(ref: str, *, what: str, private: bool) -> str:
    try:
        return read_reference(ref, what=what, private=private).decode("ascii")
    except UnicodeDecodeError:
        raise KeyFormatError(
            f"{what}: not a line of text; an owner key is not {what}",
            hint=_KEYGEN,
        ) from None


def _parse_line(text: str, prefix: str, what: str) -> bytes:
    """Return the 32 bytes behind a prefix. An error never repeats the text: it may be a secret."""
    line = text.strip()
    if prefix == _RECIPIENT_PREFIX and line.startswith(_IDENTITY_PREFIX):
        raise KeyFormatError(
            "recipient: this is a private identity", hint="pass its public half, the file that ends in .pub"
        )
    if prefix == _IDENTITY_PREFIX and line.startswith(_RECIPIENT_PREFIX):
        raise KeyFormatError("identity: this is a public recipient", hint="pass the private file, without .pub")
    if not line.startswith(prefix):
        raise KeyFormatError(f"{what}: expected one line that starts with {prefix}", hint=_KEYGEN)
    data = decode_base64(line.removeprefix(prefix), what, error=KeyFormatError)
    if len(data) != _KEY_BYTES:
        raise KeyFormatError(f"{what}: {len(data)} bytes, expected {_KEY_BYTES}", hint=_KEYGEN)
    return data
