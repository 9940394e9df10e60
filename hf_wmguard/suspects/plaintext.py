"""Look for runs of plaintext weights in files: the check behind "only ciphertext on disk"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_wmguard.errors import NotFoundError

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
_WINDOW_BYTES = 8
_STRIDE_BYTES = 32
_TABLE_BITS = 26
_BLOCK_BYTES = 16 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MIN_RUN_BYTES = _STRIDE_BYTES + _WINDOW_BYTES - 1
"""A run of weights at least this long is found wherever it starts."""


class PlaintextFinder:
    """Finds any run of `MIN_RUN_BYTES` bytes of given weights, at any offset, in float32, bfloat16 and float16.

    One window of 8 bytes is kept for every 32 bytes of weights; every 8 bytes of a file are looked up in a table
    of their hashes, and the few that are in it are compared exactly. Windows whose bytes repeat (zeros, ones) say
    nothing and are left out.

    Args:
        tensors: The weights, any floating-point dtype.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        parts = [
            _windows(tensor.detach().cpu().to(dtype))
            for tensor in tensors.values()
            if tensor.is_floating_point()
            for dtype in {tensor.dtype, torch.float32, torch.bfloat16, torch.float16}
        ]
        self._windows = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)
        self._table = np.zeros(1 << _TABLE_BITS, dtype=np.bool_)
        self._table[_hash(self._windows)] = True

    def count(self, data: bytes | memoryview) -> int:
        """Return how many bytes of some data lie in a window of the weights."""
        hits = 0
        if not len(self._windows):
            return 0
        for phase in range(_WINDOW_BYTES):
            usable = (len(data) - phase) // _WINDOW_BYTES
            if usable <= 0:
                break
            values = np.frombuffer(data, dtype="<u8", count=usable, offset=phase)
            maybe = values[self._table.take(_hash(values))]
            place = np.searchsorted(self._windows, maybe)
            hits += int(np.count_nonzero(self._windows[np.minimum(place, len(self._windows) - 1)] == maybe))
        return _WINDOW_BYTES * hits

    def scan(self, roots: Iterable[Path], progress: Callable[[str, int], None] | None = None) -> dict[Path, int]:
        """Return the files under some folders that hold plaintext weights, with the bytes found in each.

        Args:
            roots: Folders or files; symbolic links are not followed.
            progress: Called with a file's name and the bytes just read.
        Raises:
            NotFoundError: One of the roots does not exist.
        """
        found: dict[Path, int] = {}
        for root in roots:
            if not root.exists():
                # A misspelt path would otherwise pass for a clean one.
                raise NotFoundError(f"nothing to search at {root}", hint="check the path")
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    count = self._scan_file(path, progress)
                    if count:
                        found[path] = count
        return found

    def _scan_file(self, path: Path, progress: Callable[[str, int], None] | None) -> int:
        count, tail = 0, b""
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                count += self.count(tail + block)
                # The next block starts where a window could still begin; its bytes are not counted twice.
                tail = (tail + block)[-(_WINDOW_BYTES - 1) :]
                if progress is not None:
                    progress(path.name, len(block))
        return count


def _windows(tensor: Tensor) -> Words:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
    if len(raw) < _WINDOW_BYTES:
        return np.zeros(0, dtype=np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(raw, _WINDOW_BYTES)[::_STRIDE_BYTES]
    varied = rows[np.any(rows[:, 1:] != rows[:, :1], axis=1)]
    values = np.ascontiguousarray(varied).view("<u8").reshape(-1)
    # Two equal float32 (a row of ones) repeat after four bytes.
    halves = values >> np.uint64(32) != values & np.uint64(0xFFFFFFFF)
    kept: Words = values[halves]
    return kept


def _hash(values: Words) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # Overflow is the point of a multiplicative hash; NumPy wraps unsigned arrays silently.
    return ((values * _MULTIPLIER) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
