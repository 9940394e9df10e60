"""Wrapping under a passphrase, by Argon2id.

The salt and the cost stand in the stanza, so whoever writes the file chooses them: they are held against limits
before anything is computed, and a file may hold a few such stanzas only. A hostile file costs its reader at
most 1 GiB and some seconds a stanza.

AES-GCM does not commit to its key, and one ciphertext that opens under many passphrases would let an attacker
test many with one question (Len, Grubbs and Ristenpart 2021). The stanza's ``recipient`` is a value that only
the right passphrase gives; it is compared before anything is decrypted, and it tells a wrong passphrase from a
changed stanza.

Source: RFC 9106 (Argon2id).
"""

from __future__ import annotations

import hmac
import os
import secrets
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from hf_wmguard.canonical import decode_base64, encode_base64
from hf_wmguard.container.asking import ask
from hf_wmguard.container.checks import reading
from hf_wmguard.container.stanzas import Stanza, WrapContext
from hf_wmguard.container.symmetric import derive, seal, unseal
from hf_wmguard.errors import ConfigError, FormatError, KeyFormatError, NotFoundError, UsageError
from hf_wmguard.keys import read_reference

PASSPHRASE_KIND = "passphrase"  # noqa: S105 - the name of a kind
MAX_PASSPHRASE_STANZAS = 4
MIN_PASSPHRASE_CHARACTERS = 8
MAX_PASSPHRASE_BYTES = 4096
_SALT_BYTES = 16
_ID_PREFIX = "argon2id:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one guess costs.

    Args:
        memory_kib: 19 MiB (the least that OWASP names) to 1 GiB.
        passes: 1 to 10.
        lanes: 1 to 16.
    Raises:
        UsageError: Out of these ranges.
    """

    memory_kib: int = 256 * 1024
    passes: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        for name, least, most in (("memory_kib", 19 * 1024, 1024 * 1024), ("passes", 1, 10), ("lanes", 1, 16)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(f"Argon2id {name} is {value}", hint=f"expected {least} to {most}")

    @classmethod
    def parse(cls, stanza: Stanza) -> Self:
        """Return the cost in a stanza.

        Raises:
            FormatError: Not numbers.
            UsageError: Out of range.
        """
        numbers = {}
        for name in ("memory_kib", "passes", "lanes"):
            text = stanza[name]
            # One spelling, and short: int() takes " 1", "+1", "1_0" and thousands of digits.
            if not (text.isascii() and text.isdecimal() and len(text) <= 7 and str(int(text)) == text):
                raise FormatError(f"stanza: {name} is not a number", hint="the file was changed; fetch it again")
            numbers[name] = int(text)
        return cls(**numbers)


class Passphrase:
    """A passphrase that both wraps and unwraps; never printed, compared or pickled.

    Args:
        text: The passphrase; compared in Unicode's NFC, so that every keyboard gives the same bytes.
        cost: For wrapping. Unwrapping takes what the stanza says, within the limits of `Cost`.
    Raises:
        KeyFormatError: Empty, too long, or not Unicode.
    """

    __slots__ = ("__text", "__wrapping", "_cost", "_salt")

    def __init__(self, text: str, *, cost: Cost | None = None) -> None:
        try:
            data = unicodedata.normalize("NFC", text).encode()
        except UnicodeEncodeError:
            data = b""
        if not 0 < len(data) <= MAX_PASSPHRASE_BYTES:
            raise KeyFormatError(
                f"a passphrase of {len(data)} bytes", hint=f"expected 1 to {MAX_PASSPHRASE_BYTES} bytes of text"
            )
        self.__text = data
        self.__wrapping: bytes | None = None
        self._cost = cost or Cost()
        self._salt = secrets.token_bytes(_SALT_BYTES)

    @property
    def key_id(self) -> str:
        """What only this passphrase gives with this object's salt; the first time it costs an Argon2id."""
        return _id_of(self._key())

    def wrap(self, dek: bytes, context: WrapContext) -> Stanza:
        """Return the DEK wrapped under this passphrase.

        Raises:
            KeyFormatError: The passphrase is too short for that.
        """
        if len(self.__text.decode()) < MIN_PASSPHRASE_CHARACTERS:
            raise KeyFormatError(
                f"a passphrase of {len(self.__text.decode())} characters, expected {MIN_PASSPHRASE_CHARACTERS} or more",
                hint="take six random words: whoever has the files can guess for as long as they like",
            )
        return {
            "kind": PASSPHRASE_KIND,
            "recipient": self.key_id,
            "memory_kib": str(self._cost.memory_kib),
            "passes": str(self._cost.passes),
            "lanes": str(self._cost.lanes),
            "salt": encode_base64(self._salt),
            "ciphertext": seal(self._key(), dek, context.info(PASSPHRASE_KIND)),
        }

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the passphrase is another; errors as `Identity.unwrap`."""
        if stanza["kind"] != PASSPHRASE_KIND:
            return None
        with reading("stanza"):
            check_stanza(stanza)
        key = self._stretch(decode_base64(stanza["salt"], "salt"), Cost.parse(stanza))
        if not hmac.compare_digest(_id_of(key).encode(), stanza["recipient"].encode()):
            return None
        return unseal(key, stanza["ciphertext"], context.info(PASSPHRASE_KIND))

    def _key(self) -> bytes:
        if self.__wrapping is None:
            self.__wrapping = self._stretch(self._salt, self._cost)
        return self.__wrapping

    def _stretch(self, salt: bytes, cost: Cost) -> bytes:
        argon = Argon2id(salt=salt, length=32, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib)
        return argon.derive(self.__text)

    def __repr__(self) -> str:
        return "Passphrase(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a passphrase is never pickled: pass a reference and load it where it is needed")


def _id_of(key: bytes) -> str:
    return _ID_PREFIX + derive(key, b"hf-wmguard/1/passphrase id").hex()


def check_stanza(stanza: Stanza) -> None:
    """Hold the salt and the cost of a stanza against the limits, before anything is computed.

    Raises:
        FormatError: Malformed.
        UsageError: Out of range.
    """
    Cost.parse(stanza)
    if len(decode_base64(stanza["salt"], "salt")) != _SALT_BYTES:
        raise FormatError(f"stanza: the salt is not {_SALT_BYTES} bytes", hint="fetch the recipients file again")


def load_passphrase(ref: str, *, new: bool = False) -> Passphrase:
    """Return the passphrase a reference points to.

    Args:
        ref: ``env:NAME`` or ``file:PATH`` (mode 0600; one newline at its end does not count), or ``prompt``.
        new: Whether it is going to wrap, so that whoever is asked types it twice.
    Raises:
        ConfigError: Another reference, or ``prompt`` where nobody can be asked.
        NotFoundError, KeyPermissionError, KeyFormatError: It cannot be read, or is none.
    """
    if ref == "prompt":
        return Passphrase(ask("passphrase", new))
    if ref.startswith("env:"):
        name = ref.removeprefix("env:")
        value = os.environ.get(name)
        if value is None:
            raise NotFoundError(
                f"passphrase: environment variable {name} is not set", hint=f"set {name} to the passphrase"
            )
        return Passphrase(value)
    if ref.startswith("file:"):
        data = read_reference(ref, what="passphrase", private=True)
        try:
            return Passphrase(data.decode().removesuffix("\n").removesuffix("\r"))
        except UnicodeDecodeError:
            name = Path(ref.removeprefix("file:")).name
            raise KeyFormatError(
                f"passphrase: {name} is not UTF-8 text", hint="write the passphrase on one line"
            ) from None
    # Not repeated: somebody may have put the passphrase itself here.
    raise ConfigError(
        "passphrase: not a reference", hint="write passphrase:env:NAME, passphrase:file:PATH or passphrase:prompt"
    )
