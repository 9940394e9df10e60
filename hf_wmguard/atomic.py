"""Files that appear whole or not at all.

A reader never sees half a file under its final name, and the old file stays until the new one is on the disk.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hf_wmguard.errors import EnvironmentFault, NotFoundError

_DESCRIPTORS = Path("/proc/self/fd")
_PREFIX, _SUFFIX = ".wmguard-", ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes its place at ``path`` when the block ends without an exception.

    The new file has the mode that the umask gives any new file, whatever stood there before. On any
    exception, KeyboardInterrupt included, what was written is gone and the old file is as it was.

    Where the file system can (Linux: ext4, xfs, btrfs, tmpfs), the data has no name until it is complete, so
    that a process killed while writing leaves nothing behind either, unless it is in the instant between its two names.
    Then, and elsewhere, SIGKILL may leave one ``.wmguard-*.tmp`` beside the target; see `clear_temporary`.

    Args:
        path: The final name. A symbolic link there is replaced, not followed.
    Raises:
        NotFoundError: The folder does not exist.
        EnvironmentFault: The system refused to write (disk full, no permission, a folder in the way).
    """
    # Same folder: a rename is atomic only inside one file system. Not made from the target's name, which may
    # already be as long as a name can be.
    temporary = path.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    try:
        descriptor, named = _create(temporary)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            if not named:
                _give_name(descriptor, temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(
            f"cannot write {path}: {error.strerror or error}", hint="check free space and permissions"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all; errors as `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def clear_temporary(folder: Path) -> None:
    """Delete what killed processes have left of `atomic_file` in a folder that nobody else writes into now."""
    for left in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        if left.is_file():
            left.unlink(missing_ok=True)


def _create(temporary: Path) -> tuple[int, bool]:
    """Return a new writable descriptor, and whether it already has its temporary name."""
    if not temporary.parent.is_dir():
        raise NotFoundError(f"no folder {temporary.parent}", hint="create the folder first")
    unnamed = getattr(os, "O_TMPFILE", 0)
    if unnamed and _DESCRIPTORS.is_dir():
        try:
            return os.open(temporary.parent, unnamed | os.O_WRONLY | os.O_CLOEXEC, 0o666), False
        except OSError:
            # This file system has no unnamed files; a real fault (no permission) shows again just below.
            pass
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True


def _give_name(descriptor: int, temporary: Path) -> None:
    # linkat() cannot replace a file, hence a temporary name first. os.link follows the link in /proc only if
    # it is given a folder descriptor; without one Python calls link(), which does not follow it on Linux.
    folder = os.open(temporary.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(_DESCRIPTORS / str(descriptor), temporary.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without this a power cut can undo a rename whose data is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
