"""Read named weight tiles out of a suspect, whatever it is stored in.

A suspect is somebody else's file: nothing in it is executed (pickles are read with ``weights_only``), and
nothing but the tiles that are asked for is brought into memory, where the format allows it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_wmguard.container.files import ProtectedFile, inspect_file, is_protected
from hf_wmguard.container.format import PUBLIC_HEADER
from hf_wmguard.container.recipients import Identity
from hf_wmguard.errors import AuthenticationError, FormatError, NotFoundError
from hf_wmguard.suspects.protected import open_folder
from hf_wmguard.suspects.tensors import decode
from hf_wmguard.watermark.carriers import Carrier

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
MAX_INDEX_BYTES = 64 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
# What torch's restricted unpickler raises on damaged or hostile input: stack underflow, unknown memo, wrong operand.
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


class Suspect(Protocol):
    """Named matrices that can be read by rows."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor."""

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Return ``count`` whole rows of a tensor of two or more dimensions, from row ``start`` on."""


@dataclass(frozen=True, slots=True)
class _InMemory:
    tensors: Mapping[str, Tensor]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        return self.tensors[name][start : start + count]


@dataclass(frozen=True, slots=True)
class _Safetensors:
    files: Mapping[str, Any]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        tile: Tensor = self.files[name].get_slice(name)[start : start + count]
        return tile


@dataclass(frozen=True, slots=True)
class Encrypted:
    """The ciphertext files of one save, opened: tensor name to file."""

    files: Mapping[str, ProtectedFile]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: file.info(name).shape for name, file in self.files.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        info = self.files[name].info(name)
        row_bytes = info.size_bytes // max(1, info.shape[0])
        buffer = self.files[name].read_range(name, start * row_bytes, (start + count) * row_bytes)
        return decode(info.dtype, (count, *info.shape[1:]), buffer)


@contextmanager
def open_suspect(
    source: str | Path | Mapping[str, Tensor] | nn.Module, *, identities: tuple[Identity, ...] = ()
) -> Iterator[Suspect]:
    """Open a suspect for reading.

    Args:
        source: A folder, plain or protected, a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, a state dict or
            a model.
        identities: What can open a protected folder.
    Raises:
        NotFoundError: No such file, or a folder without weights.
        FormatError: The file cannot be read, or is a pickle that would run code.
        AuthenticationError: A protected folder that no identity opens.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        yield _InMemory(source)
        return
    with ExitStack() as stack:
        yield _open_path(Path(source), identities, stack)


def _open_path(path: Path, identities: tuple[Identity, ...], stack: ExitStack) -> Suspect:
    files = weight_files(path)
    if any(file.suffix == ".safetensors" and is_protected(file) for file in files):
        if not path.is_dir():
            raise AuthenticationError(
                f"{path} is one file of a protected folder",
                hint="give the folder, which holds the manifest and the recipients",
            )
        opened = stack.enter_context(open_folder(path, identities))
        return Encrypted({name: file for file in opened.files for name in file.names()})
    if all(file.suffix == ".safetensors" for file in files):
        handles = [(stack.enter_context(_open_safetensors(file))) for file in files]
        suspect = _Safetensors({name: handle for handle in handles for name in handle.keys()})  # noqa: SIM118
        # Blobs under our own header: ciphertext that was damaged. A stranger's file that only claims to be ours has
        # matrices, and is judged by them.
        if all(len(shape) < 2 for shape in suspect.shapes().values()):
            for file, handle in zip(files, handles, strict=True):
                if PUBLIC_HEADER in (handle.metadata() or {}):
                    inspect_file(file)
        return suspect
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_load_pickle(file))
    return _InMemory(tensors)


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file: {error}", hint="the file is damaged or cut short"
        ) from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Only the zip format of torch 1.6 and later can be mapped.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _BROKEN_PICKLE as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path} is not a readable file of weights: {first}",
            hint="files that would run code when loaded are refused; convert it to safetensors where it is trusted",
        ) from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    named = value.items() if isinstance(value, dict) else ()
    tensors = {str(name): tensor for name, tensor in named if isinstance(tensor, Tensor)}
    if not tensors:
        raise FormatError(f"{path} holds no named tensors", hint="expected a state dict")
    return tensors


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the weight files of a suspect: the file itself, or those a folder's index or canonical names give.

    Raises:
        NotFoundError: No such path, no weights in the folder, or a file that the index names is missing.
        FormatError: An index that cannot be read, or names files outside the folder; an unknown kind of file.
    """
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in _PICKLE_SUFFIXES:
            raise FormatError(
                f"{path}: unknown kind of weight file {path.suffix!r}",
                hint=f"expected .safetensors, {', '.join(_PICKLE_SUFFIXES)}",
            )
        return (path,)
    if not path.is_dir():
        raise NotFoundError(f"no suspect at {path}", hint="give a folder or a weight file")
    for name in INDEX_NAMES:
        if (path / name).is_file():
            return _indexed_files(path / name)
    for name in SINGLE_NAMES:
        if (path / name).is_file():
            return (path / name,)
    raise NotFoundError(
        f"{path} holds no weights (looked for {', '.join(SINGLE_NAMES)} and their indexes)",
        hint="if this is the output folder of a run, the run ended without a save: call trainer.save_model()",
    )


def _indexed_files(index: Path) -> tuple[Path, ...]:
    try:
        with index.open("rb") as file:
            data = file.read(MAX_INDEX_BYTES + 1)
        names = sorted(set(json.loads(data)["weight_map"].values())) if len(data) <= MAX_INDEX_BYTES else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{index} is not an index of weights: {error}", hint="the file is damaged; fetch it again"
        ) from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise FormatError(
            f"{index} names no files, or files outside its folder", hint="give the weight files one by one"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise NotFoundError(f"{index.parent} lacks {', '.join(missing)}", hint="fetch the missing shards")
    return tuple(index.parent / name for name in names)


def find_tensor(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the suspect's name of a tensor: the same, or the only one that differs by a prefix and has its shape.

    A fixed rule that does not look at weights, so that it is no further test to correct for.
    """
    if shapes.get(name) == shape:
        return name
    same = [
        other
        for other, size in shapes.items()
        if size == shape and (other.endswith("." + name) or name.endswith("." + other))
    ]
    return same[0] if len(same) == 1 else None


def tile_reader(suspect: Suspect) -> Callable[[Carrier], Tensor | None]:
    """Return a function that reads a carrier's tile out of a suspect, or None where the suspect has no such matrix."""
    shapes = suspect.shapes()

    def tile_of(carrier: Carrier) -> Tensor | None:
        name = find_tensor(carrier.name, carrier.shape, shapes)
        if name is None:
            return None
        tile = suspect.rows(name, carrier.row_start, carrier.rows)
        return tile if tile.is_floating_point() else None

    return tile_of


def digest(path: Path) -> str:
    """Return the SHA-256 over the names and the SHA-256 of all weight files of a suspect, as hex."""
    total = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            one = hashlib.file_digest(stream, "sha256")
        total.update(f"{file.name}\0{one.hexdigest()}\n".encode())
    return total.hexdigest()
