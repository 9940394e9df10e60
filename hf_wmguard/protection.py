"""Encrypt a finished model from folder to folder: streamed, never loaded, its plaintext never written anywhere."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from hf_wmguard.atomic import write_atomic
from hf_wmguard.canonical import canonical_time
from hf_wmguard.container.files import FileContext, FileRecord, is_protected, write_protected
from hf_wmguard.container.format import DEK_BYTES, PUBLIC_HEADER
from hf_wmguard.container.owner import load_owner
from hf_wmguard.container.plain import FileTensor, PlainFile
from hf_wmguard.container.recipients import X25519Identity, dek_commitment, load_recipient, seal_recipients
from hf_wmguard.container.shards import INDEX_NAME, INDEX_SUFFIX, SHARD, encode_index
from hf_wmguard.errors import EnvironmentFault, FormatError, ManifestError, NotFoundError, UnsupportedError, UsageError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    RECIPIENTS_NAME,
    WEIGHT_SUFFIXES,
    FileEntry,
    Manifest,
    digest_file,
    is_trainer_state,
    write_manifest,
)
from hf_wmguard.folders import check_new_folder, new_folder
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.protected import divert_unaware

Progress = Callable[[str, int], None]
STAGING_PREFIX = ".wmguard-protect-"
"""A folder of this name holds ciphertext that is not finished, or was killed; the next run clears it away."""
_SUFFIX = ".safetensors"
_OTHER_WEIGHTS = (WEIGHT_SUFFIXES | {".h5", ".msgpack", ".onnx"}) - {_SUFFIX}
_KEYS = {".key", ".pem"}
_NOT_COVERED = {"README.md"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """What `protect_folder` wrote.

    Args:
        model_id: Name of the model.
        iteration: Which version of it.
        set_id: The save.
        signer: Who signed the manifest.
        pinned: Whether it is an owner's key, or one that was made for this save and thrown away.
        files: The ciphertext files.
        size_bytes: Their sizes together.
        left_out: Files of the input that were not handed on: the Trainer's own state.
    """

    model_id: str
    iteration: str
    set_id: str
    signer: str
    pinned: bool
    files: tuple[str, ...]
    size_bytes: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    """The files of a model folder, relative to it."""

    folder: Path
    weights: tuple[str, ...]
    others: tuple[str, ...]
    left_out: tuple[str, ...]


def parse_size(text: str) -> int:
    """Return a size in bytes: ``5GB``, ``500MB``, ``2GiB``, or a number of bytes.

    Raises:
        UsageError: Not a size above 0.
    """
    found = re.fullmatch(r"(\d{1,15})\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or int(found[1]) == 0:
        raise UsageError(f"{text!r} is not a size", hint="write 5GB, 500MB or 2GiB")
    return int(found[1]) * unit


def protect_folder(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    recipients: tuple[str, ...] = (),
    owner_key: str | None = None,
    model_id: str | None = None,
    iteration: str = "1",
    max_shard_bytes: int | None = None,
    hide_names: bool = False,
    suite: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Protected:
    """Write a model folder as ciphertext with recipients, manifest and signed envelope.

    The weights are never in memory, a chunk for each thread apart, and not interpreted: every dtype that safetensors
    files have, quantized models and adapters. Everything is written into a hidden folder beside ``out_dir`` and moved
    at the end: ``out_dir`` is whole or does not exist.

    Args:
        model_dir: A folder with safetensors, one file or shards with an index.
        out_dir: A folder that does not exist yet, or is empty.
        recipients: References to the public keys of who may open it.
        owner_key: Reference to the key that signs, whose holder may open it too. Without one the manifest is signed
            by a key that is thrown away: whole, but nobody's.
        model_id: Name of the model; by default that of its folder.
        iteration: Which version of this model.
        max_shard_bytes: Write new shards of at most so many plaintext bytes (a larger tensor gets one for itself);
            by default the files stay as they are.
        hide_names: Hide names, number and sizes of the tensors; no index is written, because it would tell.
        suite: One of `container.suites.SUITES`; by default what suits the processor.
        threads: By default one per processor, at most 8.
        progress: Called with a file's name and the plaintext bytes just written.
    Raises:
        UsageError: Nobody could open the result; the output folder holds something, or lies inside the input.
        NotFoundError, FormatError: The input cannot be read.
        UnsupportedError: Pickles or other weights that would be handed on in plaintext, keys, or ciphertext.
        EnvironmentFault: The copy cannot be written.
    """
    source, out = Path(model_dir), Path(out_dir)
    if owner_key is None and not recipients:
        raise UsageError("nobody could open the result", hint="name a recipient, or the owner's key")
    owner = load_owner(owner_key) if owner_key is not None else OwnerKey.generate()
    readers = [load_recipient(ref) for ref in recipients]
    if owner_key is not None:
        readers.insert(0, X25519Identity.from_owner(owner).recipient())
    check_new_folder(source, out)
    found = _survey(source)
    context = FileContext(model_id=model_id or source.resolve().name, iteration=iteration, set_id=secrets.token_hex(16))
    with new_folder(out, STAGING_PREFIX) as staging:
        dek = secrets.token_bytes(DEK_BYTES)
        options = {"suite": suite, "hide_names": hide_names, "threads": threads, "progress": progress}
        records = _encrypt(found, staging, dek, context, max_shard_bytes, options)
        if not hide_names:
            _write_index(staging, records)
        _copy_others(found, staging)
        divert_unaware(staging / "config.json")
        sealed = seal_recipients(dek, readers, set_id=context.set_id, model_id=context.model_id)
        commitment = dek_commitment(dek, context.set_id)
        manifest = _manifest(context, commitment, _entries(staging, list(records)))
        write_atomic(staging / RECIPIENTS_NAME, sealed)
        write_manifest(staging, manifest, owner)
    return Protected(
        model_id=context.model_id,
        iteration=iteration,
        set_id=context.set_id,
        signer=owner.key_id(),
        pinned=owner_key is not None,
        files=tuple(record.name for record in records),
        size_bytes=sum(record.size_bytes for record in records),
        left_out=found.left_out,
    )


def _survey(folder: Path) -> _Input:
    """Return what is in a model folder, hidden files apart, or refuse what would leave it in plaintext."""
    weights, others, left_out = [], [], []
    for name in _visible(folder):
        path = Path(name)
        if is_trainer_state(path.name):
            # Optimizer states are as good as weights, and training_args.bin may hold a token.
            left_out.append(name)
        elif path.name in (MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME):
            raise UnsupportedError(f"{folder} is protected already", hint="see wmguard inspect, rewrap and decrypt")
        elif path.suffix.lower() in _OTHER_WEIGHTS:
            raise UnsupportedError(
                f"{name} in {folder} would stay plaintext: only safetensors are encrypted",
                hint="convert it where it is trusted (load it, save_pretrained into a new folder), or move it away",
            )
        elif path.suffix.lower() in _KEYS or not (folder / path).is_file():
            raise UnsupportedError(
                f"{name} in {folder} is a key, or no ordinary file: it is not handed on", hint="move it away"
            )
        elif path.suffix.lower() == _SUFFIX:
            weights.append(name)
        elif not name.endswith(INDEX_SUFFIX):
            others.append(name)
    _check_weights(folder, weights)
    return _Input(folder=folder, weights=tuple(weights), others=tuple(others), left_out=tuple(left_out))


def _visible(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        # Hidden files are a tool's own, or secrets such as .env.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # A link to a folder is not followed, but it is not passed over either.
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]  # noqa: PTH114, PTH118
        for name in sorted((*names, *links)):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(root, name), folder)  # noqa: PTH118


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise EnvironmentFault(f"cannot look into {error.filename}: {error.strerror}", hint="check its permissions")


def _check_weights(folder: Path, weights: list[str]) -> None:
    if not weights:
        raise NotFoundError(f"{folder} holds no safetensors", hint="give a folder that save_pretrained wrote")
    if nested := [name for name in weights if Path(name).name != name]:
        raise UnsupportedError(
            f"{nested[0]} lies in a folder of its own", hint="protect each folder that holds weights by itself"
        )
    _check_shards(folder, weights)
    for name in weights:
        if is_protected(folder / name):
            raise UnsupportedError(f"{name} is ciphertext already", hint="see wmguard inspect, rewrap and decrypt")


def _check_shards(folder: Path, weights: list[str]) -> None:
    parts = [match.groups() for name in weights if (match := SHARD.fullmatch(name))]
    if len({(stem, total) for stem, _, total in parts}) > 1 or len(parts) != len(weights):
        raise UnsupportedError(
            f"{folder} holds {' and '.join(weights[:3])}, which are not the shards of one model",
            hint="give a folder that holds one copy of the weights",
        )
    total = int(parts[0][2] or 1)
    if len(parts) != total or {int(number or 1) for _, number, _ in parts} != set(range(1, total + 1)):
        raise NotFoundError(f"{folder} holds {len(parts)} of {total} shards", hint="fetch the missing shards")


def _encrypt(
    found: _Input,
    staging: Path,
    dek: bytes,
    context: FileContext,
    max_shard_bytes: int | None,
    options: Mapping[str, Any],
) -> dict[FileRecord, dict[str, int]]:
    """Write the ciphertext files; return the record of each, and the sizes of its tensors in bytes."""
    with ExitStack() as stack:
        files = [stack.enter_context(PlainFile(found.folder / name)) for name in found.weights]
        _check_once(files)
        shards = _shards(files, max_shard_bytes)
        more = [] if len(shards) == 1 or options["hide_names"] else [INDEX_NAME]
        _check_names(context, [*shards, *found.others, *more])
        written = {}
        for index, (name, tensors) in enumerate(sorted(shards.items()), start=1):
            record = write_protected(
                staging / name,
                tensors,
                dek=dek,
                context=FileContext(**{**asdict(context), "index": index, "total": len(shards)}),
                metadata=_metadata(files, name),
                **options,
            )
            written[record] = {name: tensor.info().size_bytes for name, tensor in tensors.items()}
    return written


def _check_names(context: FileContext, names: list[str]) -> None:
    """Refuse, before a byte is written, what the manifest at the end could not hold."""
    try:
        entries = [FileEntry(name=name, size_bytes=0, sha256="0" * 64) for name in names]
        _manifest(context, "0" * 64, entries)
    except ManifestError as error:
        raise UsageError(
            error.message.removeprefix("manifest: "),
            hint="choose another --model-id or --iteration, rename the file, or write larger shards",
        ) from None


def _check_once(files: list[PlainFile]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        if PUBLIC_HEADER in file.metadata:
            raise FormatError(f"{file.name} is damaged ciphertext", hint="fetch it again")
        for name in file.tensors:
            if name in seen:
                raise FormatError(
                    f"{name!r} lies in both {seen[name]} and {file.name}: which one is loaded is chance",
                    hint="save the model again",
                )
            seen[name] = file.name


def _shards(files: list[PlainFile], max_shard_bytes: int | None) -> dict[str, dict[str, FileTensor]]:
    """Return the tensors of every file to write; all in the order in which they are read."""
    if max_shard_bytes is None:
        return {file.name: file.tensors for file in files}
    groups: list[dict[str, FileTensor]] = [{}]
    filled = 0
    for file in files:
        for name, tensor in file.tensors.items():
            size_bytes = tensor.info().size_bytes
            if groups[-1] and filled + size_bytes > max_shard_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = tensor
            filled += size_bytes
    match = SHARD.fullmatch(files[0].name)
    stem = match[1] if match else "model"
    if len(groups) == 1:
        return {f"{stem}{_SUFFIX}": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}{_SUFFIX}": group for i, group in enumerate(groups, start=1)}


def _metadata(files: list[PlainFile], name: str) -> dict[str, str]:
    return next((file.metadata for file in files if file.name == name), files[0].metadata)


def _write_index(staging: Path, records: Mapping[FileRecord, Mapping[str, int]]) -> None:
    """Write which tensor lies in which file, where there are several: transformers looks for it."""
    if len(records) < 2:
        return
    name, data = encode_index({record.name: sizes for record, sizes in records.items()})
    write_atomic(staging / name, data)


def _copy_others(found: _Input, staging: Path) -> None:
    for name in found.others:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.folder / name, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _entries(staging: Path, records: list[FileRecord]) -> list[FileEntry]:
    entries = [FileEntry(name=one.name, size_bytes=one.size_bytes, sha256=one.sha256) for one in records]
    names = {entry.name for entry in entries} | _NOT_COVERED
    others = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    return entries + [digest_file(path, name) for name, path in others.items() if name not in names]


def _manifest(context: FileContext, commitment: str, entries: list[FileEntry]) -> Manifest:
    return Manifest(
        model_id=context.model_id,
        iteration=context.iteration,
        set_id=context.set_id,
        created=canonical_time(),
        step=None,
        state="complete",
        files=tuple(sorted(entries, key=lambda entry: entry.name)),
        dek_commitment=commitment,
        commitment=None,
        commitment_time=None,
        signature=None,
        triggers=None,
        sealed_state=None,
    )
