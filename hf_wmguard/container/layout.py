"""Where the tensors of a file lie: one stream each, or all of them hidden in one. Arithmetic only, no I/O.

*Named*: every tensor is a stream of its own under its own name; its size shows.

*Hidden*: one stream without a name holds all tensors, in the order of their names, each at a multiple of
``ALIGNMENT_BYTES``, then zeros up to the padded size. What shows is one number: the padded size of all together.
The safetensors table is left empty, so that the data belongs to no tensor: every safetensors reader refuses
such a file. Opaque names in the table would be worse than useless: transformers takes a file of unknown names,
initialises every weight at random, and only reports it.

Gaps and padding are authenticated like all plaintext, and must be zero: they carry nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hf_wmguard.container.inner import TensorInfo
from hf_wmguard.container.stream import ChunkStream, blob_bytes
from hf_wmguard.container.suites import Cipher
from hf_wmguard.errors import UsageError

ALIGNMENT_BYTES = 64
MIN_HIDDEN_BYTES = 4096
MAX_HIDDEN_BYTES = 1 << 50


def padme(size_bytes: int) -> int:
    """Return a size rounded up so that it shows about log2(log2(size)) bits; at most 12% more.

    Source: Nikitin, Barman, Lueks, Underwood, Hubaux & Ford 2019, "Reducing Metadata Leakage from Encrypted Files
    and Communication with PURBs", sec. 4 (Padmé).
    """
    if size_bytes < 2:
        return size_bytes
    exponent = size_bytes.bit_length() - 1
    unit = 1 << (exponent - exponent.bit_length())
    return -(-size_bytes // unit) * unit


def aligned(size_bytes: int) -> int:
    """Return a size rounded up to a multiple of ``ALIGNMENT_BYTES``."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def hidden_starts(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, int], int]:
    """Return where every tensor starts in the hidden stream, and the padded size of the stream, in bytes.

    Raises:
        UsageError: More than ``MAX_HIDDEN_BYTES`` together.
    """
    starts, stop = {}, 0
    for name in sorted(tensors):
        starts[name] = aligned(stop)
        stop = starts[name] + tensors[name].size_bytes
    total = padme(max(stop, MIN_HIDDEN_BYTES))
    if total > MAX_HIDDEN_BYTES:
        raise UsageError(f"{total} bytes of tensors in one file", hint="write more, smaller files")
    return starts, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes of a stream that belong to one tensor.

    Attributes:
        name: The tensor's name.
        start: First byte in the stream.
        stop: The byte after the last one.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One stream in a file.

    Attributes:
        stream: Its chunks.
        offset_bytes: Where its first chunk lies in the file's data.
        segments: Its tensors, in order, without overlap.
    """

    stream: ChunkStream
    offset_bytes: int
    segments: tuple[Segment, ...]

    @property
    def used_bytes(self) -> int:
        """Where the last tensor ends in the stream; behind it there are only zeros."""
        return self.segments[-1].stop if self.segments else 0

    def between(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield the segments that have bytes in a range of the stream."""
        first = bisect_left(self.segments, start + 1, key=lambda segment: segment.stop)
        for segment in self.segments[first:]:
            if segment.start >= stop:
                return
            if segment.start < segment.stop:
                yield segment

    def gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range of the stream that belong to no tensor."""
        at = start
        for segment in self.between(start, stop):
            if segment.start > at:
                yield at, segment.start
            at = segment.stop
        if at < stop:
            yield at, stop


def lay_out(
    sizes: Mapping[str, int], tensors: Mapping[str, TensorInfo], *, hidden: bool, cipher: Cipher, chunk_bytes: int
) -> tuple[Extent, ...]:
    """Return the streams of a file in the order of their data.

    Args:
        sizes: Of a named file: size of every tensor in bytes, in the order of the blobs.
        tensors: The true tensors.
        hidden: Whether all of them lie in one stream.
        cipher: Under the file's chunk key.
        chunk_bytes: Plaintext bytes of a chunk.
    """
    if hidden:
        starts, total = hidden_starts(tensors)
        # No tensor can have the empty name, so that this stream is taken for none.
        stream = ChunkStream(cipher=cipher, name="", index=0, size_bytes=total, chunk_bytes=chunk_bytes)
        segments = tuple(
            Segment(name=name, start=start, stop=start + tensors[name].size_bytes) for name, start in starts.items()
        )
        return (Extent(stream=stream, offset_bytes=0, segments=segments),)
    extents, offset = [], 0
    for index, (name, size_bytes) in enumerate(sizes.items()):
        stream = ChunkStream(cipher=cipher, name=name, index=index, size_bytes=size_bytes, chunk_bytes=chunk_bytes)
        segment = Segment(name=name, start=0, stop=size_bytes)
        extents.append(Extent(stream=stream, offset_bytes=offset, segments=(segment,)))
        offset += blob_bytes(size_bytes, chunk_bytes)
    return tuple(extents)
