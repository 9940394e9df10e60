"""Wrapping under a symmetric key: the step that raw keys, passphrases and key services share.

Each stanza has 32 random bytes of salt, and HKDF gives it a key of its own, bound to the save. So a nonce can
never repeat under one key, and a stanza moved to another save or kind does not open.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hf_wmguard.canonical import decode_base64, encode_base64
from hf_wmguard.container.stanzas import Stanza, WrapContext
from hf_wmguard.errors import AuthenticationError, KeyFormatError

RAW_KIND = "rawkey"
KEY_BYTES = 32
_SALT_BYTES = 32


def seal(key: bytes, dek: bytes, info: bytes) -> str:
    """Return a DEK sealed under a key, in base64: salt, then AES-256-GCM.

    Args:
        key: 32 bytes.
        dek: The key that is wrapped.
        info: `WrapContext.info` of the stanza.
    Source: HKDF-SHA256, RFC 5869.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    return encode_base64(salt + AESGCM(derive(key, info, salt)).encrypt(bytes(12), dek, None))


def unseal(key: bytes, ciphertext: str, info: bytes) -> bytes:
    """Return what `seal` sealed.

    Raises:
        FormatError: Not base64.
        AuthenticationError: Another key, another save, or changed bytes.
    """
    data = decode_base64(ciphertext, "stanza")
    salt, sealed = data[:_SALT_BYTES], data[_SALT_BYTES:]
    try:
        return AESGCM(derive(key, info, salt)).decrypt(bytes(12), sealed, None)
    except (InvalidTag, ValueError):
        raise AuthenticationError(
            "the wrapped key for this identity was changed, or comes from another save",
            hint="fetch the recipients file again from a source you trust",
        ) from None


def derive(key: bytes, info: bytes, salt: bytes | None = None) -> bytes:
    """Return 32 bytes for one use of a key."""
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(key)


class RawKey:
    """A symmetric key that both wraps and unwraps; never printed, compared or pickled.

    Args:
        key: 32 random bytes.
    Raises:
        KeyFormatError: Another length, or one byte repeated.
    """

    __slots__ = ("__key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES or len(set(key)) == 1:
            raise KeyFormatError(
                f"a raw key of {len(key)} bytes, expected {KEY_BYTES} random ones",
                hint="make one with: wmguard keygen key --out FILE",
            )
        self.__key = bytes(key)

    @property
    def key_id(self) -> str:
        """``sha256:`` and the hex digest of a value derived from the key, which says nothing about it."""
        return "sha256:" + hashlib.sha256(derive(self.__key, b"hf-wmguard/1/recipient id")).hexdigest()

    def wrap(self, dek: bytes, context: WrapContext) -> Stanza:
        """Return the DEK wrapped under this key."""
        ciphertext = seal(self.__key, dek, context.info(RAW_KIND))
        return {"kind": RAW_KIND, "recipient": self.key_id, "ciphertext": ciphertext}

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the stanza is for somebody else; errors as `Identity.unwrap`."""
        if stanza["kind"] != RAW_KIND or stanza["recipient"] != self.key_id:
            return None
        return unseal(self.__key, stanza["ciphertext"], context.info(RAW_KIND))

    def __repr__(self) -> str:
        return "RawKey(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never pickled: pass a reference and load it where it is needed")
