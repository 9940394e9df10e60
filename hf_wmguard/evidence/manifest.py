"""The signed manifest of a protected folder: write it, read it, check the files against it.

Two files stand in the folder: the manifest itself, for people and programs to read, and an envelope that
holds the same bytes signed by the owner (`hf_wmguard.evidence.signing`). The manifest is written last, so
that a save that was interrupted has no valid one, while its envelope already says whose folder it is. The
fields are described in `hf_wmguard.evidence.records`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric import ec

from hf_wmguard.atomic import write_atomic
from hf_wmguard.errors import ManifestError, NotFoundError, OwnershipError, WmguardError
from hf_wmguard.evidence.records import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    SignatureSummary,
    TriggerSummary,
)
from hf_wmguard.evidence.signing import MAX_ENVELOPE_BYTES, open_envelope, sign
from hf_wmguard.keys import OwnerKey

__all__ = [
    "ENVELOPE_NAME",
    "MANIFEST_NAME",
    "MANIFEST_TYPE",
    "RECIPIENTS_NAME",
    "STAGING_PREFIX",
    "WEIGHT_SUFFIXES",
    "FileEntry",
    "Manifest",
    "SignatureSummary",
    "TriggerSummary",
    "check_files",
    "check_free_for",
    "check_sizes",
    "digest_file",
    "is_trainer_state",
    "read_manifest",
    "without_nested",
    "write_manifest",
]

RECIPIENTS_NAME = "wmguard_recipients.json"
STAGING_PREFIX = ".wmguard-staging-"
"""Folders of this name hold the ciphertext of a save that is not finished, or was killed."""
# What the Trainer, or accelerate, keeps beside the weights of a checkpoint; not weights, and read by nothing of ours.
_TRAINER_STATE = re.compile(
    r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|training_args\.bin"
    r"|optimizer\.bin|(scheduler|sampler|dl_state_dict)(_\d+)?\.bin"
)
MANIFEST_TYPE = "application/vnd.hf-wmguard.manifest.v1+json"
WEIGHT_SUFFIXES = frozenset({".bin", ".ckpt", ".distcp", ".gguf", ".pt", ".pth", ".safetensors"})
_HASH_BLOCK_BYTES = 4 * 1024 * 1024
_HASH_THREADS = 8


def digest_file(path: Path, name: str | None = None) -> FileEntry:
    """Return the manifest's entry for a file as it lies on the disk.

    Args:
        path: The file.
        name: Its name in the manifest; by default that of the file, without its folder.
    Raises:
        NotFoundError: The file cannot be read.
        ManifestError: Its name cannot stand in a manifest.
    """
    sha256, size_bytes = _sha256(path, path.name, None)
    return FileEntry(name=name or path.name, size_bytes=size_bytes, sha256=sha256)


def write_manifest(folder: Path, manifest: Manifest, owner: OwnerKey) -> None:
    """Write the envelope, then the manifest that it signs, each atomically; neither is valid without the other.

    Raises:
        ManifestError: The manifest is larger than `read_manifest` would read.
    """
    data = manifest.to_bytes()
    envelope = sign(data, MANIFEST_TYPE, owner)
    write_atomic(folder / ENVELOPE_NAME, envelope)
    write_atomic(folder / MANIFEST_NAME, data)


def read_manifest(folder: Path, *, signer: ec.EllipticCurvePublicKey | None = None) -> tuple[Manifest, str]:
    """Return the manifest of a protected folder, and the id of the key that signed it.

    The folder's files are not looked at: see `check_sizes` and `check_files`.

    Args:
        folder: The protected folder.
        signer: The only key that is accepted; None takes the embedded one, which anybody can put there.
    Raises:
        NotFoundError: The manifest or the envelope is missing.
        ManifestError: One of them is malformed, the signature does not hold, or the two differ.
    """
    data = _read_limited(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    envelope = _read_limited(folder / ENVELOPE_NAME, MAX_ENVELOPE_BYTES)
    opened = open_envelope(envelope, payload_type=MANIFEST_TYPE, signer=signer)
    if opened.payload != data:
        raise ManifestError(
            f"{MANIFEST_NAME} is not what {ENVELOPE_NAME} signs",
            hint="the manifest was edited, or a save was interrupted: save or fetch the folder again",
        )
    return Manifest.from_bytes(opened.payload), opened.key_id


def _read_limited(path: Path, limit_bytes: int) -> bytes:
    try:
        # is_file() first: opening a FIFO would wait for a writer.
        if not path.is_file():
            raise NotFoundError(
                f"no {path.name} in {path.parent}",
                hint="point at a protected folder, or fetch it again: a part is missing",
            )
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from None
    if len(data) > limit_bytes:
        raise ManifestError(
            f"{path} is larger than {limit_bytes} bytes",
            hint="this is not a manifest: fetch the folder again",
        )
    return data


def check_sizes(folder: Path, manifest: Manifest, *, elsewhere: Mapping[str, int] = MappingProxyType({})) -> None:
    """Check that the listed files are there with their sizes, and no other weight file is. Reads no content.

    Args:
        folder: The protected folder.
        manifest: Its manifest.
        elsewhere: Sizes in bytes, by name, of files that belong to the folder and do not lie in it.
    Raises:
        ManifestError: A file is missing or of another size, or a weight file (`WEIGHT_SUFFIXES`) is not
            listed. Subfolders are searched too, except those with a manifest, which are judged on their own, and
            the staging folder of a save. The state files of the Trainer and of accelerate are no weights.
    """
    for entry in manifest.files:
        path = folder / entry.name
        size_bytes = elsewhere.get(entry.name)
        if size_bytes is None and not path.is_file():
            raise ManifestError(
                f"{entry.name} is listed in the manifest but not in {folder}", hint="fetch the folder again"
            )
        if size_bytes is None:
            size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise ManifestError(
                f"{entry.name} has {size_bytes} bytes, expected {entry.size_bytes}",
                hint="the file was cut or replaced: fetch the folder again",
            )
    listed = {entry.name for entry in manifest.files}
    for stray in (*_weight_files(folder), *filter(_may_be_weights, elsewhere)):
        if stray not in listed:
            raise ManifestError(
                f"{stray} in {folder} is a weight file that the manifest does not list",
                hint="it may be plaintext: delete it, or protect the folder again so that it is covered",
            )


def is_trainer_state(name: str) -> bool:
    """Return whether a file of this name is what the Trainer or accelerate keeps beside a checkpoint's weights."""
    return _TRAINER_STATE.fullmatch(name) is not None


