"""Bring a protected folder from where it is kept to this machine: as ciphertext, checked, whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_wmguard.delivery.parcel import may_be_plain
from hf_wmguard.errors import FormatError, NotFoundError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    RECIPIENTS_NAME,
    Manifest,
    check_files,
    check_sizes,
    read_manifest,
    without_nested,
)
from hf_wmguard.evidence.signing import load_signer
from hf_wmguard.folders import check_new_folder, resumable_folder
from hf_wmguard.stores.location import Location, parse_location
from hf_wmguard.stores.names import is_safe_name
from hf_wmguard.stores.opening import open_store
from hf_wmguard.stores.store import Store

Progress = Callable[[str, int], None]
Started = Callable[[int], None]
Fetch = Callable[[Store, Collection[str], Path, Progress | None], None]
PARTIAL_PREFIX = ".wmguard-pull-"
"""A folder of this name holds what has arrived of a pull that was interrupted; the same pull goes on with it."""
_PROOF = (MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME)
_MAX_PROOF_BYTES = 64 << 20
# Of a tokenizer and the like, whose size nobody signed.
_MAX_PLAIN_BYTES = 1 << 30
# By scheme: what brings whole files. Each goes on where it was interrupted.
_FETCH = {"hub": ("hub_download", "download"), "s3": ("fetching", "fetch_all")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What is on this machine now.

    Args:
        uri: Where it came from, at the revision that it was.
        folder: Where it is.
        model_id: Name of the model.
        iteration: Which version of it.
        signer: Id of the key that signed it.
        pinned: Whether that key was asked for.
        files: Names of its files.
        size_bytes: Of all of them together.
        left_out: What lies there too and was not fetched.
    """

    uri: str
    folder: str
    model_id: str
    iteration: str
    signer: str
    pinned: bool
    files: tuple[str, ...]
    size_bytes: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return asdict(self)


def pull(
    uri: str,
    out: str | Path,
    *,
    signer: str | None = None,
    started: Started | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a protected folder into a new local one.

    The envelope is checked before anything large is fetched, and every file against it before the folder appears. A
    pull that is interrupted goes on where it was when it is run again.

    Args:
        uri: ``hub://org/name@revision`` or ``s3://bucket/prefix``.
        out: A folder that does not exist yet, or is empty.
        signer: Reference to the public key that must have signed it.
        started: Called once with the bytes that all files have together.
        progress: Called with a file's name and the bytes just fetched.
    Raises:
        NotFoundError: There is no such place, or no protected folder.
        ManifestError: The envelope does not hold, is another's, or a file is not the one that was signed.
        StoreError, MissingDependencyError: As `open_store`.
        UsageError: The output folder holds something.
        EnvironmentFault: The folder cannot be written.
    """
    location, target = parse_location(uri), Path(out)
    pinned = load_signer(signer) if signer else None
    check_new_folder(None, target)
    with open_store(location) as store:
        with tempfile.TemporaryDirectory(prefix="wmguard-") as temporary:
            _fetch_proof(store, Path(temporary))
            manifest, key_id = read_manifest(Path(temporary), signer=pinned)
            names, left_out = _sort_out(store, manifest)
            files = store.files()
            # Sizes, and weight files that nobody signed: known from the listing, before gigabytes are fetched.
            listing = {name: files[name].size_bytes for name in without_nested(files) if name not in _PROOF}
            check_sizes(Path(temporary), manifest, elsewhere=listing)
        if started is not None:
            started(sum(files[name].size_bytes for name in names))
        with resumable_folder(target, _partial_name(store.location)) as staging:
            module, function = _FETCH[location.scheme]
            fetch: Fetch = getattr(import_module(f"hf_wmguard.delivery.{module}"), function)
            fetch(store, names, staging, progress)
            _clear_others(staging, set(names))
            # What has arrived, not what was looked at before.
            manifest, key_id = read_manifest(staging, signer=pinned)
            check_files(staging, manifest)
    return Pulled(
        uri=str(store.location),
        folder=str(target),
        model_id=manifest.model_id,
        iteration=manifest.iteration,
        signer=key_id,
        pinned=pinned is not None,
        files=tuple(names),
        size_bytes=sum(files[name].size_bytes for name in names),
        left_out=tuple(left_out),
    )


def _fetch_proof(store: Store, folder: Path) -> None:
    for name in _PROOF:
        file = store.files().get(name)
        if file is None:
            raise NotFoundError(
                f"{store.location} lacks {name}: it is no protected folder", hint="check the address and the revision"
            )
        if file.size_bytes > _MAX_PROOF_BYTES:
            raise FormatError(f"{name} has {file.size_bytes} bytes", hint="no such file is that large")
        data = bytearray(file.size_bytes)
        store.read_into(name, 0, memoryview(data))
        (folder / name).write_bytes(data)


def _sort_out(store: Store, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Return what is fetched, the proof last, and what is not."""
    signed = {entry.name for entry in manifest.files}
    files = store.files()
    # Of what nobody signed the name is a stranger's, too.
    wanted = [name for name in files if name in signed or (may_be_plain(name) and is_safe_name(name))]
    for name in wanted:
        if name not in signed and files[name].size_bytes > _MAX_PLAIN_BYTES:
            raise FormatError(f"{name} has {files[name].size_bytes} bytes", hint="no such file is that large")
    kept = {*wanted, *_PROOF}
    left_out = [name for name in files if name not in kept]
    return [*sorted(wanted), *_PROOF], sorted(left_out)


def _partial_name(location: Location) -> str:
    return PARTIAL_PREFIX + hashlib.sha256(str(location).encode()).hexdigest()[:16]


def _clear_others(staging: Path, names: set[str]) -> None:
    """Delete what a download has left beside the files, and what an earlier one fetched that is not there any more."""
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(name.startswith(f"{path.relative_to(staging).as_posix()}/") for name in names):
                shutil.rmtree(path)
        elif path.relative_to(staging).as_posix() not in names:
            path.unlink()
