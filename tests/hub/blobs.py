"""Contents on disk, each under its SHA-256: written elsewhere and moved into place, so that there are no halves."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader, and a restart after a kill, sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(value))
    scratch.replace(path)


class Blobs:
    """Contents by the hex of their SHA-256.

    Args:
        folder: Where they are kept; `scratch` beside it holds what is on its way.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "blobs"
        self._scratch = folder / "scratch"
        # What a killed server left half-written is of no use to anybody.
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)

    def path(self, sha256: str) -> Path:
        """Return where a content is, or would be."""
        return self._folder / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Return whether a content is there."""
        return self.path(sha256).is_file()

    def writer(self) -> Writer:
        """Return a new file to write into."""
        return Writer(self, self._scratch / secrets.token_hex(8))

    def add(self, data: bytes) -> str:
        """Keep a small content; return its SHA-256."""
        with self.writer() as writer:
            writer.write(data)
            return writer.keep()

    def adopt(self, path: Path, sha256: str) -> None:
        """Move a file, whose hash was checked, into place."""
        target = self.path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


class Writer:
    """A content that is being received: hashed while it is written."""

    def __init__(self, blobs: Blobs, path: Path) -> None:
        self._blobs = blobs
        self._path = path
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()

    def keep(self) -> str:
        """Move the content into place; return its SHA-256."""
        self._file.close()
        self._blobs.adopt(self._path, self.sha256)
        return self.sha256

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class Parts:
    """A content that comes in numbered parts, each written to its place in one file.

    Survives a restart of the server: a part counts once its tag is on disk, which is after its bytes.

    Args:
        folder: Of this upload alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"

    def start(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True)
        self.data.touch()

    def open(self, offset: int) -> int:
        """Return a file descriptor at which one part is written."""
        descriptor = os.open(self.data, os.O_WRONLY)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return descriptor

    def finish(self, number: int, tag: str) -> None:
        """Count a part in."""
        write_json(self.folder / f"part-{number}", tag)

    def tag(self, number: int) -> str | None:
        """Return the tag that was given out for a part."""
        path = self.folder / f"part-{number}"
        return json.loads(path.read_text()) if path.is_file() else None

    def sha256(self) -> tuple[str, int]:
        """Return hash and size of the whole."""
        digest = hashlib.sha256()
        with self.data.open("rb", buffering=0) as file:
            while block := file.read(4 * BLOCK_BYTES):
                digest.update(block)
            return digest.hexdigest(), file.tell()

    def remove(self) -> None:
        """Forget the upload."""
        shutil.rmtree(self.folder, ignore_errors=True)
