"""Look for secrets in small files. Nothing is unpickled or executed, and what is found is never repeated."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator

# Each opcode costs about a microsecond, and a pickle can have as many as it has bytes.
MAX_PICKLE_BYTES = 1 << 20
# What a secret looks like, by what it is called in messages.
_SHAPES = {
    "a token of the Hub": re.compile(rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{20,}"),
    "an access key of AWS": re.compile(rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a token of GitHub": re.compile(rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,})"),
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----"),
    "a recipient's private key": re.compile(rb"wmguard-identity-[a-z0-9-]{1,40}-v\d+:"),
}
_TOKEN_NAMES = frozenset({"hub_token", "push_to_hub_token"})
# What the opcodes of a pickle's strings, and those that keep or fetch one, are called.
_STRINGS = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
)
_KEEP, _FETCH = frozenset({"BINPUT", "LONG_BINPUT", "PUT"}), frozenset({"BINGET", "LONG_BINGET", "GET"})


def secrets_in_text(data: bytes) -> list[str]:
    """Return what kinds of secrets stand in a file, in words."""
    return [what for what, shape in _SHAPES.items() if shape.search(data)]


def secrets_in_pickle(data: bytes) -> list[str]:
    """Return what kinds of secrets stand in a pickle, bare or as ``torch.save`` wraps it, in words.

    Its opcodes are read, none is carried out. A ``hub_token`` counts whatever it looks like.
    """
    found: dict[str, None] = {}
    for pickle in _pickles(data):
        name = ""
        try:
            for text in _texts(pickle):
                found |= dict.fromkeys(secrets_in_text((text or "").encode(errors="replace")))
                if name in _TOKEN_NAMES and text and text not in _TOKEN_NAMES:
                    found["a token of the Hub"] = None
                name = text or ""
        except (ValueError, IndexError, OverflowError, UnicodeError, MemoryError):
            # Cut or hostile: what it holds as bytes still counts.
            found |= dict.fromkeys(secrets_in_text(pickle))
    return list(found)


def holds_no_tensors(data: bytes) -> bool:
    """Return whether a file that ``torch.save`` wrote has no tensors in it, such as a note in place of a state."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    return any(name.endswith("/data.pkl") for name in names) and not any("/data/" in name for name in names)


def _pickles(data: bytes) -> Iterator[bytes]:
    if not data.startswith(b"PK"):
        yield data[:MAX_PICKLE_BYTES]
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for one in archive.infolist():
                if one.filename.endswith(".pkl"):
                    # Read up to a limit, whatever size it claims: it may be a bomb.
                    with archive.open(one) as file:
                        yield file.read(MAX_PICKLE_BYTES)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, OSError, EOFError):
        yield data[:MAX_PICKLE_BYTES]


def _texts(pickle: bytes) -> Iterator[str | None]:
    """Yield the strings that a pickle puts on its stack, in order, and None for anything else there."""
    kept: dict[int, str | None] = {}
    last: str | None = None
    for opcode, value, _ in pickletools.genops(pickle):
        if opcode.name == "MEMOIZE":
            kept[len(kept)] = last
        elif opcode.name in _KEEP:
            kept[int(value or 0)] = last
        else:
            if opcode.name in _STRINGS:
                last = str(value)
            elif opcode.name in _FETCH:
                last = kept.get(int(value or 0))
            else:
                last = None
            yield last
