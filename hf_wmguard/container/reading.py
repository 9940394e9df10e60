"""Read tensors from a protected file: one, a range, or all at once. Nothing is handed out that is not authentic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.utils import Buffer

from hf_wmguard.container.format import FileContext, open_header
from hf_wmguard.container.inner import TensorInfo
from hf_wmguard.container.layout import Extent, aligned, lay_out
from hf_wmguard.container.memory import Memory, wipe
from hf_wmguard.container.source import Source, closed_error, open_source, read_header
from hf_wmguard.container.stream import TAG_BYTES
from hf_wmguard.container.suites import cipher_of
from hf_wmguard.container.workers import Queue, share_out, thread_count
from hf_wmguard.errors import AuthenticationError, FormatError, ManifestError, UsageError

_ZEROS = bytes(4096)
Progress = Callable[[str, int], None]


class _Target(NamedTuple):
    """Where the bytes ``start`` to ``start + len(out)`` of a stream go, and the chunks to read for it."""

    extent: Extent
    start: int
    out: memoryview
    chunks: range


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: its stream, and its first byte there."""

    extent: Extent
    start: int


class ProtectedFile:
    """A protected file, open for reading; a context manager.

    The header is authentic once the object exists. Tensors are authenticated as they are read, chunk by
    chunk, and what fails is never handed out. Reading from several threads at once is safe.

    Args:
        file: The file: its path, or where it is open already. It is closed with this object.
        dek: The 32 bytes its save was written with.
        context: What the file must be part of; None takes whatever its authentic header says.
    Raises:
        NotFoundError: No such file.
        FormatError: Not a well-formed protected file.
        ManifestError: A file of another model, save or shard than ``context``.
        AuthenticationError: Another DEK, or a changed header.
        KeyFormatError: The DEK is not 32 bytes.
    """

    def __init__(self, file: Path | Source, *, dek: bytes, context: FileContext | None = None) -> None:
        self._file = open_source(file)
        try:
            header, self._data_start = read_header(self._file)
            # Before the key: "another shard" helps more than "another key". Refusing early trusts nothing.
            _check_context(header.context, context, self.name)
            try:
                keys, self._infos, self._metadata = open_header(header, dek)
            except AuthenticationError as error:
                raise AuthenticationError(f"{self.name}: {error.message}", hint=error.hint) from None
        except BaseException:
            self._file.close()
            raise
        self._context = header.context
        self._chunk_bytes = header.chunk_bytes
        self._extents = lay_out(
            header.sizes,
            self._infos,
            hidden=header.hidden_bytes is not None,
            cipher=cipher_of(header.suite, keys.chunks),
            chunk_bytes=header.chunk_bytes,
        )
        self._places = {
            segment.name: _Place(extent, segment.start) for extent in self._extents for segment in extent.segments
        }

    @property
    def name(self) -> str:
        """The file's name, without its folder."""
        return self._file.name

    @property
    def context(self) -> FileContext:
        """What the file is part of, authenticated."""
        return self._context

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata the file was written with, authenticated; empty where there was none."""
        return dict(self._metadata)

    def names(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return list(self._places)

    def keys(self) -> list[str]:
        """Return the names of the tensors, as `safetensors.safe_open` calls them."""
        return self.names()

    def info(self, name: str) -> TensorInfo:
        """Return what a tensor is in plaintext.

        Raises:
            UsageError: No tensor has this name.
        """
        if name not in self._infos:
            raise UsageError(f"{self.name} has no tensor {name!r}", hint="see names()")
        return self._infos[name]

    def read(self, name: str) -> bytearray:
        """Return the bytes of a tensor; errors as `read_into`."""
        return self.read_range(name, 0, self.info(name).size_bytes)

    def read_range(self, name: str, start_byte: int, stop_byte: int) -> bytearray:
        """Return the bytes ``start_byte`` to ``stop_byte`` of a tensor, reading only their chunks.

        Raises:
            UsageError: The range is not inside the tensor.
        Other errors as `read_into`.
        """
        size_bytes = self.info(name).size_bytes
        if not 0 <= start_byte <= stop_byte <= size_bytes:
            raise UsageError(f"{name}: range {start_byte} to {stop_byte} is not inside {size_bytes} bytes")
        buffer = bytearray(stop_byte - start_byte)
        self._decrypt(name, start_byte, memoryview(buffer))
        return buffer

    def read_rows(self, name: str, start: int, stop: int) -> bytearray:
        """Return the rows ``start`` to ``stop`` of a tensor (of its first dimension), reading only their chunks.

        Raises:
            UsageError: The rows are not inside the tensor, or do not end at whole bytes.
        Other errors as `read_into`.
        """
        info = self.info(name)
        count = info.shape[0] if info.shape else 0
        if not 0 <= start <= stop <= count:
            raise UsageError(f"{name}: rows {start} to {stop} are not inside {count} rows")
        row_bytes, rest = divmod(info.size_bytes, count) if count else (0, 0)
        if rest:
            raise UsageError(f"{name}: a row of {info.dtype} is not a whole number of bytes", hint="read it whole")
        return self.read_range(name, start * row_bytes, stop * row_bytes)

    def read_into(self, name: str, buffer: Buffer) -> None:
        """Decrypt a tensor into memory that the caller owns, such as a huge-page mapping.

        Args:
            name: The tensor.
            buffer: Writable and C-contiguous, exactly the tensor's size in bytes.
        Raises:
            UsageError: No tensor has this name, or the buffer has another size.
            AuthenticationError: The ciphertext was changed. All of the buffer is then zero.
            FormatError: The file was cut after it was opened, or an authentic file's padding is not zero.
            EnvironmentFault: The system failed to read it.
        """
        view = memoryview(buffer)
        if view.nbytes != self.info(name).size_bytes or view.readonly or not view.c_contiguous:
            raise UsageError(
                f"{name}: the buffer is not {self.info(name).size_bytes} writable contiguous bytes",
                hint="allocate info(name).size_bytes bytes",
            )
        self._decrypt(name, 0, view.cast("B") if view.nbytes else memoryview(bytearray()))

    def memory_bytes(self, names: Sequence[str] | None = None) -> int:
        """Return how much memory `read_all` fills: the plaintext, every tensor at a multiple of 64 bytes."""
        if names is not None:
            return sum(aligned(self.info(name).size_bytes) for name in names)
        return sum(aligned(extent.used_bytes) for extent in self._extents)

    def read_all(
        self,
        names: Sequence[str] | None = None,
        *,
        memory: Memory | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, memoryview]:
        """Return the bytes of all tensors by name, decrypted in parallel straight into their final memory.

        Beyond the plaintext there is one chunk of ciphertext for each thread. Every byte that is returned, and without
        ``names`` every byte of the file, is authenticated before anything is returned.

        Args:
            names: Only these tensors, each once, from their own chunks.
            memory: At least `memory_bytes` to decrypt into, such as what the shard before no longer needs; by default
                new memory, which the returned views keep alive.
            threads: At most 64; by default one per processor, at most 8, and one for little data.
            progress: Called with a tensor's name and the bytes just decrypted, from any thread.
        Returns:
            Writable views, uint8 [size_bytes], each at a multiple of 64 bytes, for `torch.frombuffer`.
        Raises:
            UsageError: The memory is too small.
        Other errors as `read_into`; all of the memory that was to be filled is then zero.
        """
        size_bytes = self.memory_bytes(names)
        view = (memory or Memory(size_bytes)).view
        if len(view) < size_bytes:
            raise UsageError(f"memory of {len(view)} bytes, expected {size_bytes}", hint="see memory_bytes()")
        tensors, targets = self._whole(view) if names is None else self._some(names, view)
        workers = thread_count(threads, size_bytes)
        try:
            share_out(_all_chunks(targets), lambda queue: self._work(queue, progress), workers)
        except BaseException:
            # After the last thread has ended, so that none can write behind it.
            wipe(view[:size_bytes])
            raise
        return tensors

    def _whole(self, view: memoryview) -> tuple[dict[str, memoryview], list[_Target]]:
        """Return where all tensors go, and all chunks of the file, those of nothing but padding included."""
        tensors: dict[str, memoryview] = {}
        targets: list[_Target] = []
        start = 0
        for extent in self._extents:
            out = view[start : start + extent.used_bytes]
            targets.append(_Target(extent, 0, out, range(extent.stream.count)))
            tensors |= {segment.name: out[segment.start : segment.stop] for segment in extent.segments}
            start += aligned(extent.used_bytes)
        return tensors, targets

    def _some(self, names: Sequence[str], view: memoryview) -> tuple[dict[str, memoryview], list[_Target]]:
        tensors: dict[str, memoryview] = {}
        start = 0
        for name in names:
            tensors[name] = view[start : start + self.info(name).size_bytes]
            start += aligned(self.info(name).size_bytes)
        if len(tensors) != len(names):
            raise UsageError("a tensor is named twice", hint="name each tensor once")
        return tensors, [self._target(name, 0, out) for name, out in tensors.items()]

    def _target(self, name: str, start_byte: int, out: memoryview) -> _Target:
        place = self._places[name]
        start = place.start + start_byte
        # At least one chunk, so that an empty tensor's only tag is checked as well.
        first = min(start // self._chunk_bytes, place.extent.stream.count - 1)
        last = max(first, (start + len(out) - 1) // self._chunk_bytes)
        return _Target(place.extent, start, out, range(first, last + 1))

    def _work(self, queue: Queue[tuple[_Target, int]], progress: Progress | None) -> None:
        scratch = self._scratch()
        for _, (target, chunk) in queue:
            self._open_chunk(target, chunk, self._read_chunks(target.extent, range(chunk, chunk + 1), scratch))
            if progress is not None:
                start, stop = target.extent.stream.span(chunk)
                start, stop = max(start, target.start), min(stop, target.start + len(target.out))
                for segment in target.extent.between(start, stop):
                    progress(segment.name, min(stop, segment.stop) - max(start, segment.start))

    def _scratch(self) -> memoryview:
        largest = max((extent.stream.size_bytes for extent in self._extents), default=0)
        return memoryview(bytearray(min(self._chunk_bytes, largest) + TAG_BYTES))

    def _decrypt(self, name: str, start_byte: int, out: memoryview) -> None:
        target = self._target(name, start_byte, out)
        sealed_bytes = self._chunk_bytes + TAG_BYTES
        # A file elsewhere is asked for several chunks at a time.
        at_once = max(1, min(self._file.read_bytes // sealed_bytes, len(target.chunks)))
        scratch = self._scratch() if at_once == 1 else memoryview(bytearray(at_once * sealed_bytes))
        try:
            for first in target.chunks[::at_once]:
                chunks = range(first, min(first + at_once, target.chunks.stop))
                sealed = self._read_chunks(target.extent, chunks, scratch)
                for number, chunk in enumerate(chunks):
                    self._open_chunk(target, chunk, sealed[number * sealed_bytes :][:sealed_bytes])
        except BaseException:
            # A failed tag leaves unauthenticated plaintext behind, and half a tensor must not pass for one.
            wipe(out)
            raise

    def _read_chunks(self, extent: Extent, chunks: range, scratch: memoryview) -> memoryview:
        """Return the ciphertext of neighbouring chunks, tags included, read into ``scratch``."""
        stream = extent.stream
        last = chunks[-1]
        start, stop = stream.span(last)
        begin = stream.offset(chunks[0])
        sealed = scratch[: stream.offset(last) + stop - start + TAG_BYTES - begin]
        self._file.read_into(sealed, self._data_start + extent.offset_bytes + begin)
        return sealed

    def _open_chunk(self, target: _Target, chunk: int, sealed: memoryview) -> None:
        """Decrypt what one chunk has of the range that fills ``target.out``."""
        extent, stream = target.extent, target.extent.stream
        start, stop = stream.span(chunk)
        begin, end = max(start, target.start), min(stop, target.start + len(target.out))
        whole = (begin, end) == (start, stop)
        # Whole chunks are decrypted where they belong; of one at an end of the range only a part is wanted.
        plain = target.out[start - target.start :][: stop - start] if whole else memoryview(bytearray(stop - start))
        try:
            stream.open(chunk, sealed, plain)
            self._check_gaps(extent, start, stop, plain)
            if not whole and begin < end:
                target.out[begin - target.start : end - target.start] = plain[begin - start : end - start]
        except InvalidTag:
            if self._file.closed:
                # Its descriptor may be another file's by now: what was read says nothing of this one.
                raise closed_error(self._file) from None
            raise AuthenticationError(
                f"{self.name}: {_named(stream.name)}, chunk {chunk}/{stream.count} is not authentic",
                hint="the file was changed or damaged; fetch it again from a source you trust",
            ) from None
        finally:
            if not whole:
                wipe(plain)

    def _check_gaps(self, extent: Extent, start: int, stop: int, plain: memoryview) -> None:
        """Refuse a chunk with anything but zeros between tensors or behind the last one."""
        for begin, end in extent.gaps(start, stop):
            gap = plain[begin - start : end - start]
            for at in range(0, len(gap), len(_ZEROS)):
                part = gap[at : at + len(_ZEROS)]
                if part != _ZEROS[: len(part)]:
                    raise FormatError(
                        f"{self.name}: the padding is not zero", hint="a faulty program wrote it: save again"
                    )

    def close(self) -> None:
        """Close the file; reading from it is then a UsageError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ProtectedFile({self.name!r})"


def _all_chunks(targets: list[_Target]) -> Iterator[tuple[_Target, int]]:
    for target in targets:
        for chunk in target.chunks:
            yield target, chunk


def _named(name: str) -> str:
    return f"tensor {name!r}" if name else "hidden tensors"


def _check_context(found: FileContext, expected: FileContext | None, name: str) -> None:
    for field in dataclasses.fields(FileContext) if expected is not None else ():
        got, wanted = getattr(found, field.name), getattr(expected, field.name)
        if got != wanted:
            raise ManifestError(
                f"{name}: {field.name} is {got!r}, expected {wanted!r}",
                hint="the file belongs to another model, save or shard; fetch the whole folder again",
            )
