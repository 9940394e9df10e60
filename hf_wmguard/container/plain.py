"""Plain safetensors files, read and written piece by piece: never mapped, never whole in memory.

Source: the safetensors format, https://huggingface.co/docs/safetensors (metadata parsing).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_wmguard.atomic import atomic_file
from hf_wmguard.canonical import require_object
from hf_wmguard.container.checks import reading
from hf_wmguard.container.format import LENGTH_BYTES, METADATA
from hf_wmguard.container.inner import DTYPE_BITS, TensorInfo
from hf_wmguard.container.reading import ProtectedFile
from hf_wmguard.container.source import Source, open_source
from hf_wmguard.errors import FormatError

# What the safetensors library reads at most.
MAX_PLAIN_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 16 * 1024 * 1024
_ALIGNMENT_BYTES = 8
_ENTRY = {"dtype": (str,), "shape": (list,), "data_offsets": (list,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """A tensor in a plain file.

    Attributes:
        file: Open for reading.
        offset_bytes: Where its first byte lies in the file.
        what: What it is.
    """

    file: Source = field(repr=False)
    offset_bytes: int
    what: TensorInfo

    def info(self) -> TensorInfo:
        """Return what the tensor is, without its bytes."""
        return self.what

    def part(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        """Return the bytes ``start`` to ``stop``, read into ``scratch``; errors as `Source.read_into`."""
        view = scratch[: stop - start]
        self.file.read_into(view, self.offset_bytes + start)
        return view


class PlainFile:
    """A plain safetensors file, open for reading; a context manager.

    Args:
        file: The file: its path, or where it is open already. It is closed with this object.
    Attributes:
        tensors: What can be given to `write_protected`, by name, in the order of the data.
        metadata: The file's own metadata.
    Raises:
        NotFoundError: No such file.
        FormatError: Not a well-formed safetensors file: offsets with gaps or overlaps, sizes that do not fit,
            duplicate names, an unknown dtype.
    """

    def __init__(self, file: Path | Source) -> None:
        self._file = open_source(file)
        try:
            header, start = _read_header(self._file)
            self.metadata = _metadata(header.pop(METADATA, {}), self.name)
            self.tensors = self._tensors(header, start)
        except BaseException:
            self._file.close()
            raise

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self._file.name

    def _tensors(self, header: Mapping[str, object], start: int) -> dict[str, FileTensor]:
        spans = sorted((*_span(name, entry, self.name), name) for name, entry in header.items())
        tensors, expected = {}, 0
        for begin, end, name in spans:
            if begin != expected:
                raise _damaged(self.name, f"{name!r} lies at {begin}, expected {expected}")
            expected = end
            tensors[name] = FileTensor(
                file=self._file,
                offset_bytes=start + begin,
                what=_info(name, header[name], end - begin, self.name),
            )
        size_bytes = self._file.size_bytes
        if size_bytes != start + expected:
            raise _damaged(self.name, f"it has {size_bytes} bytes, its header implies {start + expected}")
        return tensors

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PlainFile({self.name!r})"


def write_plain(path: Path, file: ProtectedFile, *, progress: Callable[[str, int], None] | None = None) -> None:
    """Write what a protected file holds as a plain one, whole or not at all; of plaintext 16 MiB are in memory.

    Args:
        path: The final name.
        file: Any dtype that safetensors files have comes back.
        progress: Called with the file's name and the plaintext bytes just written.
    Raises:
        AuthenticationError, FormatError: As `ProtectedFile.read_into`.
        NotFoundError, EnvironmentFault: As `atomic_file`.
    """
    infos = {name: file.info(name) for name in file.names()}
    # The widest first, as the safetensors library does it, so that every tensor lies aligned.
    names = sorted(infos, key=lambda name: (-DTYPE_BITS[infos[name].dtype], name))
    header: dict[str, object] = {METADATA: file.metadata or {"format": "pt"}}
    stop = 0
    for name in names:
        start, stop = stop, stop + infos[name].size_bytes
        info = infos[name]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with atomic_file(path) as out:
        out.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in names:
            size_bytes = infos[name].size_bytes
            # At least once: an empty tensor has a tag to check, too.
            for at in range(0, max(size_bytes, 1), _BLOCK_BYTES):
                block = file.read_range(name, at, min(size_bytes, at + _BLOCK_BYTES))
                out.write(block)
                if progress is not None:
                    progress(path.name, len(block))


def _damaged(file: str, what: str) -> FormatError:
    return FormatError(f"{file}: {what}", hint="the file is damaged, or is no safetensors file; fetch it again")


def _read_header(source: Source) -> tuple[dict[str, object], int]:
    size_bytes = source.size_bytes
    if size_bytes < LENGTH_BYTES:
        raise _damaged(source.name, f"{size_bytes} bytes")
    length = memoryview(bytearray(LENGTH_BYTES))
    source.read_into(length, 0)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > min(MAX_PLAIN_HEADER_BYTES, size_bytes - LENGTH_BYTES):
        raise _damaged(source.name, f"header of {header_bytes} bytes in a file of {size_bytes}")
    raw = bytearray(header_bytes)
    source.read_into(memoryview(raw), LENGTH_BYTES)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise _damaged(source.name, "its header is not JSON, or names a tensor twice") from None
    if not isinstance(header, dict):
        raise _damaged(source.name, "its header is not an object")
    return header, LENGTH_BYTES + header_bytes


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _metadata(value: object, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(file, "its metadata are not strings")
    return value


def _span(name: str, value: object, file: str) -> tuple[int, int]:
    entry: dict[str, Any] = require_object(value, _ENTRY, f"{file}: entry of a tensor")
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or any(type(offset) is not int for offset in offsets) or not 0 <= offsets[0] <= offsets[1]:
        raise _damaged(file, f"{name!r} has offsets that are none")
    return offsets[0], offsets[1]


def _info(name: str, value: object, size_bytes: int, file: str) -> TensorInfo:
    entry: dict[str, Any] = require_object(value, _ENTRY, f"{file}: entry of a tensor")
    if any(type(size) is not int for size in entry["shape"]) or entry["dtype"] not in DTYPE_BITS:
        raise _damaged(file, f"{name!r} has a shape or dtype that is not known")
    with reading(f"{file}: {name!r}"):
        return TensorInfo(dtype=entry["dtype"], shape=tuple(entry["shape"]), size_bytes=size_bytes)
