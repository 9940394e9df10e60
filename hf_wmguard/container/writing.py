"""Write a protected file from tensors: in parallel, in one pass, whole or not at all. Only ciphertext is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from cryptography.utils import Buffer

from hf_wmguard.atomic import atomic_file
from hf_wmguard.container.format import FileContext, Header, seal_header
from hf_wmguard.container.inner import TensorInfo
from hf_wmguard.container.layout import Extent, lay_out
from hf_wmguard.container.memory import wipe
from hf_wmguard.container.stream import DEFAULT_CHUNK_BYTES, TAG_BYTES
from hf_wmguard.container.suites import cipher_of, default_suite
from hf_wmguard.container.workers import Queue, share_out, thread_count
from hf_wmguard.errors import UsageError

_WRITEBACK_BYTES = 32 * 1024 * 1024


class TensorSource(Protocol):
    """A tensor whose bytes can be had piece by piece, by several threads at once."""

    def info(self) -> TensorInfo:
        """Return what the tensor is, without its bytes."""

    def part(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        """Return the bytes ``start`` to ``stop``: where they lie, or read into the beginning of ``scratch``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorData:
    """A tensor as bytes.

    Attributes:
        dtype: safetensors spelling ("F32", "BF16").
        shape: Sizes of the dimensions; () for a scalar.
        data: Its bytes, C-contiguous, little-endian.
    Raises:
        UsageError: Not contiguous, or dtype, shape and size do not fit together.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Buffer = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if not memoryview(self.data).c_contiguous:
            raise UsageError("the tensor's bytes are not contiguous", hint="make it contiguous first")
        self.info()

    def info(self) -> TensorInfo:
        """Return what the tensor is, without its bytes."""
        return TensorInfo(dtype=self.dtype, shape=self.shape, size_bytes=memoryview(self.data).nbytes)

    def view(self) -> memoryview:
        """Return the bytes, uint8 [size_bytes], not copied."""
        view = memoryview(self.data)
        # A view with a zero in its shape cannot be cast.
        return view.cast("B") if view.nbytes else memoryview(b"")

    def part(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        """Return the bytes ``start`` to ``stop``, not copied."""
        return self.view()[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest says about a file: name, size in bytes, SHA-256 of all of it (hex; empty if not asked for)."""

    name: str
    size_bytes: int
    sha256: str


class _Piece(NamedTuple):
    """One chunk to write: whose it is, its number, and what it is made of: where in it, and which bytes of what."""

    extent: Extent
    chunk: int
    parts: list[tuple[int, TensorSource, int, int]]


def write_protected(
    path: Path,
    tensors: Mapping[str, TensorSource],
    *,
    dek: bytes,
    context: FileContext,
    metadata: Mapping[str, str] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    suite: str | None = None,
    hide_names: bool = False,
    threads: int | None = None,
    digest: bool = True,
    progress: Callable[[str, int], None] | None = None,
    salt: bytes | None = None,
) -> FileRecord:
    """Write a protected file whole or not at all, in one pass, and return its record.

    Memory beyond the tensors is one chunk of ciphertext for each thread, and one of plaintext where tensors come
    from files or names are hidden. Each tensor is looked up twice, first for its size and then for its bytes, and not
    held after its last chunk: a mapping that makes tensors on demand never holds all of them.

    Args:
        path: The final name; an older file there is replaced at the end.
        tensors: By name.
        dek: 32 random bytes, fresh for every save. The files of one save share it.
        context: What the file is part of.
        metadata: The caller's safetensors metadata; encrypted.
        chunk_bytes: Plaintext bytes per tag, 16 to 16 MiB.
        suite: One of `suites.SUITES`; by default what suits the processor.
        hide_names: Hide names, number and sizes of the tensors; all that shows is about how much they are together.
        threads: At most 64; by default one per processor, at most 8, and one for little data.
        digest: Whether to compute the SHA-256 of the file, which a manifest needs. It goes through the file in
            order: with many threads it is what takes longest.
        progress: Called with the file's name and the plaintext bytes just written, from any thread.
        salt: Only for test vectors.
    Raises:
        UsageError: A name or size outside the limits, or a tensor whose size changed between the two looks.
        KeyFormatError: The DEK is not 32 bytes.
        NotFoundError, EnvironmentFault: As `atomic_file`.
    """
    infos = {name: tensors[name].info() for name in tensors}
    workers = thread_count(threads, sum(info.size_bytes for info in infos.values()))
    header, keys = seal_header(
        dek,
        context,
        infos,
        metadata or {},
        suite=suite or default_suite(),
        chunk_bytes=chunk_bytes,
        hidden=hide_names,
        salt=salt,
    )
    cipher = cipher_of(header.suite, keys.chunks)
    extents = lay_out(header.sizes, infos, hidden=hide_names, cipher=cipher, chunk_bytes=chunk_bytes)
    start = header.encode()
    sha256 = hashlib.sha256(start) if digest else None
    size_bytes = len(start) + header.data_bytes()
    with atomic_file(path) as file:
        descriptor = file.fileno()
        _write_at(descriptor, memoryview(start), 0)

        def work(queue: Queue[_Piece]) -> None:
            # Ciphertext only: of plaintext this thread holds no more than `plain`.
            sealed, plain = memoryview(bytearray(_largest(header, extents) + TAG_BYTES)), _Scratch(chunk_bytes)
            try:
                for number, piece in queue:
                    out = _seal(piece, sealed, plain)
                    offset = len(start) + piece.extent.offset_bytes + piece.extent.stream.offset(piece.chunk)
                    _write_at(descriptor, out, offset)
                    _start_writeback(descriptor, offset, offset + len(out))
                    if sha256 is not None:
                        # While the chunk is still in this core's cache.
                        queue.in_order(number, lambda out=out: sha256.update(out))  # type: ignore[misc]
                    if progress is not None:
                        progress(path.name, len(out) - TAG_BYTES)
            finally:
                plain.wipe()

        share_out(_pieces(extents, tensors, infos), work, workers)
    return FileRecord(name=path.name, size_bytes=size_bytes, sha256=sha256.hexdigest() if sha256 else "")


