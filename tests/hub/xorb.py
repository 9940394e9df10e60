"""Xet's two formats: xorbs, which hold the chunks of files, and shards, which say what files are made of.

Source: https://huggingface.co/docs/xet/xorb, https://huggingface.co/docs/xet/shard
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_CHUNK_HEADER_BYTES = 8
_ROW_BYTES = 48
_BOOKEND = b"\xff" * 32
_WITH_VERIFICATION = 1 << 31
_WITH_METADATA = 1 << 30


class XetFormatError(ValueError):
    """Bytes that are no xorb or no shard."""


def hash_text(data: bytes) -> str:
    """Return a hash as URLs have it: four little-endian numbers of 64 bits, in hex."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One chunk of a xorb.

    Args:
        start: Of its header, in bytes of the xorb.
        packed: Bytes after the header.
        size: Bytes when unpacked.
        scheme: 0 as it is, 1 LZ4, 2 LZ4 of bytes in four groups.
    """

    start: int
    packed: int
    size: int
    scheme: int

    @property
    def end(self) -> int:
        """Where it ends in the xorb."""
        return self.start + _CHUNK_HEADER_BYTES + self.packed


def read_chunks(path: Path) -> list[Chunk]:
    """Return the chunks of a xorb.

    Raises:
        XetFormatError: It is none.
    """
    chunks: list[Chunk] = []
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(_CHUNK_HEADER_BYTES)
            # A footer may follow, which begins with a letter: the version of a chunk is 0.
            if len(header) < _CHUNK_HEADER_BYTES or header[0] != 0:
                break
            packed, unpacked = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
            chunks.append(Chunk(start=position, packed=packed, size=unpacked, scheme=header[4]))
            position = chunks[-1].end
    if not chunks or chunks[-1].end > size:
        raise XetFormatError("the xorb has no chunks, or ends within one")
    return chunks


def unpack_chunk(file: BinaryIO, chunk: Chunk) -> bytes:
    """Return the content of a chunk.

    Raises:
        XetFormatError: It is not what its header says.
    """
    file.seek(chunk.start + _CHUNK_HEADER_BYTES)
    data = file.read(chunk.packed)
    if chunk.scheme in (1, 2):
        import pyarrow

        try:
            data = pyarrow.decompress(data, chunk.size, codec="lz4", asbytes=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise XetFormatError("a chunk is no LZ4") from error
    elif chunk.scheme != 0:
        raise XetFormatError(f"unknown compression: {chunk.scheme}")
    if chunk.scheme == 2:
        data = _ungroup(data)
    if len(data) != chunk.size:
        raise XetFormatError(f"a chunk has {len(data)} bytes, not {chunk.size}")
    return data


def _ungroup(data: bytes) -> bytes:
    """Return bytes in their order: they came as all the first ones of four, then all the second ones, ..."""
    plain, position = bytearray(len(data)), 0
    for group in range(4):
        count = (len(data) + 3 - group) // 4
        plain[group::4] = data[position : position + count]
        position += count
    return bytes(plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A run of chunks of one xorb.

    Args:
        xorb: Its hash.
        size: Bytes of the run when unpacked.
        start: The first chunk.
        end: After the last one.
    """

    xorb: str
    size: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A file a shard describes.

    Args:
        name: Its hash.
        terms: What it is made of, in order.
        sha256: Of the content, where the shard says it.
    """

    name: str
    terms: tuple[Term, ...]
    sha256: str | None


def read_shard(data: bytes) -> Iterator[ShardFile]:
    """Yield the files a shard describes.

    Raises:
        XetFormatError: It is none.
    """
    if not data.startswith(b"HFRepoMetaData\0") or len(data) < 2 * _ROW_BYTES:
        raise XetFormatError("not a shard")
    position = _ROW_BYTES

    def row() -> bytes:
        nonlocal position
        position += _ROW_BYTES
        if position > len(data):
            raise XetFormatError("the shard ends too early")
        return data[position - _ROW_BYTES : position]

    while not (header := row()).startswith(_BOOKEND):
        flags, count = struct.unpack_from("<II", header, 32)
        terms = []
        for _ in range(count):
            entry = row()
            _, size, start, end = struct.unpack_from("<4I", entry, 32)
            terms.append(Term(xorb=hash_text(entry[:32]), size=size, start=start, end=end))
        if flags & _WITH_VERIFICATION:
            position += count * _ROW_BYTES
        sha256 = hash_text(row()[:32]) if flags & _WITH_METADATA else None
        yield ShardFile(name=hash_text(header[:32]), terms=tuple(terms), sha256=sha256)
