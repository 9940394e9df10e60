"""Bounded reads from a file that nobody vouches for yet.

Files are read with pread, never mapped: a mapping could change under the reader after its tag was checked.
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from hf_wmguard.container.format import LENGTH_BYTES, MAX_HEADER_BYTES, Header, parse_header
from hf_wmguard.errors import EnvironmentFault, FormatError, NotFoundError, UsageError


def open_file(path: Path) -> FileIO:
    """Return a regular file, open for reading.

    Raises:
        NotFoundError: No such file.
        FormatError: Something else of that name.
        EnvironmentFault: No permission.
    """
    try:
        # Not blocking, so that a named pipe in the place of a file cannot hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"no file at {path}", hint="check the path") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot open {path}: {error.strerror}", hint="check its permissions") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is not a regular file", hint="point at a protected .safetensors file")
    return FileIO(descriptor, "rb")


def read_header(file: FileIO, path: Path) -> tuple[Header, int]:
    """Return the well-formed header, and where the data starts in the file, in bytes.

    Raises:
        FormatError: The file is not protected, was cut, or holds more than its header implies.
    """
    file_size_bytes = os.fstat(file.fileno()).st_size
    if file_size_bytes < LENGTH_BYTES:
        raise FormatError(f"{path.name}: {file_size_bytes} bytes are no file of this kind", hint="fetch it again")
    length = memoryview(bytearray(LENGTH_BYTES))
    read_exactly(file, path, length, 0)
    header_bytes = int.from_bytes(length, "little")
    # Before a single byte of it is read or allocated: the length is whatever the file says.
    if header_bytes > min(MAX_HEADER_BYTES, file_size_bytes - LENGTH_BYTES):
        raise FormatError(
            f"{path.name}: header of {header_bytes} bytes in a file of {file_size_bytes}, "
            f"expected at most {MAX_HEADER_BYTES}",
            hint="the file was cut, or is not protected",
        )
    raw = bytearray(LENGTH_BYTES + header_bytes)
    read_exactly(file, path, memoryview(raw), 0)
    try:
        return parse_header(bytes(raw), file_size_bytes=file_size_bytes), len(raw)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error.message}", hint=error.hint) from None


def read_exactly(file: FileIO, path: Path, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from an offset; the file position does not move, so that threads can share the file.

    Raises:
        UsageError: The file is closed.
        FormatError: It ends before the buffer is full.
        EnvironmentFault: The system failed to read it.
    """
    while buffer:
        if file.closed:
            raise closed_error(path)
        try:
            count = os.preadv(file.fileno(), [buffer], offset)
        except (OSError, ValueError) as error:
            # Another thread may have closed it since: then it is not the disk.
            if file.closed or isinstance(error, ValueError):
                raise closed_error(path) from None
            raise EnvironmentFault(f"cannot read {path}: {error.strerror}", hint="check the disk") from error
        if count == 0:
            raise FormatError(f"{path.name}: the file ended early", hint="it was cut; fetch it again")
        buffer, offset = buffer[count:], offset + count


def closed_error(path: Path) -> UsageError:
    """Return what is raised where a file that is closed is read."""
    return UsageError(f"{path.name} is closed", hint="read inside the with block, and close it after the last thread")