def _largest(header: Header, extents: tuple[Extent, ...]) -> int:
    return min(header.chunk_bytes, max((extent.stream.size_bytes for extent in extents), default=0))


class _Scratch:
    """A buffer for plaintext that is made when it is first needed."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._view = memoryview(b"")

    def view(self) -> memoryview:
        if not self._view:
            self._view = memoryview(bytearray(self._size_bytes))
        return self._view

    def wipe(self) -> None:
        if self._view:
            wipe(self._view)


def _pieces(
    extents: tuple[Extent, ...], tensors: Mapping[str, TensorSource], infos: Mapping[str, TensorInfo]
) -> Iterator[_Piece]:
    """Yield all chunks in the order of the file; a tensor is looked up when its first byte is due."""
    for extent in extents:
        held: dict[str, TensorSource] = {}
        for chunk in range(extent.stream.count):
            start, stop = extent.stream.span(chunk)
            parts = []
            for segment in extent.between(start, stop):
                if segment.name not in held:
                    held[segment.name] = _look_up(segment.name, tensors, infos)
                begin, end = max(start, segment.start), min(stop, segment.stop)
                parts.append((begin - start, held[segment.name], begin - segment.start, end - segment.start))
                if end == segment.stop:
                    del held[segment.name]
            yield _Piece(extent, chunk, parts)


def _look_up(name: str, tensors: Mapping[str, TensorSource], infos: Mapping[str, TensorInfo]) -> TensorSource:
    tensor = tensors[name]
    if tensor.info() != infos[name]:
        raise UsageError(f"tensor {name} changed while it was saved", hint="save again")
    return tensor


def _seal(piece: _Piece, sealed: memoryview, plain: _Scratch) -> memoryview:
    """Return the ciphertext of a chunk, in ``sealed``."""
    stream = piece.extent.stream
    start, stop = stream.span(piece.chunk)
    out = sealed[: stop - start + TAG_BYTES]
    if len(piece.parts) == 1 and piece.parts[0][3] - piece.parts[0][2] == stop - start:
        _, tensor, begin, end = piece.parts[0]
        source = tensor.part(begin, end, memoryview(b"") if isinstance(tensor, TensorData) else plain.view())
    elif start == stop:
        source = memoryview(b"")
    else:
        source = _gather(piece, plain.view()[: stop - start])
    stream.seal(piece.chunk, source, out)
    return out


def _gather(piece: _Piece, chunk: memoryview) -> memoryview:
    """Put the pieces of several tensors together, with zeros between them."""
    # All of it: what stays of the chunk before would end up in this one's padding.
    wipe(chunk)
    for at, tensor, begin, end in piece.parts:
        place = chunk[at : at + end - begin]
        # Onto itself where the tensor was read into its place; the same bytes either way.
        place[:] = tensor.part(begin, end, place)
    return chunk


def _start_writeback(descriptor: int, start: int, stop: int) -> None:
    """Let the disk begin once every ``_WRITEBACK_BYTES``, so that the sync at the end has little left to wait for."""
    border = stop // _WRITEBACK_BYTES * _WRITEBACK_BYTES
    if start < border <= stop and hasattr(os, "posix_fadvise"):
        # Linux starts to write dirty pages of this range and returns; what it may drop, clean pages, there are none of.
        os.posix_fadvise(descriptor, border - _WRITEBACK_BYTES, _WRITEBACK_BYTES, os.POSIX_FADV_DONTNEED)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
