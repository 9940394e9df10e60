"""Checks of single values, shared by what writes a protected file and what reads one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_wmguard.errors import FormatError, UsageError

MAX_TEXT_BYTES = 1024


def check_text(value: str, what: str) -> None:
    """Refuse a text that is empty, too long or not Unicode.

    Raises:
        UsageError: See above.
    """
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not valid Unicode", hint="choose a name without surrogates") from None
    if not 1 <= size_bytes <= MAX_TEXT_BYTES:
        raise UsageError(f"{what} has {size_bytes} bytes, expected 1 to {MAX_TEXT_BYTES}", hint="choose another name")


def decode_hex(text: str, size_bytes: int, what: str) -> bytes:
    """Return the bytes of a hexadecimal text; other spellings of them are left to the caller's comparison.

    Raises:
        FormatError: Not hexadecimal, or not this size.
    """
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != size_bytes:
        raise FormatError(f"{what} is not {size_bytes} bytes in hexadecimal", hint="the file is damaged")
    return data


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what is the caller's mistake when writing into a fault of the file when reading.

    Raises:
        FormatError: For every UsageError in the block.
    """
    try:
        yield
    except UsageError as error:
        raise FormatError(
            f"{what}: {error.message}", hint="the file is damaged or was changed; fetch it again"
        ) from None
