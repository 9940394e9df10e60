"""Which files hold a suspect's weights, and what their digest is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_wmguard.errors import FormatError, NotFoundError
from hf_wmguard.suspects.sources import read_bounded

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
MAX_INDEX_BYTES = 64 << 20
GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
# What a Trainer writes beside the weights.
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})
_HASH_THREADS = 8


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the weight files of a suspect: the file itself, or those of a folder.

    In a folder these are the files its index names, a file of a canonical name, or else all files of one kind.

    Raises:
        NotFoundError: No such path, no weights in the folder, or a file that the index names is missing.
        FormatError: An index that cannot be read, or names files outside the folder; an unknown kind of file.
    """
    if path.is_file():
        known = (".safetensors", GGUF_SUFFIX, *PICKLE_SUFFIXES)
        if path.suffix not in known:
            raise FormatError(
                f"{path}: unknown kind of weight file {path.suffix!r}", hint=f"expected {', '.join(known)}"
            )
        return (path,)
    if not path.is_dir():
        raise NotFoundError(f"no suspect at {path}", hint="give a folder or a weight file")
    present = {file.name for file in path.iterdir() if file.is_file()}
    return tuple(path / name for name in weight_names(present, path, str(path)))


def weight_names(present: Collection[str], folder: Path, where: str) -> list[str]:
    """Return which files of a folder hold the weights.

    Args:
        present: Names of all its files.
        folder: Where its indexes can be read.
        where: What to call it.
    Raises:
        NotFoundError, FormatError: As `weight_files`.
    """
    for name in INDEX_NAMES:
        if name in present:
            return _indexed(folder / name, present, where)
    for name in SINGLE_NAMES:
        if name in present:
            return [name]
    for suffix in (".safetensors", GGUF_SUFFIX, ".bin"):
        found = [name for name in present if name.endswith(suffix) and name not in _NOT_WEIGHTS]
        if found:
            return sorted(found)
    raise NotFoundError(
        f"{where} holds no weights (looked for {', '.join(SINGLE_NAMES)}, their indexes, "
        f"and any .safetensors, {GGUF_SUFFIX} or .bin)",
        hint="if this is the output folder of a run, the run ended without a save: call trainer.save_model()",
    )


def _indexed(index: Path, present: Collection[str], where: str) -> list[str]:
    try:
        names = sorted(set(json.loads(read_bounded(index, MAX_INDEX_BYTES))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{index} is not an index of weights: {error}", hint="the file is damaged; fetch it again"
        ) from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise FormatError(
            f"{index} names no files, or files outside its folder", hint="give the weight files one by one"
        )
    missing = [name for name in names if name not in present]
    if missing:
        raise NotFoundError(f"{where} lacks {', '.join(missing)}", hint="fetch the missing shards")
    return names


def digest(path: Path) -> str:
    """Return the SHA-256 over the names and the SHA-256 of all weight files of a suspect, as hex."""
    files = weight_files(path)
    total = hashlib.sha256()
    for file, one in zip(files, hash_files(files), strict=True):
        total.update(f"{file.name}\0{one}\n".encode())
    return total.hexdigest()


def hash_files(files: Sequence[Path]) -> Iterator[str]:
    """Yield the SHA-256 of each file, as hex. Hashing releases the interpreter lock: shards are hashed side by side."""
    with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1, len(files))) as pool:
        yield from pool.map(_hash, files)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
