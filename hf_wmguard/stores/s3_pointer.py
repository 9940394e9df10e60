"""The one small object that says which objects of a prefix belong together: no request is made here.

S3 replaces one object at a time. Which objects are one version of a folder is written in the pointer, which is one
object, and replaced only on condition that nobody else has replaced it (``docs/adr/0015-s3.md``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_wmguard.canonical import canonical_json, parse_canonical, require_object
from hf_wmguard.errors import FormatError
from hf_wmguard.stores.names import is_safe_name

POINTER_NAME = "wmguard_current.json"
KEPT = ".wmguard-saves/"
"""Below this, within the prefix, lie the objects of earlier versions in buckets that keep none themselves."""
MAX_POINTER_BYTES = 16 << 20
_VERSION = 1
_REVISION = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 1024
_FIELDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "current": (dict, type(None)),
    "previous": (dict, type(None)),
    "push": (str,),
    "done": (bool,),
    "writes": (list,),
}
_SAVE_FIELDS: dict[str, tuple[type, ...]] = {"revision": (str,), "entries": (list,)}
_ENTRY_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "key": (str,),
    "etag": (str,),
    "version": (str, type(None)),
    "size_bytes": (int,),
    "sha256": (str, type(None)),
}
_HINT = "this pointer was damaged or is not ours: push again, or delete it"


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(f"{POINTER_NAME}: {what}", hint=_HINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a version, and the object that it is.

    Args:
        name: Of the file, relative to the prefix.
        key: Of the object, relative to the prefix: the name, or below `KEPT`.
        etag: Of the object, with its quotes.
        version: Of the object, where the bucket keeps versions.
        size_bytes: Of the file.
        sha256: Of the file, as hex; None where it was there before we were.
    Raises:
        FormatError: A value that cannot be one.
    """

    name: str
    key: str
    etag: str
    version: str | None
    size_bytes: int
    sha256: str | None

    def __post_init__(self) -> None:
        _require(is_safe_name(self.name), f"{self.name[:100]!a} is not the name of a file")
        inside = self.key.removeprefix(KEPT).partition("/")[2] if self.key.startswith(KEPT) else self.key
        _require(inside == self.name, f"{self.key[:100]!a} is not where {self.name} is kept")
        _require(bool(self.etag) and len(self.etag) <= _MAX_TEXT and self.etag.isascii(), f"the ETag of {self.name}")
        _require(self.version is None or 0 < len(self.version) <= _MAX_TEXT, f"the version of {self.name}")
        _require(0 <= self.size_bytes <= 1 << 53, f"{self.name} has {self.size_bytes} bytes")
        _require(
            self.sha256 is None or bool(_SHA256.fullmatch(self.sha256)),
            f"the SHA-256 of {self.name} is not 64 hex digits",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One version of the folder: its revision (`revision_of`), and its files."""

    revision: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        _require(bool(_REVISION.fullmatch(self.revision)), "a revision is 32 hex digits")
        _require(len(self.files()) == len(self.entries), f"a file of {self.revision} is listed twice")

    def files(self) -> dict[str, Entry]:
        """Return the files by name."""
        return {entry.name: entry for entry in self.entries}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """What readers see, and who is pushing.

    Args:
        current: What readers see; None until a first push is done.
        previous: What they saw before, and may still be reading.
        push: A random name of the push that wrote this.
        done: Whether that push is done. Where not, it is at work on the canonical names, or was killed.
        writes: The names that it writes, while it is not done.
    """

    current: Save | None
    previous: Save | None
    push: str
    done: bool
    writes: tuple[str, ...]

    def __post_init__(self) -> None:
        _require(all(isinstance(name, str) and is_safe_name(name) for name in self.writes), "a name that is none")

    def to_bytes(self) -> bytes:
        """Return its one spelling."""
        return canonical_json({"version": _VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Pointer:
        """Return what was written.

        Raises:
            FormatError: It is not a pointer.
        """
        fields = require_object(parse_canonical(data, POINTER_NAME, MAX_POINTER_BYTES), _FIELDS, POINTER_NAME)
        _require(fields.pop("version") == _VERSION, f"version {_VERSION} is what this release reads")
        fields["current"], fields["previous"] = _save(fields["current"]), _save(fields["previous"])
        fields["writes"] = tuple(fields["writes"])
        return cls(**fields)


def _save(value: Any) -> Save | None:
    if value is None:
        return None
    fields = require_object(value, _SAVE_FIELDS, POINTER_NAME)
    entries = (Entry(**require_object(one, _ENTRY_FIELDS, POINTER_NAME)) for one in fields["entries"])
    return Save(revision=fields["revision"], entries=tuple(entries))


def revision_of(digests: Mapping[str, str]) -> str:
    """Return what a version is called: made from its files' names and SHA-256, so that the same is called the same.

    The save's own id would not do: the list of recipients changes without a new save.
    """
    return hashlib.sha256(canonical_json(dict(digests))).hexdigest()[:32]
