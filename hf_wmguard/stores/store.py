"""What every store can do: say which files one version of a folder has, and hand over any range of their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from hf_wmguard.stores.location import Location


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file in a store.

    Args:
        size_bytes: Its size, as the store says.
        tag: What the store calls these contents (an ETag, a version); another tag is another file.
        sha256: Of the contents, as hex, where the store knows it. The store's word: nothing is proven by it.
    """

    size_bytes: int
    tag: str
    sha256: str | None = None


class Store(Protocol):
    """One version of a folder that is kept elsewhere; a context manager.

    What is read comes from that version only, or an error does: never from a later one.
    """

    location: Location
    """Where it is, at the revision that is read: of the Hub the commit."""

    def files(self) -> Mapping[str, StoredFile]:
        """Return every file below the location, by its name relative to it, with slashes."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from an offset of a file. Several threads may read at once.

        Raises:
            NotFoundError: No such file.
            StoreError: The store refuses, does not answer, cuts the connection again and again, or answers with other
                bytes than those it was asked for.
        """

    def close(self) -> None:
        """Let go of connections."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
