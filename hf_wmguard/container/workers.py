"""Threads that share one queue of work. The ciphers, the hash and the system calls release the interpreter lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from hf_wmguard.errors import UsageError

T = TypeVar("T")
MAX_THREADS = 64
_DEFAULT_THREADS = 8
# With less to do, starting a thread takes longer than it saves.
_BYTES_PER_THREAD = 4 * 1024 * 1024


def thread_count(threads: int | None, size_bytes: int) -> int:
    """Return how many threads to use for so many bytes: what was asked for, or what is worth starting.

    That is one per processor that this process may use, at most 8, and at most one for each 4 MiB.

    Raises:
        UsageError: Less than 1 or more than ``MAX_THREADS``.
    """
    if threads is None:
        return max(1, min(_DEFAULT_THREADS, _processors(), size_bytes // _BYTES_PER_THREAD))
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads", hint=f"choose 1 to {MAX_THREADS}")
    return threads


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Queue(Generic[T]):
    """Numbered items, handed out in order and one by one to whoever asks; stops where a worker fails."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = enumerate(items)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._turns = threading.Condition()
        self._turn = 0

    def __iter__(self) -> Iterator[tuple[int, T]]:
        while not self._stopped.is_set():
            with self._lock:
                found = next(self._items, None)
            if found is None:
                return
            yield found

    def in_order(self, number: int, action: Callable[[], object]) -> None:
        """Run something for item ``number`` after it ran for all items before; not at all once a worker failed."""
        with self._turns:
            self._turns.wait_for(lambda: self._turn == number or self._stopped.is_set())
        if self._stopped.is_set():
            return
        action()
        with self._turns:
            self._turn = number + 1
            self._turns.notify_all()

    def stop(self) -> None:
        """Hand out nothing more, and let nobody wait for a turn that never comes."""
        self._stopped.set()
        with self._turns:
            self._turns.notify_all()


def share_out(items: Iterator[T], work: Callable[[Queue[T]], None], threads: int) -> None:
    """Run ``work`` in several threads on one queue of items, and raise the first error once all have ended.

    Args:
        items: Made under a lock, in order, by whichever thread is free.
        work: Iterates over the queue until it is empty; called once in every thread.
        threads: With 1 everything runs in the calling thread.
    """
    queue = Queue(items)

    def guarded() -> None:
        try:
            work(queue)
        except BaseException:
            queue.stop()
            raise

    if threads == 1:
        guarded()
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="wmguard") as pool:
        futures = [pool.submit(guarded) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            # Ctrl-C reaches this thread alone: the others have to be told.
            queue.stop()
            raise
