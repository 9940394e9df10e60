"""The ciphers a protected file may be written with: a literal list, never negotiated.

A file names its suite in the body of its header, and the body is in the keys: under another suite's name the
keys are others too. A reader knows these two and refuses everything else, so that no file can talk its reader
into something weaker. Both take a 32-byte key, a 12-byte nonce, and give a 16-byte tag.

Source: AES-GCM, NIST SP 800-38D; ChaCha20-Poly1305, RFC 8439.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.utils import Buffer

from hf_wmguard.errors import UsageError

AES_256_GCM = "AES-256-GCM"
CHACHA20_POLY1305 = "ChaCha20-Poly1305"
SUITES: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    AES_256_GCM: AESGCM,
    CHACHA20_POLY1305: ChaCha20Poly1305,
}
_CPU_FLAGS = Path("/proc/cpuinfo")
_MAX_FLAGS_BYTES = 16 * 1024


class Cipher(Protocol):
    """What the two suites have in common."""

    def encrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None) -> bytes: ...

    def decrypt(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None) -> bytes: ...

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer) -> int: ...

    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer) -> int: ...


def check_suite(suite: str) -> None:
    """Refuse a suite that is not on the list.

    Raises:
        UsageError: See above.
    """
    if suite not in SUITES:
        raise UsageError(f"the cipher suite {suite[:40]!a} is not known", hint=f"one of {', '.join(SUITES)}")


def cipher_of(suite: str, key: bytes) -> Cipher:
    """Return a cipher under a 32-byte key; errors as `check_suite`."""
    check_suite(suite)
    return SUITES[suite](key)


@functools.cache
def default_suite() -> str:
    """Return AES-256-GCM, or ChaCha20-Poly1305 where the processor is known to have no AES instructions.

    Without them AES is slower than ChaCha20 and, in software, hard to keep free of timing leaks.
    """
    # Asked of Linux alone: the other systems' machines of the last ten years have the instructions.
    if platform.system() != "Linux":
        return AES_256_GCM
    try:
        with _CPU_FLAGS.open("rb") as file:
            text = file.read(_MAX_FLAGS_BYTES)
    except OSError:
        return AES_256_GCM
    return suite_for(text)


def suite_for(cpuinfo: bytes) -> str:
    """Return the default suite for a processor that Linux describes like this."""
    for line in cpuinfo.splitlines():
        name, _, flags = line.partition(b":")
        if name.strip().lower() in (b"flags", b"features"):
            return AES_256_GCM if b"aes" in flags.split() else CHACHA20_POLY1305
    return AES_256_GCM
