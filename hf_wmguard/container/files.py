"""Protected files on disk: write one from tensors, read tensors from one. Plaintext stays in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.utils import Buffer

from hf_wmguard.atomic import atomic_file
from hf_wmguard.container.format import (
    FileContext,
    Header,
    open_header,
    seal_header,
)
from hf_wmguard.container.inner import TensorInfo
from hf_wmguard.container.source import open_file, read_exactly, read_header
from hf_wmguard.container.stream import DEFAULT_CHUNK_BYTES, TAG_BYTES, ChunkStream, blob_bytes
from hf_wmguard.errors import (
    AuthenticationError,
    FormatError,
    ManifestError,
    UsageError,
)

__all__ = [
    "FileContext",
    "FileRecord",
    "ProtectedFile",
    "TensorData",
    "TensorInfo",
    "inspect_file",
    "is_protected",
    "write_protected",
]

_ZEROS = bytes(DEFAULT_CHUNK_BYTES)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest says about a file: name, size in bytes, SHA-256 of all of it (hex)."""

    name: str
    size_bytes: int
    sha256: str


def write_protected(
    path: Path,
    tensors: Mapping[str, TensorData],
    *,
    dek: bytes,
    context: FileContext,
    metadata: Mapping[str, str] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> FileRecord:
    """Write a protected file whole or not at all, in one pass, and return its record.

    Memory beyond the tensors is one chunk. Each tensor is looked up twice, first for its size and then for
    its bytes, and not held in between: a mapping that makes tensors on demand never holds all of them.

    Args:
        path: The final name; an older file there is replaced at the end.
        tensors: By name.
        dek: 32 random bytes, fresh for every save. The files of one save share it.
        context: What the file is part of.
        metadata: The caller's safetensors metadata; encrypted.
        chunk_bytes: Plaintext bytes per tag, 16 to 16 MiB.
    Raises:
        UsageError: A name or size outside the limits, or a tensor whose size changed between the two looks.
        KeyFormatError: The DEK is not 32 bytes.
        NotFoundError, EnvironmentFault: As `atomic_file`.
    """
    infos = {name: tensors[name].info() for name in tensors}
    header, keys = seal_header(dek, context, infos, metadata or {}, chunk_bytes)
    cipher = AESGCM(keys.chunks)
    digest, size_bytes = hashlib.sha256(), 0
    with atomic_file(path) as file:
        for piece in _pieces(header, cipher, tensors, infos):
            file.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
    return FileRecord(name=path.name, size_bytes=size_bytes, sha256=digest.hexdigest())


def _pieces(
    header: Header, cipher: AESGCM, tensors: Mapping[str, TensorData], infos: Mapping[str, TensorInfo]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file in order; each piece is only good until the next one."""
    yield header.encode()
    # Ciphertext only: this buffer never holds plaintext.
    scratch = memoryview(bytearray(header.chunk_bytes + TAG_BYTES))
    for stream in _streams(header, cipher).values():
        data = tensors[stream.name]
        if data.info() != infos[stream.name]:
            raise UsageError(f"tensor {stream.name} changed while it was saved", hint="save again")
        view = data.view()
        for chunk in range(stream.count):
            start, stop = stream.span(chunk)
            sealed = scratch[: stop - start + TAG_BYTES]
            stream.seal(chunk, view[start:stop], sealed)
            yield sealed


def _streams(header: Header, cipher: AESGCM) -> dict[str, ChunkStream]:
    """Return the chunk stream of every tensor, in the order of the blobs."""
    return {
        name: ChunkStream(cipher=cipher, name=name, index=index, size_bytes=size_bytes, chunk_bytes=header.chunk_bytes)
        for index, (name, size_bytes) in enumerate(header.sizes.items())
    }


class ProtectedFile:
    """A protected file, open for reading; a context manager.

    The header is authentic once the object exists. Tensors are authenticated as they are read, chunk by
    chunk, and what fails is never handed out. Reading from several threads at once is safe.

    Args:
        path: The file.
        dek: The 32 bytes its save was written with.
        context: What the file must be part of; None takes whatever its authentic header says.
    Raises:
        NotFoundError: No such file.
        FormatError: Not a well-formed protected file.
        ManifestError: A file of another model, save or shard than ``context``.
        AuthenticationError: Another DEK, or a changed header.
        KeyFormatError: The DEK is not 32 bytes.
    """

    def __init__(self, path: Path, *, dek: bytes, context: FileContext | None = None) -> None:
        self._path = path
        self._file = open_file(path)
        try:
            header, self._data_start = read_header(self._file, path)
            # Before the key: "another shard" helps more than "another key". Refusing early trusts nothing.
            _check_context(header.context, context, path)
            try:
                keys, self._infos, self._metadata = open_header(header, dek)
            except AuthenticationError as error:
                raise AuthenticationError(f"{path.name}: {error.message}", hint=error.hint) from None
        except BaseException:
            self._file.close()
            raise
        self._context = header.context
        self._streams = _streams(header, AESGCM(keys.chunks))
        self._starts = {}
        offset = self._data_start
        for name, size_bytes in header.sizes.items():
            self._starts[name] = offset
            offset += blob_bytes(size_bytes, header.chunk_bytes)

    @property
    def path(self) -> Path:
        """Where the file was opened."""
        return self._path

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
        return list(self._streams)

    def info(self, name: str) -> TensorInfo:
        """Return what a tensor is in plaintext.

        Raises:
            UsageError: No tensor has this name.
        """
        if name not in self._infos:
            raise UsageError(f"{self._path.name} has no tensor {name!r}", hint="see names()")
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

    def read_into(self, name: str, buffer: Buffer) -> None:
        """Decrypt a tensor into memory that the caller owns, such as a huge-page mapping.

        Args:
            name: The tensor.
            buffer: Writable and C-contiguous, exactly the tensor's size in bytes.
        Raises:
            UsageError: No tensor has this name, or the buffer has another size.
            AuthenticationError: The ciphertext was changed. All of the buffer is then zero.
            FormatError: The file was cut after it was opened.
            EnvironmentFault: The system failed to read it.
        """
        view = memoryview(buffer)
        if view.nbytes != self.info(name).size_bytes or view.readonly or not view.c_contiguous:
            raise UsageError(
                f"{name}: the buffer is not {self.info(name).size_bytes} writable contiguous bytes",
                hint="allocate info(name).size_bytes bytes",
            )
        self._decrypt(name, 0, view.cast("B") if view.nbytes else memoryview(bytearray()))

    def _decrypt(self, name: str, start_byte: int, out: memoryview) -> None:
        stream = self._streams[name]
        stop_byte = start_byte + len(out)
        # At least one chunk, so that an empty tensor's only tag is checked as well.
        first = min(start_byte // stream.chunk_bytes, stream.count - 1)
        last = max(first, (stop_byte - 1) // stream.chunk_bytes)
        scratch = memoryview(bytearray(min(stream.chunk_bytes, stream.size_bytes) + TAG_BYTES))
        try:
            for chunk in range(first, last + 1):
                self._decrypt_chunk(stream, chunk, start_byte, out, scratch)
        except BaseException:
            # A failed tag leaves unauthenticated plaintext behind, and half a tensor must not pass for one.
            _wipe(out)
            raise

    def _decrypt_chunk(
        self, stream: ChunkStream, chunk: int, start_byte: int, out: memoryview, scratch: memoryview
    ) -> None:
        """Decrypt what one chunk has of the range that starts at ``start_byte`` and fills ``out``."""
        start, stop = stream.span(chunk)
        sealed = scratch[: stop - start + TAG_BYTES]
        read_exactly(self._file, self._path, sealed, self._starts[stream.name] + stream.offset(chunk))
        begin, end = max(start, start_byte), min(stop, start_byte + len(out))
        whole = (begin, end) == (start, stop)
        # Whole chunks are decrypted where they belong; of one at an end of the range only a part is wanted.
        plain = out[start - start_byte : stop - start_byte] if whole else memoryview(bytearray(stop - start))
        try:
            stream.open(chunk, sealed, plain)
            if not whole:
                out[begin - start_byte : end - start_byte] = plain[begin - start : end - start]
        except InvalidTag:
            raise AuthenticationError(
                f"{self._path.name}: tensor {stream.name!r}, chunk {chunk}/{stream.count} is not authentic",
                hint="the file was changed or damaged; fetch it again from a source you trust",
            ) from None
        finally:
            if not whole:
                _wipe(plain)

    def close(self) -> None:
        """Close the file; reading from it is then a UsageError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ProtectedFile({str(self._path)!r})"


def inspect_file(path: Path) -> dict[str, object]:
    """Return what a protected file shows without keys; well formed, but **not** authenticated.

    The fields of the public header, ``commitment`` (hex), ``size_bytes`` of the file, and ``tensors``: the
    plaintext size in bytes of every tensor by name. Dtypes and shapes are encrypted.

    Raises:
        NotFoundError: No such file.
        FormatError: Not a well-formed protected file.
    """
    with open_file(path) as file:
        header, _ = read_header(file, path)
        size_bytes = os.fstat(file.fileno()).st_size
    return {
        **header.body(),
        "commitment": header.commitment.hex(),
        "size_bytes": size_bytes,
        "tensors": dict(header.sizes),
    }


def is_protected(path: Path) -> bool:
    """Return whether a file is well formed as a protected file; reads the header alone and needs no key.

    False for a damaged protected file too: what cannot be told from plaintext counts as plaintext.

    Raises:
        NotFoundError: No such file.
    """
    try:
        inspect_file(path)
    except FormatError:
        return False
    return True


def _check_context(found: FileContext, expected: FileContext | None, path: Path) -> None:
    for field in dataclasses.fields(FileContext) if expected is not None else ():
        got, wanted = getattr(found, field.name), getattr(expected, field.name)
        if got != wanted:
            raise ManifestError(
                f"{path.name}: {field.name} is {got!r}, expected {wanted!r}",
                hint="the file belongs to another model, save or shard; fetch the whole folder again",
            )


def _wipe(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
