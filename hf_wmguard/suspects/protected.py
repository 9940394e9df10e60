"""Open a protected folder: manifest, recipients, then every ciphertext file, each bound to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cryptography.hazmat.primitives.asymmetric import ec

from hf_wmguard.container.files import FileContext, ProtectedFile
from hf_wmguard.container.recipients import MAX_RECIPIENTS_FILE_BYTES, Identity, dek_commitment, open_recipients
from hf_wmguard.container.source import LocalFile, Source
from hf_wmguard.errors import FormatError, ManifestError, NotFoundError
from hf_wmguard.evidence.manifest import RECIPIENTS_NAME, Manifest, check_sizes, digest_file, read_manifest
from hf_wmguard.hardening import no_core_dumps

WEIGHT_SUFFIX = ".safetensors"
OPTIMIZER_NAME = "optimizer.wmguard"
"""The encrypted state of the optimizer in a checkpoint; for the owner alone."""
_ELSEWHERE = "protected--load-with-hf_wmguard.safetensors"
_WEIGHTS_KEY = "transformers_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFolder:
    """A protected folder whose manifest, key and headers have been checked.

    Args:
        manifest: What was signed.
        key_id: Who signed it.
        files: The ciphertext files, ready to decrypt.
    """

    manifest: Manifest
    key_id: str
    files: tuple[ProtectedFile, ...]


@contextmanager
def open_folder(
    path: Path,
    identities: tuple[Identity, ...],
    *,
    signer: ec.EllipticCurvePublicKey | None = None,
    remote: Mapping[str, Source] = MappingProxyType({}),
) -> Iterator[OpenFolder]:
    """Open a protected folder.

    Args:
        path: The folder.
        identities: Tried in order.
        signer: The public key that must have signed the manifest; without it the manifest speaks for itself only.
        remote: Weight files by name that belong to the folder and are kept elsewhere.
    Raises:
        NotFoundError: The manifest, the envelope or the recipients are missing.
        ManifestError: The manifest does not match its signature, its key or its files.
        AuthenticationError: No identity opens it, or ciphertext was changed.
    """
    manifest, key_id = read_manifest(path, signer=signer)
    check_sizes(path, manifest, elsewhere={name: file.size_bytes for name, file in remote.items()})
    _check_plain_files(path, manifest)
    with ExitStack() as stack:
        # From the first secret to the last.
        stack.enter_context(no_core_dumps())
        dek = open_dek(path, manifest, identities)
        names = weight_names(manifest)
        files = tuple(
            stack.enter_context(
                ProtectedFile(remote.get(name, path / name), dek=dek, context=file_context(manifest, index, len(names)))
            )
            for index, name in enumerate(names, start=1)
        )
        yield OpenFolder(manifest=manifest, key_id=key_id, files=files)


def _check_plain_files(path: Path, manifest: Manifest) -> None:
    # Ciphertext authenticates itself chunk by chunk, but the config says what the weights mean: with other labels
    # or another architecture in it, authentic weights give another model.
    for entry in manifest.files:
        if not entry.name.endswith(WEIGHT_SUFFIX) and digest_file(path / entry.name, entry.name) != entry:
            raise ManifestError(
                f"{entry.name} in {path} is not the file that was signed",
                hint="it was changed after the save: fetch the folder again",
            )


def divert_unaware(config_file: Path) -> None:
    """Make a model's config name a weight file that is not there, for loaders that know nothing of protection.

    The ciphertext has the wrong shapes for every loader, but one that was told to ignore that would make up random
    weights. transformers takes the file's name from the config first and never writes it back, and this package hands
    over tensors and no files; others do not look at it.
    """
    _set_weights(config_file, _ELSEWHERE)


def restore_config(config_file: Path) -> None:
    """Undo `divert_unaware` in a config, where it was done."""
    _set_weights(config_file, None)


def is_diverted(value: object) -> bool:
    """Return whether this is what `divert_unaware` puts into a config."""
    return value == _ELSEWHERE


def _set_weights(config_file: Path, name: str | None) -> None:
    try:
        config = json.loads(config_file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(config, dict) or config.get(_WEIGHTS_KEY) == name:
        return
    config.pop(_WEIGHTS_KEY, None)
    if name is not None:
        config[_WEIGHTS_KEY] = name
    # As transformers writes it, so that undoing gives the same bytes again.
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_recipients(path: Path) -> bytes:
    """Return the recipients file of a protected folder, of which nothing has been checked; at most a byte too much.

    Raises:
        NotFoundError: There is none.
        FormatError: Something else has its name.
        EnvironmentFault: It cannot be read.
    """
    try:
        with LocalFile(path / RECIPIENTS_NAME) as file:
            data = bytearray(min(file.size_bytes, MAX_RECIPIENTS_FILE_BYTES + 1))
            file.read_into(memoryview(data), 0)
            return bytes(data)
    except NotFoundError:
        raise NotFoundError(f"{path} lacks {RECIPIENTS_NAME}", hint="fetch the whole protected folder") from None
    except FormatError:
        raise FormatError(f"{RECIPIENTS_NAME} in {path} is not a regular file", hint="fetch the folder again") from None


def open_dek(
    path: Path, manifest: Manifest, identities: tuple[Identity, ...], *, recipients: bytes | None = None
) -> bytes:
    """Return the data encryption key of a protected folder; errors as `open_folder`.

    Args:
        path: The folder.
        manifest: Its manifest.
        identities: Tried in order.
        recipients: What `read_recipients` returned, if it has been read already.
    """
    data = read_recipients(path) if recipients is None else recipients
    dek = open_recipients(data, identities, set_id=manifest.set_id, model_id=manifest.model_id)
    # The commitment in the signed manifest ties this key to this save: an old folder's recipients cannot be slipped in.
    if dek_commitment(dek, manifest.set_id) != manifest.dek_commitment:
        raise ManifestError(
            f"{path}: {RECIPIENTS_NAME} holds the key of another save",
            hint="restore the file that belongs to this manifest",
        )
    return dek


def weight_names(manifest: Manifest) -> list[str]:
    """Return the ciphertext files of a manifest in the order of their shards."""
    return sorted(entry.name for entry in manifest.files if entry.name.endswith(WEIGHT_SUFFIX))


def file_context(manifest: Manifest, index: int, total: int) -> FileContext:
    """Return what the file number ``index`` of ``total`` must be bound to."""
    return FileContext(
        model_id=manifest.model_id,
        iteration=manifest.iteration,
        set_id=manifest.set_id,
        index=index,
        total=total,
    )
