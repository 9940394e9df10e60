"""Bounded reads from a file that nobody vouches for yet, wherever it is kept.

Files are read with pread, never mapped: a mapping could change under the reader after its tag was checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol, Self

from hf_wmguard.container.format import LENGTH_BYTES, MAX_HEADER_BYTES, Header, parse_header
from hf_wmguard.errors import EnvironmentFault, FormatError, NotFoundError, UsageError


class Source(Protocol):
    """A file that is open for reading, on this machine or elsewhere. Several threads may read at once."""

    @property
    def name(self) -> str:
        """Its name, without a folder."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def closed(self) -> bool:
        """Whether it can be read no more."""

    @property
    def read_bytes(self) -> int:
        """As many bytes are well read at a time: many where each read is a question to a server."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset.

        Raises:
            UsageError: The file is closed.
            FormatError: It ends before the buffer is full.
            EnvironmentFault: It cannot be read.
        """

    def close(self) -> None:
        """Close it."""


class LocalFile:
    """A regular file of this machine, as a `Source`; a context manager.

    Args:
        path: The file.
    Raises:
        NotFoundError: No such file.
        FormatError: Something else of that name.
        EnvironmentFault: No permission.
    """

    read_bytes = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        try:
            # Not blocking, so that a named pipe in the place of a file cannot hang the reader.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFoundError(f"no file at {path}", hint="check the path") from None
        except OSError as error:
            raise EnvironmentFault(f"cannot open {path}: {error.strerror}", hint="check its permissions") from None
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise FormatError(f"{path} is not a regular file", hint="point at a file, not at a folder or a device")

    @property
    def name(self) -> str:
        """Its name, without a folder."""
        return self.path.name

    @property
    def size_bytes(self) -> int:
        """Its size now."""
        return os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset; errors as `Source.read_into`."""
        while buffer:
            if self.closed:
                raise closed_error(self)
            try:
                count = os.preadv(self._descriptor, [buffer], offset)
            except OSError as error:
                # Another thread may have closed it since: then it is not the disk.
                if self.closed:
                    raise closed_error(self) from None
                raise EnvironmentFault(f"cannot read {self.path}: {error.strerror}", hint="check the disk") from error
            if self.closed:
                # Its descriptor may have been another file's by then.
                raise closed_error(self)
            if count == 0:
                raise FormatError(f"{self.name}: the file ended early", hint="it was cut; fetch it again")
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        """Close it; reading is then a UsageError."""
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True) and hasattr(self, "_descriptor"):
            self.close()

    def __repr__(self) -> str:
        return f"LocalFile({str(self.path)!r})"


def open_source(file: Path | Source) -> Source:
    """Return a file, open for reading: one that is open already as it is; errors as `LocalFile`."""
    return LocalFile(file) if isinstance(file, Path) else file


def read_header(source: Source) -> tuple[Header, int]:
    """Return the well-formed header, and where the data starts in the file, in bytes.

    Raises:
        FormatError: The file is not protected, was cut, or holds more than its header implies.
    """
    file_size_bytes = source.size_bytes
    if file_size_bytes < LENGTH_BYTES:
        raise FormatError(f"{source.name}: {file_size_bytes} bytes are no file of this kind", hint="fetch it again")
    length = memoryview(bytearray(LENGTH_BYTES))
    source.read_into(length, 0)
    header_bytes = int.from_bytes(length, "little")
    # Before a single byte of it is read or allocated: the length is whatever the file says.
    if header_bytes > min(MAX_HEADER_BYTES, file_size_bytes - LENGTH_BYTES):
        raise FormatError(
            f"{source.name}: header of {header_bytes} bytes in a file of {file_size_bytes}, "
            f"expected at most {MAX_HEADER_BYTES}",
            hint="the file was cut, or is not protected",
        )
    raw = bytearray(LENGTH_BYTES + header_bytes)
    source.read_into(memoryview(raw), 0)
    try:
        return parse_header(bytes(raw), file_size_bytes=file_size_bytes), len(raw)
    except FormatError as error:
        raise FormatError(f"{source.name}: {error.message}", hint=error.hint) from None


def closed_error(source: Source) -> UsageError:
    """Return what is raised where a file that is closed is read."""
    return UsageError(f"{source.name} is closed", hint="read inside the with block, and close it after the last thread")
