"""Protected files on disk: write one from tensors, read tensors from one. Plaintext stays in memory."""

from __future__ import annotations

from pathlib import Path

from hf_wmguard.container.format import FileContext
from hf_wmguard.container.inner import TensorInfo
from hf_wmguard.container.memory import Memory
from hf_wmguard.container.reading import ProtectedFile
from hf_wmguard.container.source import Source, open_source, read_header
from hf_wmguard.container.writing import FileRecord, TensorData, TensorSource, write_protected
from hf_wmguard.errors import FormatError

__all__ = [
    "FileContext",
    "FileRecord",
    "Memory",
    "ProtectedFile",
    "TensorData",
    "TensorInfo",
    "TensorSource",
    "inspect_file",
    "is_protected",
    "write_protected",
]


def inspect_file(file: Path | Source) -> dict[str, object]:
    """Return what a protected file shows without keys; well formed, but **not** authenticated.

    The fields of the public header, ``commitment`` (hex), ``size_bytes`` of the file, and ``tensors``: the
    plaintext size in bytes of every tensor by name, nothing where they are hidden. Dtypes and shapes are encrypted.

    Raises:
        NotFoundError: No such file.
        FormatError: Not a well-formed protected file.
    """
    source = open_source(file)
    try:
        header, _ = read_header(source)
        size_bytes = source.size_bytes
    finally:
        # Whoever has opened it closes it.
        if source is not file:
            source.close()
    return {
        **header.body(),
        "commitment": header.commitment.hex(),
        "size_bytes": size_bytes,
        "tensors": dict(header.sizes),
    }


def is_protected(file: Path | Source) -> bool:
    """Return whether a file is well formed as a protected file; reads the header alone and needs no key.

    False for a damaged protected file too: what cannot be told from plaintext counts as plaintext.

    Raises:
        NotFoundError: No such file.
    """
    try:
        inspect_file(file)
    except FormatError:
        return False
    return True
