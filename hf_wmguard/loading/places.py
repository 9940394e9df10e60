"""Where a protected folder is: on this machine, in a store, or in the Hub's cache when the Hub may not be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_wmguard.container.source import Source
from hf_wmguard.errors import ConfigError, NotFoundError
from hf_wmguard.stores.location import Location, is_location, parse_location
from hf_wmguard.suspects.remote import open_remote


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A protected folder, ready to be opened.

    Args:
        path: Where its small files lie, and its weights too unless they are elsewhere.
        name: What a model of it is called afterwards.
        remote: Weight files that are kept elsewhere, by name.
    """

    path: Path
    name: str
    remote: Mapping[str, Source] = field(default_factory=dict)


def location_of(where: str | Path, revision: str | None = None) -> Location | None:
    """Return the address that somebody means, None for a folder of this machine.

    Args:
        where: A folder, ``hub://org/name``, ``s3://bucket/prefix``, or ``org/name`` of the Hub where there is no such
            folder.
        revision: Branch, tag or commit, unless the address has one.
    """
    if Path(where).is_dir() or isinstance(where, Path):
        return None
    if is_location(where):
        location = parse_location(where)
    else:
        try:
            location = parse_location(f"hub://{where}")
        except ConfigError:
            return None
    if revision is None or location.scheme != "hub":
        return location
    if location.revision not in (None, revision):
        raise ConfigError(f"{location} and revision={revision!r}", hint="name one revision")
    return location.at(revision)


@contextmanager
def open_place(where: str | Path, *, revision: str | None = None) -> Iterator[Place]:
    """Find a protected folder, wherever it is.

    Args:
        where: As for `location_of`.
        revision: As for `location_of`.
    Raises:
        NotFoundError: There is none.
        ConfigError: No such address.
        StoreError, MissingDependencyError: As `open_remote`.
    """
    location = location_of(where, revision)
    if location is None:
        if not Path(where).is_dir():
            raise NotFoundError(
                f"no protected folder at {where}", hint="give a local folder, org/name, hub://... or s3://..."
            )
        yield Place(path=Path(where), name=str(where))
    elif location.scheme == "hub" and constants.is_offline_mode():
        yield _cached(location)
    else:
        with ExitStack() as stack:
            try:
                remote = stack.enter_context(open_remote(location, recorded=False))
            except NotFoundError as error:
                if is_location(where):
                    raise
                # A local folder may have been meant.
                raise NotFoundError(f"no folder {where}, and {error.message}", hint=error.hint) from None
            yield Place(path=remote.folder, name=_name(location), remote=remote.weights)


def _cached(location: Location) -> Place:
    """Return a repo that was downloaded before, as ciphertext, into the Hub's own cache."""
    try:
        found = snapshot_download(location.root, revision=location.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise NotFoundError(
            f"{location} is not in the cache, and HF_HUB_OFFLINE is set",
            hint="run hf download while the Hub can be reached, or unset it",
        ) from None
    return Place(path=Path(found) / location.path, name=_name(location))


def _name(location: Location) -> str:
    """Return what the Hub's own tools call it."""
    if location.scheme == "hub" and not location.path:
        return location.root
    return str(replace(location, revision=None))
