"""Repos on disk: every commit a JSON file with the whole tree, every ref in one JSON file that is replaced at once.

repos/ORG/NAME/repo.json          visibility, when it was made
repos/ORG/NAME/refs.json          {"heads": {name: commit}, "tags": {name: commit}}
repos/ORG/NAME/commits/ID.json    parent, title, author, date, files
repos/ORG/NAME/large/SHA256       which large contents were uploaded to this repo
blobs/                            the contents themselves (see `blobs`)
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .blobs import Blobs, write_json
from .errors import HubError

_LARGE = "bin gguf gz h5 msgpack npy npz onnx ot parquet pickle pkl pt pth safetensors tar tgz zip zst"
GIT_ATTRIBUTES = "".join(f"*.{one} filter=lfs diff=lfs merge=lfs -text\n" for one in _LARGE.split())


def git_hash(data: bytes) -> str:
    """Return the name git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a commit.

    Args:
        sha256: Of the content.
        size: Of the content, in bytes.
        oid: Git's name: of the content, or of the LFS pointer.
        lfs: Whether git holds a pointer only.
        xet: Xet's name of the content, where it came that way.
    """

    sha256: str
    size: int
    oid: str
    lfs: bool
    xet: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Entry:
        """Return the entry of a file in git itself."""
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data), oid=git_hash(data), lfs=False)

    @classmethod
    def large(cls, sha256: str, size: int, xet: str | None) -> Entry:
        """Return the entry of a file in LFS or Xet."""
        oid = git_hash(cls._pointer(sha256, size))
        return cls(sha256=sha256, size=size, oid=oid, lfs=True, xet=xet)

    @staticmethod
    def _pointer(sha256: str, size: int) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer."""
        return len(self._pointer(self.sha256, self.size))

    @property
    def tag(self) -> str:
        """What the ETag says: the content's name in the place where it is kept."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One state of a repo."""

    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]
    id: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return what is written, the id left out: it is the hash of the rest."""
        value = asdict(self)
        del value["id"]
        return value

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Commit:
        """Return what was written."""
        files = {path: Entry(**entry) for path, entry in value["files"].items()}
        return cls(**{**value, "files": files, "id": name})


def now() -> str:
    """Return the time as the Hub writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Repo:
    """One repo. Whoever changes refs holds `lock`."""

    def __init__(self, folder: Path, name: str, blobs: Blobs, lock: threading.RLock) -> None:
        self.folder = folder
        self.name = name
        self.blobs = blobs
        self.lock = lock

    @property
    def settings(self) -> dict[str, Any]:
        """What `repo.json` says: ``private``, ``created``, ``gated``."""
        value: dict[str, Any] = json.loads((self.folder / "repo.json").read_text())
        return value

    @property
    def private(self) -> bool:
        """Whether only its owners may read."""
        return bool(self.settings["private"])

    def update_settings(self, **changes: Any) -> None:
        """Change what `repo.json` says."""
        with self.lock:
            write_json(self.folder / "repo.json", {**self.settings, **changes})

    @property
    def refs(self) -> dict[str, dict[str, str]]:
        """Heads and tags, with the commits they name."""
        value: dict[str, dict[str, str]] = json.loads((self.folder / "refs.json").read_text())
        return value

    def write_refs(self, refs: Mapping[str, Mapping[str, str]]) -> None:
        """Replace all refs at once."""
        write_json(self.folder / "refs.json", refs)

    def resolve(self, revision: str) -> str:
        """Return the id of the commit a branch, tag, id or start of an id names.

        Raises:
            HubError: There is none.
        """
        refs = self.refs
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for kind in ("heads", "tags"):
            if revision in refs[kind]:
                return refs[kind][revision]
        if 7 <= len(revision) <= 40 and all(letter in "0123456789abcdef" for letter in revision):
            found = [path.stem for path in (self.folder / "commits").glob(f"{revision}*.json")]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def commit(self, revision: str) -> Commit:
        """Return the commit a revision names.

        Raises:
            HubError: There is none.
        """
        name = self.resolve(revision)
        return Commit.from_json(name, json.loads((self.folder / "commits" / f"{name}.json").read_text()))

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commits that lead to a revision, the newest first."""
        name: str | None = revision
        while name is not None:
            commit = self.commit(name)
            yield commit
            name = commit.parent

    def write_commit(self, branch: str, commit: Commit) -> str:
        """Write a commit and move the branch to it; return its id.

        The ref is written last: until then nothing has happened, after it everything has.
        """
        value = commit.to_json()
        name = hashlib.sha1(json.dumps(value, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
        write_json(self.folder / "commits" / f"{name}.json", value)
        refs = self.refs
        refs["heads"][branch] = name
        self.write_refs(refs)
        return name

    def has_large(self, sha256: str) -> bool:
        """Return whether a large content was uploaded to this repo: another repo's may not be borrowed."""
        return (self.folder / "large" / sha256).is_file() and self.blobs.has(sha256)

    def add_large(self, sha256: str, xet: str | None = None) -> None:
        """Note that a large content was uploaded to this repo."""
        write_json(self.folder / "large" / sha256, {"xet": xet})

    def large(self, sha256: str) -> Entry:
        """Return the entry of a large content.

        Raises:
            HubError: It was not uploaded here.
        """
        if not self.has_large(sha256):
            raise HubError(400, f"LFS pointer to a content that was not uploaded: {sha256}")
        xet = json.loads((self.folder / "large" / sha256).read_text())["xet"]
        return Entry.large(sha256, self.blobs.path(sha256).stat().st_size, xet)


class Storage:
    """All repos of a server.

    Args:
        folder: Everything is under it; a server that is started on it again goes on where the last one ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = Blobs(folder)
        self._lock = threading.RLock()

    def repo(self, name: str) -> Repo | None:
        """Return a repo, or None."""
        folder = self.folder / "repos" / name
        return Repo(folder, name, self.blobs, self._lock) if (folder / "repo.json").is_file() else None

    def create(self, name: str, *, private: bool, author: str) -> Repo:
        """Make a repo with the Hub's first commit.

        Raises:
            HubError: It exists.
        """
        with self._lock:
            if self.repo(name) is not None:
                raise HubError(409, "You already created this model repo", extra={"url": name})
            folder = self.folder / "repos" / name
            folder.mkdir(parents=True)
            repo = Repo(folder, name, self.blobs, self._lock)
            attributes = GIT_ATTRIBUTES.encode()
            self.blobs.add(attributes)
            repo.write_refs({"heads": {}, "tags": {}})
            files = {".gitattributes": Entry.regular(attributes)}
            first = Commit(parent=None, title="initial commit", message="", author=author, date=now(), files=files)
            repo.write_commit("main", first)
            # Last: without it there is no repo.
            write_json(folder / "repo.json", {"private": private, "created": now(), "gated": False})
            return repo

    def delete(self, name: str) -> None:
        """Remove a repo; its contents stay, as nobody counts who else has them."""
        with self._lock:
            (self.folder / "repos" / name / "repo.json").unlink()
            shutil.rmtree(self.folder / "repos" / name)
