"""Memory that takes plaintext: huge pages, and nothing of it in a core dump."""

from __future__ import annotations

import mmap

_ZEROS = bytes(1024 * 1024)
# Linux only, and by name: what a system does not have is left out.
_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTDUMP")


def wipe(view: memoryview) -> None:
    """Overwrite bytes with zeros."""
    for start in range(0, len(view), len(_ZEROS)):
        part = view[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


class Memory:
    """Anonymous private memory of one size, to decrypt into; zero at first.

    Nothing is reserved before it is written. In huge pages the first touch of a gigabyte costs a third of what it
    costs in small ones, and that touch is most of the time of a load. It is freed when nothing refers to it any more:
    neither this object nor a view or tensor made from it.

    Args:
        size_bytes: Its size.
    """

    __slots__ = ("size_bytes", "view")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        # A mapping of nothing does not exist.
        area = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for name in _ADVICE:
            try:
                area.madvise(getattr(mmap, name))
            except (AttributeError, OSError):
                # Advice: a kernel without huge pages is slower, and nothing else.
                continue
        self.view = memoryview(area)[:size_bytes]

    def __repr__(self) -> str:
        return f"Memory({self.size_bytes} bytes)"
