"""Folders that appear whole or not at all, and locks on folders.

A lock is flock(2) on the folder itself: nothing has to be created or cleaned up for it, and the system takes it back
when its process dies. So a staging folder that nobody holds is one whose process is gone, and can be cleared away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_wmguard.atomic import sync_folder
from hf_wmguard.errors import EnvironmentFault, NotFoundError, UsageError

_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one holder at a time into a folder; the others wait.

    Raises:
        NotFoundError: There is no such folder.
        EnvironmentFault: It cannot be locked.
    """
    try:
        descriptor = _open(folder)
    except OSError as error:
        raise NotFoundError(f"no folder {folder}: {error.strerror}", hint="give a local folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        os.close(descriptor)
        raise EnvironmentFault(f"cannot lock {folder}: {error.strerror}", hint="use another file system") from error
    try:
        yield
    finally:
        _release(descriptor)


@contextmanager
def staging_folder(parent: Path, prefix: str, *, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new folder of this run's own, which is gone at the end unless it was moved away.

    Before, those that processes have left behind that were killed are cleared away; those of other runs are not.

    Args:
        parent: Where it is made.
        prefix: How its name begins, and the names of all others of this kind.
        mode: Of the folder, less what the umask takes.
    """
    for other in parent.glob(f"{prefix}*"):
        _clear_abandoned(other)
    path, descriptor = _new_held(parent, prefix, mode)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _release(descriptor)


@contextmanager
def new_folder(out: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Path]:
    """Yield a staging folder that takes its place at ``out`` when the block ends without an exception.

    Args:
        out: A folder that does not exist yet, or is empty, as `check_new_folder` finds it.
        prefix: How the name of the staging folder beside it begins.
        mode: Of the folder, less what the umask takes.
    Raises:
        UsageError: Somebody else has put something there in the meantime.
        EnvironmentFault: An OSError in the block, or the folder cannot be moved.
    """
    parent = out.absolute().parent
    try:
        with staging_folder(parent, prefix, mode=mode) as staging:
            yield staging
            # An empty folder there gives way, and nothing else does: of two runs at once one wins.
            staging.replace(out)
            sync_folder(parent)
    except OSError as error:
        if error.errno in _NOT_EMPTY:
            raise _not_empty(out) from None
        raise EnvironmentFault(
            f"cannot write {out}: {error.strerror or error}", hint="check free space and permissions"
        ) from error


@contextmanager
def resumable_folder(out: Path, name: str) -> Iterator[Path]:
    """Yield a hidden folder that takes its place at ``out`` when the block ends without an exception.

    After one, or if the process is killed, it stays, and the next run with the same name goes on with what is in it.

    Args:
        out: A folder that does not exist yet, or is empty, as `check_new_folder` finds it.
        name: Of the folder beside it; the same for the same contents.
    Raises:
        UsageError: Another run is at it, or somebody has put something at ``out`` in the meantime.
        EnvironmentFault: An OSError in the block, or the folder cannot be moved.
    """
    parent = out.absolute().parent
    path = parent / name
    try:
        path.mkdir(exist_ok=True)
        descriptor = _open(path)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror}", hint="check its permissions") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UsageError(f"another run is writing {path}", hint="wait for it, or stop it") from None
    try:
        yield path
        path.replace(out)
        sync_folder(parent)
    except OSError as error:
        if error.errno in _NOT_EMPTY:
            raise _not_empty(out) from None
        raise EnvironmentFault(
            f"cannot write {path}: {error.strerror or error}",
            hint="check free space and permissions, and run it again: it goes on where it was",
        ) from error
    finally:
        _release(descriptor)


def check_new_folder(source: Path | None, out: Path) -> None:
    """Check that what is made of one folder may become another.

    Args:
        source: The one, None where it is none of this machine.
        out: The other.
    Raises:
        NotFoundError: The source, or the folder to write into, does not exist.
        UsageError: The output is a link, holds something, or lies inside the source.
        EnvironmentFault: One of them cannot be looked at.
    """
    try:
        if source is not None and not source.is_dir():
            raise NotFoundError(f"no folder {source}", hint="give the folder of a model, as save_pretrained writes it")
        if out.is_symlink():
            raise UsageError(f"{out} is a symbolic link", hint="choose a new folder")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise _not_empty(out)
        if source is not None and out.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{out} lies inside {source}", hint="choose another folder")
        if not out.absolute().parent.is_dir():
            raise NotFoundError(f"no folder {out.absolute().parent}", hint="create it first")
    except OSError as error:
        raise EnvironmentFault(
            f"cannot look at {error.filename or out}: {error.strerror}", hint="check the paths and their permissions"
        ) from None


def _not_empty(out: Path) -> UsageError:
    return UsageError(f"{out} is not empty and is not overwritten", hint="choose a new folder")


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _release(descriptor: int) -> None:
    # Not by closing it alone: a process that was forked meanwhile has the same lock, and would keep it.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _new_held(parent: Path, prefix: str, mode: int) -> tuple[Path, int]:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir(mode=mode)
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody may have taken it for abandoned before it was held.
        if path.is_dir():
            return path, descriptor
        os.close(descriptor)


def _clear_abandoned(path: Path) -> None:
    try:
        descriptor = _open(path)
    except OSError:
        # Gone by now, or no folder.
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return
    shutil.rmtree(path, ignore_errors=True)
    _release(descriptor)
