"""Recipients and identities by ML-KEM-768 with X25519: HPKE that holds as long as one of the two does.

A save that is copied today may be opened by a quantum computer later; X25519 alone would fall to it. Keys and
stanzas are longer: 1216 bytes public, 96 private, 1168 per stanza.

Source: RFC 9180, base mode, HKDF-SHA256, AES-256-GCM; FIPS 203 for ML-KEM-768; draft-ietf-hpke-pq for the
combination, KEM 0x647a (X-Wing), as the library implements it.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from hf_wmguard.canonical import encode_base64
from hf_wmguard.container.lines import format_line, identity_prefix, parse_line, recipient_prefix
from hf_wmguard.container.stanzas import Stanza, WrapContext, open_sealed
from hf_wmguard.errors import KeyFormatError

HYBRID_KIND = "mlkem768-x25519"
_SEED_BYTES = 64
_ENCAPSULATION_KEY_BYTES = 1184
_X25519_BYTES = 32
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class HybridRecipient:
    """A public key by ML-KEM-768 and X25519.

    Args:
        data: The ML-KEM encapsulation key, then the X25519 public key: 1216 bytes.
    Raises:
        KeyFormatError: Not two such keys.
    """

    __slots__ = ("_data", "_key")

    def __init__(self, data: bytes) -> None:
        try:
            self._key = MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(data[:_ENCAPSULATION_KEY_BYTES]),
                X25519PublicKey.from_public_bytes(data[_ENCAPSULATION_KEY_BYTES:]),
            )
        except ValueError:
            raise KeyFormatError("the recipient is not a usable key", hint="ask for another public key") from None
        self._data = data

    @classmethod
    def parse(cls, text: str) -> HybridRecipient:
        """Return the recipient that one line of text names.

        Raises:
            KeyFormatError: Not such a line.
        """
        size_bytes = _ENCAPSULATION_KEY_BYTES + _X25519_BYTES
        return cls(parse_line(text, recipient_prefix(HYBRID_KIND), "recipient", size_bytes))

    def to_text(self) -> str:
        """Return the line that `parse` reads, with its newline."""
        return format_line(recipient_prefix(HYBRID_KIND), self._data)

    @property
    def key_id(self) -> str:
        """``sha256:`` and the hex digest of the public bytes."""
        return "sha256:" + hashlib.sha256(self._data).hexdigest()

    def wrap(self, dek: bytes, context: WrapContext) -> Stanza:
        """Return the DEK wrapped for this recipient.

        Raises:
            KeyFormatError: The X25519 half is one of the few points that give everybody the same secret.
        """
        try:
            ciphertext = _SUITE.encrypt(dek, self._key, info=context.info(HYBRID_KIND))
        except ValueError:
            raise KeyFormatError("the recipient is not a usable key", hint="ask for another public key") from None
        return {"kind": HYBRID_KIND, "recipient": self.key_id, "ciphertext": encode_base64(ciphertext)}

    def __repr__(self) -> str:
        return f"HybridRecipient({self.key_id})"


class HybridIdentity:
    """The private key of a `HybridRecipient`; never printed, compared or pickled.

    Args:
        data: The ML-KEM seed (FIPS 203, d and z), then the X25519 private key: 96 bytes.
    Raises:
        KeyFormatError: Another length, or one byte repeated.
    """

    __slots__ = ("__data", "__key", "__recipient")

    def __init__(self, data: bytes) -> None:
        if len(data) != _SEED_BYTES + _X25519_BYTES or len(set(data)) == 1:
            raise KeyFormatError(
                f"an identity of {len(data)} bytes, expected {_SEED_BYTES + _X25519_BYTES} random ones",
                hint="make one with: wmguard keygen recipient --post-quantum --out FILE",
            )
        seed = MLKEM768PrivateKey.from_seed_bytes(data[:_SEED_BYTES])
        curve = X25519PrivateKey.from_private_bytes(data[_SEED_BYTES:])
        self.__data = bytes(data)
        self.__key = MLKEM768X25519PrivateKey(seed, curve)
        self.__recipient = HybridRecipient(seed.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> HybridIdentity:
        """Return a fresh random identity."""
        seed, curve = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        return cls(seed.private_bytes_raw() + curve.private_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> HybridIdentity:
        """Return the identity that one line of text holds.

        Raises:
            KeyFormatError: Not such a line. The text is never repeated.
        """
        size_bytes = _SEED_BYTES + _X25519_BYTES
        return cls(parse_line(text, identity_prefix(HYBRID_KIND), "identity", size_bytes))

    def to_text(self) -> str:
        """Return the line that `parse` reads, with its newline. It is the secret: write it with mode 0600."""
        return format_line(identity_prefix(HYBRID_KIND), self.__data)

    def recipient(self) -> HybridRecipient:
        """Return the public half."""
        return self.__recipient

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the stanza is for somebody else; errors as `Identity.unwrap`."""
        return open_sealed(_SUITE, self.__key, stanza, context, kind=HYBRID_KIND, key_id=self.__recipient.key_id)

    def __repr__(self) -> str:
        return "HybridIdentity(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an identity is never pickled: pass a reference and load it where it is needed")
