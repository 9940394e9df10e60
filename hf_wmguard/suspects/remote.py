"""A folder that is kept in a store: its small files brought here, its weights read where they are.

Only what says what the weights are is brought to this machine: configs, indexes, manifest, envelope and recipients. No
weight is written to disk, neither plaintext nor ciphertext.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hf_wmguard.errors import FormatError, NotFoundError, WmguardError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    RECIPIENTS_NAME,
    WEIGHT_SUFFIXES,
    read_manifest,
    without_nested,
)
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.opening import open_store
from hf_wmguard.stores.remote import Reads, RemoteFile
from hf_wmguard.stores.store import Store
from hf_wmguard.suspects.files import INDEX_NAMES, MAX_INDEX_BYTES, weight_names

_ALWAYS = ("config.json", "adapter_config.json", "generation_config.json", *INDEX_NAMES)
_OURS = (MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME)
_MAX_SMALL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFolder:
    """A folder in a store, open for reading.

    Args:
        location: Where it is, at the revision that is read.
        folder: Where its small files lie on this machine, for as long as it is open.
        weights: Its weight files by name; reading them reads ranges from the store.
        reads: What of them was read so far.
        stated: SHA-256 of files by name, as the store states them.
        only: The one weight file that was asked for, if not the folder.
    """

    location: Location
    folder: Path
    weights: Mapping[str, RemoteFile]
    reads: Reads
    stated: Mapping[str, str]
    only: str | None = None

    def weight_names(self) -> list[str]:
        """Return which files hold the weights; errors as `suspects.files.weight_names`."""
        if self.only is not None:
            return [self.only]
        present = {*(name for name in self.weights if "/" not in name), *(path.name for path in self.folder.iterdir())}
        return weight_names(present, self.folder, str(self.location))


@contextmanager
def open_remote(location: Location, *, recorded: bool = True) -> Iterator[RemoteFolder]:
    """Open a folder, or one weight file, that is kept in a store.

    Args:
        location: Where it is.
        recorded: Note what is read of the weights, with its digest.
    Raises:
        NotFoundError, StoreError, MissingDependencyError: As `open_store` and `Store.read_into`.
        FormatError: A small file that is not small.
    """
    only = location.path.rpartition("/")[2] if _is_weights(location.path) else None
    if only is not None:
        location = replace(location, path=location.path.rpartition("/")[0])
    with open_store(location) as store, tempfile.TemporaryDirectory(prefix="wmguard-") as temporary:
        files, folder, reads = store.files(), Path(temporary), Reads()
        here = [name for name in (*_ALWAYS, *_OURS) if name in files]
        _bring(store, here, folder)
        more = [name for name in _listed(folder) if name in files and name not in here and not _is_weights(name)]
        _bring(store, more, folder)
        weights = {
            name: RemoteFile(store, name, reads if recorded else None)
            for name in without_nested(files)
            if _is_weights(name)
        }
        if only is not None and only not in weights:
            raise NotFoundError(f"{store.location} has no file {only}", hint="check its name")
        yield RemoteFolder(
            location=store.location,
            folder=folder,
            weights=weights,
            reads=reads,
            stated={name: file.sha256 for name, file in files.items() if file.sha256 is not None},
            only=only,
        )


def _is_weights(name: str) -> bool:
    return Path(name).suffix.lower() in WEIGHT_SUFFIXES


def _listed(folder: Path) -> list[str]:
    """Return what the manifest lists; nothing where there is none that holds: whoever opens the folder says so."""
    try:
        manifest, _ = read_manifest(folder)
    except WmguardError:
        return []
    return [entry.name for entry in manifest.files]


def _bring(store: Store, names: list[str], folder: Path) -> None:
    sizes = {name: store.files()[name].size_bytes for name in names}
    for name, size_bytes in sizes.items():
        if size_bytes > MAX_INDEX_BYTES:
            raise FormatError(f"{store.location}: {name} has {size_bytes} bytes", hint="no such file is that large")
    if sum(sizes.values()) > _MAX_SMALL_BYTES:
        raise FormatError(
            f"{store.location}: {len(sizes)} small files have {sum(sizes.values())} bytes", hint="no model has so many"
        )
    for name, size_bytes in sizes.items():
        data = bytearray(size_bytes)
        store.read_into(name, 0, memoryview(data))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