def _weight_files(folder: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder, onerror=_refuse_unreadable):
        here = Path(root)
        folders[:] = sorted(
            name
            for name in folders
            if not (here / name / MANIFEST_NAME).exists() and not name.startswith(STAGING_PREFIX)
        )
        found += [str((here / name).relative_to(folder)) for name in files if _may_be_weights(name)]
    return sorted(found)


def without_nested(names: Collection[str]) -> list[str]:
    """Return the names that lie below no folder with a manifest of its own, such as a checkpoint: it is judged there.

    Args:
        names: Of all files of a folder, relative to it, with slashes.
    """
    nested = tuple(name.removesuffix(MANIFEST_NAME) for name in names if name.endswith(f"/{MANIFEST_NAME}"))
    return [name for name in names if not name.startswith(nested)]


def _may_be_weights(name: str) -> bool:
    return Path(name).suffix.lower() in WEIGHT_SUFFIXES and not is_trainer_state(Path(name).name)


def _refuse_unreadable(error: OSError) -> NoReturn:
    # os.walk would skip the folder, and with it whatever lies in it.
    raise ManifestError(f"cannot look into {error.filename}: {error.strerror}", hint="check its permissions")


def check_files(folder: Path, manifest: Manifest, *, progress: Callable[[str, int], None] | None = None) -> None:
    """Check every listed file byte by byte, after `check_sizes`.

    Args:
        folder: The protected folder.
        manifest: Its manifest, from `read_manifest`.
        progress: Called with a file's name and the bytes just hashed, at most 4 MiB at a time, from several threads.
    Raises:
        ManifestError: As `check_sizes`, or a file whose SHA-256 is another.
    """
    check_sizes(folder, manifest)

    def check(entry: FileEntry) -> None:
        got, _ = _sha256(folder / entry.name, entry.name, progress)
        if got != entry.sha256:
            raise ManifestError(
                f"{entry.name} has SHA-256 {got}, expected {entry.sha256}",
                hint="the file was changed: fetch the folder again",
            )

    # Hashing releases the interpreter lock: shards are hashed side by side.
    with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
        for checked in [pool.submit(check, entry) for entry in manifest.files]:
            checked.result()


def _sha256(path: Path, name: str, progress: Callable[[str, int], None] | None) -> tuple[str, int]:
    # Size and digest come from the same read, so that they belong together even if the file is replaced.
    digest, size_bytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_HASH_BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size_bytes += count
                if progress is not None:
                    progress(name, count)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from None
    return digest.hexdigest(), size_bytes


def check_free_for(folder: Path, *, key_id: str, model_id: str) -> None:
    """Check that a save may go into a folder: nothing protected is there, or the same owner's same model.

    The signed envelope alone says whose folder it is: after a save that was killed just before its manifest, over an
    older one or not, it is the same owner's, and the next save mends the folder.

    Raises:
        OwnershipError: The folder holds another signer's model, another model, or an envelope that does not hold.
    """
    # lexists: a dangling link is somebody's manifest too.
    if not any(os.path.lexists(folder / name) for name in (MANIFEST_NAME, ENVELOPE_NAME)):
        return
    try:
        envelope = _read_limited(folder / ENVELOPE_NAME, MAX_ENVELOPE_BYTES)
        opened = open_envelope(envelope, payload_type=MANIFEST_TYPE, signer=None)
        manifest, holder = Manifest.from_bytes(opened.payload), opened.key_id
    except WmguardError as error:
        raise OwnershipError(
            f"{folder} holds a protected model whose envelope does not hold: {error.message}",
            hint="choose another folder; if it is the rest of an interrupted save, delete it first",
        ) from error
    if holder != key_id:
        raise OwnershipError(
            f"{folder} holds {manifest.model_id} signed by {holder}, not by {key_id}",
            hint="choose another folder",
        )
    if manifest.model_id != model_id:
        raise OwnershipError(
            f"{folder} holds your model {manifest.model_id}, not {model_id}", hint="choose another folder"
        )
