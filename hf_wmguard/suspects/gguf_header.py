"""The header of a GGUF file, with every length checked against the file before it is used.

The `gguf` package's own reader is not used for this: it follows an array length that lies through all 2^64 of its
entries, and makes several objects of every word of an honest vocabulary.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_wmguard.container.source import Source
from hf_wmguard.errors import FormatError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1 << 10
_MAX_TEXT_BYTES = 1 << 10
# Numbers for each layer are kept; vocabularies are passed over.
_MAX_KEPT = 1 << 12
_WINDOW_BYTES = 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Args:
        shape: As PyTorch has it, the fastest dimension last.
        kind: Number of the quantization type.
        offset_bytes: Where its data begins, from the begin of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself: metadata but for long arrays and long texts, and where its tensors lie."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """Reads one value after another, never beyond the end; of the file one window is in memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size_bytes = source.size_bytes
        self.place = 0
        self._window = memoryview(b"")
        self._begin = 0

    def skip(self, size_bytes: int) -> int:
        begin = self.place
        if size_bytes > self.size_bytes - begin:
            raise ValueError(f"{size_bytes} bytes at {begin} of {self.size_bytes}")
        self.place += size_bytes
        return begin

    def take(self, size_bytes: int) -> memoryview:
        """Return the next bytes, which the caller has limited."""
        begin = self.skip(size_bytes)
        if not self._begin <= begin <= self.place <= self._begin + len(self._window):
            window = bytearray(min(max(size_bytes, _WINDOW_BYTES), self.size_bytes - begin))
            self._source.read_into(memoryview(window), begin)
            self._window, self._begin = memoryview(window), begin
        return self._window[begin - self._begin : self.place - self._begin]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, limit_bytes: int) -> str | None:
        """Return a string, or None where it is longer than the limit."""
        size = self.number("<Q")
        if size > limit_bytes:
            self.skip(size)
            return None
        return bytes(self.take(size)).decode()

    def name(self) -> str:
        text = self.text(_MAX_NAME_BYTES)
        if text is None:
            raise ValueError(f"a name longer than {_MAX_NAME_BYTES} bytes")
        return text

    def value(self, kind: int) -> Any:
        """Return a value of the metadata; None where it is too long to be of interest."""
        if kind == _STRING:
            return self.text(_MAX_TEXT_BYTES)
        if kind != _ARRAY:
            return self.number(_scalar(kind))
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
            return None
        form = _scalar(inner)
        if count > _MAX_KEPT:
            self.skip(count * struct.calcsize(form))
            return None
        return [item for (item,) in struct.iter_unpack(form, self.take(count * struct.calcsize(form)))]


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of unknown type {kind}")
    return _SCALARS[kind]


def read_header(source: Source, sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Return the header of a GGUF file.

    Args:
        source: The file, open for reading.
        sizes: Weights and bytes of a block of each quantization type.
    Raises:
        FormatError: Not a GGUF file of version 2 or 3, cut short, or with a header that lies.
    """
    try:
        return _parse(_Cursor(source), source.size_bytes, sizes)
    except (ValueError, OverflowError, struct.error) as error:
        raise FormatError(
            f"{source.name} is not a readable GGUF file: {error}", hint="the file is damaged or cut short"
        ) from None


def _parse(cursor: _Cursor, size_bytes: int, sizes: Mapping[int, tuple[int, int]]) -> Header:
    magic, version = cursor.number("<4s"), cursor.number("<I")
    if magic != _MAGIC or version not in _VERSIONS:
        raise ValueError(f"it begins with {magic!r}, version {version}")
    tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    # Every entry takes bytes, so that a count that lies ends at the end of the file.
    for _ in range(value_count):
        key = cursor.name()
        if key in metadata:
            raise ValueError(f"{key} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    raw: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.name()
        if name in raw:
            raise ValueError(f"{name} is there twice")
        raw[name] = _tensor_info(cursor)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
        raise ValueError(f"an alignment of {alignment}")
    begin = -(-cursor.place // alignment) * alignment
    tensors = {}
    for name, info in raw.items():
        if info.kind not in sizes:
            raise ValueError(f"{name} is of unknown type {info.kind}")
        weights, block_bytes = sizes[info.kind]
        needed = math.prod(info.shape) // weights * block_bytes
        if info.shape[-1] % weights or begin + info.offset_bytes + needed > size_bytes:
            raise ValueError(f"{name} of {info.shape} does not lie in the file")
        tensors[name] = TensorInfo(shape=info.shape, kind=info.kind, offset_bytes=begin + info.offset_bytes)
    return Header(metadata, tensors)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    dimensions = cursor.number("<I")
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if 0 in shape:
        raise ValueError(f"a tensor of {shape}")
    return TensorInfo(shape=shape, kind=kind, offset_bytes=offset)
