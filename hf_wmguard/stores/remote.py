"""Files of a store, read by ranges as if they were open on this machine, with a record of what was read."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

from hf_wmguard.errors import FormatError, UsageError
from hf_wmguard.stores.store import Store

_HEAD_BYTES = 256 << 10
_MAX_HEAD_BYTES = 16 << 20
_READ_BYTES = 16 << 20


@dataclass(slots=True)
class Reads:
    """What was read of some files: every range with its digest, as it came from the store."""

    _ranges: list[tuple[str, int, int, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, offset: int, data: memoryview) -> None:
        """Note a range that was read."""
        one = (name, offset, len(data), hashlib.sha256(data).hexdigest())
        with self._lock:
            self._ranges.append(one)

    @property
    def size_bytes(self) -> int:
        """Bytes read so far."""
        with self._lock:
            return sum(size_bytes for _, _, size_bytes, _ in self._ranges)

    def to_json(self) -> dict[str, Any]:
        """Return bytes, number of requests, and the ranges in the order of the files: name, offset, bytes, SHA-256."""
        with self._lock:
            ranges = sorted(self._ranges)
        return {
            "bytes": sum(size_bytes for _, _, size_bytes, _ in ranges),
            "requests": len(ranges),
            "ranges": [list(one) for one in ranges],
        }


class RemoteFile:
    """A file of a store, as a `container.source.Source`.

    The begin of a file is read in one piece and kept, up to where its header ends: a header is read in several steps.

    Args:
        store: Where it is; stays open as long as the file is used.
        path: Its name in the store.
        reads: Where every range is noted; None notes none.
    """

    def __init__(self, store: Store, path: str, reads: Reads | None = None) -> None:
        self._store = store
        self._path = path
        self._reads = reads
        self._head = memoryview(b"")
        self._lock = threading.Lock()
        self._size_bytes = store.files()[path].size_bytes
        self.closed = False
        self.read_bytes = _READ_BYTES

    @property
    def name(self) -> str:
        """Its name, without a folder."""
        return self._path.rpartition("/")[2]

    @property
    def size_bytes(self) -> int:
        """Its size, as the store says."""
        return self._size_bytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset.

        Raises:
            UsageError: The file is closed.
            FormatError: The file ends before.
            NotFoundError, StoreError: As `Store.read_into`.
        """
        if self.closed:
            raise UsageError(f"{self.name} is closed", hint="read inside the with block")
        stop = offset + len(buffer)
        if stop > self._size_bytes:
            raise FormatError(f"{self.name}: the file ended early", hint="it was cut; fetch it again")
        if not buffer:
            return
        # What goes on where the head ends belongs to it; a read from further on is one of weights.
        if offset <= len(self._head) and stop <= _MAX_HEAD_BYTES:
            with self._lock:
                if stop > len(self._head):
                    self._extend(stop)
            buffer[:] = self._head[offset:stop]
            return
        self._read(offset, buffer)

    def fetch_head(self) -> None:
        """Read the begin of the file now: of many files side by side, where each would wait for the one before."""
        count = min(self._size_bytes, _HEAD_BYTES)
        self.read_into(memoryview(bytearray(count)), 0)

    def _extend(self, stop: int) -> None:
        begin = len(self._head)
        head = bytearray(min(self._size_bytes, max(stop, _HEAD_BYTES)))
        head[:begin] = self._head
        self._read(begin, memoryview(head)[begin:])
        self._head = memoryview(head)

    def _read(self, offset: int, buffer: memoryview) -> None:
        self._store.read_into(self._path, offset, buffer)
        if self._reads is not None:
            self._reads.add(self._path, offset, buffer)

    def close(self) -> None:
        """Refuse to be read from now on."""
        self.closed = True

    def __repr__(self) -> str:
        return f"RemoteFile({str(self._store.location)!r}, {self._path!r})"
