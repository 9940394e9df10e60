"""Files of a store into a folder, by ranges in several threads; an interrupted fetch goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hf_wmguard.atomic import sync_folder
from hf_wmguard.errors import ConfigError, EnvironmentFault, NotFoundError, StoreError
from hf_wmguard.stores.names import is_safe_name
from hf_wmguard.stores.store import Store, StoredFile

BLOCK_BYTES = 8 << 20
MAX_THREADS = 16
WORK_NAME = ".wmguard-fetch"
"""A folder of this name, in the target, holds what is not finished; it goes when everything is."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SPARE_BYTES = 1 << 20
Progress = Callable[[str, int], None]


@dataclass(kw_only=True, slots=True)
class _Part:
    """A file on its way: its data, and a journal with one byte for each block that is in it."""

    name: str
    stored: StoredFile
    target: Path
    data: Path
    journal: Path
    header: bytes
    lock: threading.Lock = field(default_factory=threading.Lock)
    left: int = 0

    def blocks(self) -> range:
        return range(-(-self.stored.size_bytes // BLOCK_BYTES))

    def missing(self) -> list[int]:
        """Return the blocks that are not there, after making the files ready for them."""
        count = len(self.blocks())
        known = self.journal.read_bytes() if self.journal.is_file() else b""
        there = self.target if self.target.is_file() else self.data
        if (
            len(known) == len(self.header) + count
            and known.startswith(self.header)
            and there.is_file()
            and there.stat().st_size == self.stored.size_bytes
        ):
            done = known[len(self.header) :]
            if there is self.data or all(done):
                return [index for index in self.blocks() if not done[index]]
        self.target.unlink(missing_ok=True)
        self.data.parent.mkdir(parents=True, exist_ok=True)
        # Data first: a journal never speaks of data that is not there.
        self.journal.unlink(missing_ok=True)
        with self.data.open("wb") as file:
            file.truncate(self.stored.size_bytes)
        self.journal.write_bytes(self.header + bytes(count))
        return list(self.blocks())

    def write(self, index: int, view: memoryview) -> None:
        """Put a block in its place, then note that it is there."""
        _write_at(self.data, index * BLOCK_BYTES, view)
        _write_at(self.journal, len(self.header) + index, memoryview(b"\x01"))
        with self.lock:
            self.left -= 1
            last = self.left == 0
        if last:
            self.finish()

    def finish(self) -> None:
        """Give the file its name, once the disk has it."""
        if self.data.is_file():
            descriptor = os.open(self.data, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.data.replace(self.target)


def fetch_all(
    store: Store,
    names: Iterable[str],
    folder: Path,
    progress: Progress | None = None,
    *,
    threads: int = 8,
) -> None:
    """Fetch files of a store into a folder that nobody else writes into.

    If it is interrupted, by kill -9 too, the same call goes on: blocks of the same version that are there are not
    fetched again, unless the machine was restarted in between. What is fetched is as good as the store's word: whoever
    calls checks it against the signed manifest.

    Args:
        store: One version of a folder.
        names: Of its files.
        folder: An existing folder; files of these names in it are replaced.
        progress: Called with a file's name and the bytes that are there, from this thread.
        threads: How many blocks are fetched at once, 1 to 16; each takes 8 MiB of memory.
    Raises:
        NotFoundError: A file is not in the store, or the folder does not exist.
        StoreError: The store refuses, does not answer, has changed, or has a name that leads out of the folder.
        EnvironmentFault: The disk is full, or may not be written.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"{threads} threads to fetch with", hint=f"1 to {MAX_THREADS}")
    if not folder.is_dir():
        raise NotFoundError(f"no folder {folder}", hint="create the folder first")
    with _disk(folder):
        work = folder / WORK_NAME
        parts = [_part(store, name, folder, work) for name in dict.fromkeys(names)]
        # Before a journal is made, whose length is what the store says.
        total, disk = sum(part.stored.size_bytes for part in parts), shutil.disk_usage(folder).total
        if total > disk:
            raise EnvironmentFault(
                f"{total} bytes do not fit on the disk of {folder}, which has {disk}", hint="use a larger disk"
            )
        todo = {part.name: part.missing() for part in parts}
        check_room(folder, sum(_bytes_of(part, todo[part.name]) for part in parts))
        for part in parts:
            part.left = len(todo[part.name])
            if not part.left:
                part.finish()
                if progress is not None and part.stored.size_bytes:
                    progress(part.name, part.stored.size_bytes)
            elif progress is not None and (there := _bytes_of(part, set(part.blocks()) - set(todo[part.name]))):
                progress(part.name, there)
        _fetch(store, [(part, index) for part in parts for index in todo[part.name]], threads, progress)
        for parent in {part.target.parent for part in parts}:
            sync_folder(parent)
        shutil.rmtree(work, ignore_errors=True)


def _part(store: Store, name: str, folder: Path, work: Path) -> _Part:
    stored = store.files().get(name)
    if stored is None:
        raise NotFoundError(f"{store.location} has no file {name}", hint="check the address")
    if not is_safe_name(name) or name.split("/")[0] == WORK_NAME:
        raise StoreError(
            f"{store.location} has a file whose name leads elsewhere: {name[:100]!a}", hint="do not use this source"
        )
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else os.urandom(16).hex()
    # After a power cut the disk may know of a block from the journal alone: then everything is fetched again.
    header = f"{stored.sha256 or stored.tag} {stored.size_bytes} {BLOCK_BYTES} {boot}\n".encode()
    label = hashlib.sha256(name.encode()).hexdigest()[:32]
    return _Part(
        name=name,
        stored=stored,
        target=folder / name,
        data=work / f"{label}.data",
        journal=work / f"{label}.journal",
        header=header,
    )


def check_room(folder: Path, needed: int) -> None:
    """Check that so many bytes fit into a folder.

    Raises:
        EnvironmentFault: They do not.
    """
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise EnvironmentFault(
            f"{folder} has room for {free} bytes, {needed} are missing", hint="make room on the disk, then go on"
        )


def _bytes_of(part: _Part, blocks: Iterable[int]) -> int:
    return sum(min(BLOCK_BYTES, part.stored.size_bytes - index * BLOCK_BYTES) for index in blocks)


def _fetch(store: Store, jobs: list[tuple[_Part, int]], threads: int, progress: Progress | None) -> None:
    own = threading.local()

    def fetch(part: _Part, index: int) -> tuple[str, int]:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(BLOCK_BYTES)
        view = memoryview(own.buffer)[: _bytes_of(part, [index])]
        store.read_into(part.name, index * BLOCK_BYTES, view)
        part.write(index, view)
        return part.name, len(view)

    with ThreadPoolExecutor(threads, thread_name_prefix="wmguard-fetch") as pool:
        waiting: set[Future[tuple[str, int]]] = set()
        following = iter(jobs)
        try:
            while True:
                while len(waiting) < 2 * threads and (job := next(following, None)) is not None:
                    waiting.add(pool.submit(fetch, *job))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for task in done:
                    name, size_bytes = task.result()
                    if progress is not None:
                        progress(name, size_bytes)
        finally:
            for task in waiting:
                task.cancel()


def _write_at(path: Path, offset: int, view: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(descriptor)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write into {folder}: {error.strerror or error}",
            hint="check free space and permissions; what is there is kept for the next try",
        ) from error
