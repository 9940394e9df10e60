"""Keys as one line of text: a prefix that says what it is, and base64.

An error never repeats a line: it may be a secret.
"""

from __future__ import annotations

from hf_wmguard.canonical import decode_base64, encode_base64
from hf_wmguard.errors import KeyFormatError

KEYGEN = "make one with: wmguard keygen recipient --out FILE"
_IDENTITY = "wmguard-identity-"
_RECIPIENT = "wmguard-recipient-"


def identity_prefix(kind: str) -> str:
    """Return how the line of a private key of this kind begins."""
    return f"{_IDENTITY}{kind}-v1:"


def recipient_prefix(kind: str) -> str:
    """Return how the line of a public key of this kind begins."""
    return f"{_RECIPIENT}{kind}-v1:"


def format_line(prefix: str, data: bytes) -> str:
    """Return the line that `parse_line` reads, with its newline."""
    return f"{prefix}{encode_base64(data)}\n"


def parse_line(text: str, prefix: str, what: str, size_bytes: int) -> bytes:
    """Return the bytes behind a prefix.

    Args:
        text: The line; white space around it does not count.
        prefix: What it must begin with.
        what: ``recipient`` or ``identity``, for the error message.
        size_bytes: The only length that is accepted.
    Raises:
        KeyFormatError: Not such a line.
    """
    line = text.strip()
    if prefix.startswith(_RECIPIENT) and line.startswith(_IDENTITY):
        raise KeyFormatError(
            "recipient: this is a private identity", hint="pass its public half, the file that ends in .pub"
        )
    if prefix.startswith(_IDENTITY) and line.startswith(_RECIPIENT):
        raise KeyFormatError("identity: this is a public recipient", hint="pass the private file, without .pub")
    if not line.startswith(prefix):
        raise KeyFormatError(f"{what}: expected one line that starts with {prefix}", hint=KEYGEN)
    data = decode_base64(line.removeprefix(prefix), what, error=KeyFormatError)
    if len(data) != size_bytes:
        raise KeyFormatError(f"{what}: {len(data)} bytes, expected {size_bytes}", hint=KEYGEN)
    return data
