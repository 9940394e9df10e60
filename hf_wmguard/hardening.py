"""No core dumps while keys are in memory, where the platform allows.

A core dump is the whole memory of a process, keys and weights included, on a disk or with a crash reporter. Two
switches of Linux stand against it, and they cost differently:

- RLIMIT_CORE at 1 byte: no core file is written, and since 1 is the kernel's mark for a crashed crash handler,
  none is piped to one either (0 would still be piped; fs/coredump.c). Nothing else changes. Children inherit it.
- PR_SET_DUMPABLE at 0: the kernel dumps nothing, and no other process of the same user can attach or read the
  memory: no debugger, no profiler such as py-spy, no copy between ranks by process_vm_readv. Training needs
  these; a command of ours does not.

So a library call switches the first off for as long as it holds keys and puts it back, and the command line, which
is its own process, switches both off to its end. ``WMGUARD_CORE_DUMPS=1`` leaves everything as it is.

Source: core(5), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

try:
    import resource
except ImportError:  # Windows has no such limits, and writes no cores.
    resource = None  # type: ignore[assignment]

OPT_OUT_VARIABLE = "WMGUARD_CORE_DUMPS"
_PR_SET_DUMPABLE = 4
_NO_CORE_BYTES = 1


@dataclass(slots=True)
class _Holders:
    """How many blocks hold keys, and the limit from before the first."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0
    before: tuple[int, int] | None = None


_holders = _Holders()


@contextmanager
def no_core_dumps() -> Iterator[None]:
    """Keep this process from writing core dumps while the block runs; then put the limit back.

    Blocks nest, also across threads: the last one puts it back. Where the limit was changed by somebody else in
    between, or cannot be set, it is left alone.
    """
    hold()
    try:
        yield
    finally:
        release()


def hold() -> None:
    """Switch core dumps off until `release` was called as often; for what does not fit a ``with`` block."""
    with _holders.lock:
        _holders.count += 1
        if _holders.count == 1:
            _holders.before = _limit_core()


def release() -> None:
    """End one `hold`."""
    with _holders.lock:
        _holders.count = max(0, _holders.count - 1)
        before = _holders.before
        if _holders.count == 0 and before is not None:
            _holders.before = None
            soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
            if soft == min(_NO_CORE_BYTES, _as_number(hard)):
                resource.setrlimit(resource.RLIMIT_CORE, (before[0], hard))


def switch_off_core_dumps() -> None:
    """Switch core dumps and attaching off to the end of this process: for a command, not for a library."""
    if _opted_out():
        return
    _limit_core()
    if sys.platform == "linux":
        # Fails only on an argument that the kernel does not know; the limit above stands.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _limit_core() -> tuple[int, int] | None:
    """Return the limits from before, or None where nothing was changed."""
    if resource is None or _opted_out():
        return None
    before = resource.getrlimit(resource.RLIMIT_CORE)
    soft = min(_NO_CORE_BYTES, _as_number(before[1]))
    if before[0] == soft:
        return None
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, before[1]))
    except (OSError, ValueError):
        return None
    return before


def _as_number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _opted_out() -> bool:
    return os.environ.get(OPT_OUT_VARIABLE, "") not in ("", "0")
