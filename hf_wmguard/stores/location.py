"""Addresses of folders that are kept elsewhere: ``hub://org/name@revision`` and ``s3://bucket/prefix``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hf_wmguard.errors import ConfigError

SCHEMES = ("hub", "s3")
MAX_ADDRESS_CHARACTERS = 2048
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_REPO_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPO = re.compile(rf"(?P<root>{_REPO_PART}/{_REPO_PART})(?P<path>(?:/[^@]*)?)(?:@(?P<revision>.+))?")
_BUCKET = re.compile(r"(?P<root>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<path>(?:/.*)?)")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_EXPECTED = {"hub": "hub://org/name or hub://org/name@revision", "s3": "s3://bucket/prefix"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a folder is kept.

    Args:
        scheme: One of `SCHEMES`.
        root: ``org/name`` of a Hub repo, or the bucket.
        path: Folder in the repo, or prefix in the bucket, without a slash at either end; empty for all of it.
        revision: Branch, tag or commit of a Hub repo, None for its main branch.
    """

    scheme: str
    root: str
    path: str = ""
    revision: str | None = None

    def at(self, revision: str) -> Location:
        """Return the same place at another revision."""
        return replace(self, revision=revision)

    def key(self, name: str) -> str:
        """Return a file's name within the root: the folder's own path before it."""
        return f"{self.path}/{name}" if self.path else name

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{self.root}{path}{revision}"


def is_location(text: object) -> bool:
    """Return whether a text is an address, well formed or not, and so not the path of something local."""
    return isinstance(text, str) and _ADDRESS.fullmatch(text) is not None


def parse_location(text: str) -> Location:
    """Return the place that an address names.

    Raises:
        ConfigError: An unknown scheme, or not what such an address looks like.
    """
    match = _ADDRESS.fullmatch(text) if len(text) <= MAX_ADDRESS_CHARACTERS else None
    if match is None or match[1] not in SCHEMES:
        raise ConfigError(f"{text[:100]!r} is not an address", hint=f"write {' or '.join(_EXPECTED.values())}")
    scheme, rest = match[1], match[2]
    found = (_REPO if scheme == "hub" else _BUCKET).fullmatch(rest)
    fields = found.groupdict() if found else {}
    path, revision = fields.get("path", "").strip("/"), fields.get("revision")
    parts = path.split("/") if path else []
    if (
        found is None
        or not path.isprintable()
        # A path is joined with the names of files: it must not lead anywhere else.
        or any(part in ("", ".", "..") for part in parts)
        or (revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision))
    ):
        raise ConfigError(f"{text!r} is not an address of {scheme}", hint=f"write {_EXPECTED[scheme]}")
    return Location(scheme=scheme, root=fields["root"], path=path, revision=revision)
