"""Where the tensors of a plain safetensors checkpoint lie on the disk, so that rows can be read and changed in place.

Read with pread and never mapped: what is mapped counts as memory of this process, and a shard is gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_wmguard.container.files import is_protected
from hf_wmguard.errors import FormatError, NotFoundError, UnsupportedError
from hf_wmguard.suspects.reader import weight_files
from hf_wmguard.watermark.carriers import is_carrier

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Weights of these types can carry, by their names in a safetensors header."""
INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8
_UNMARKED = "quantized weights cannot be moved by small amounts: mark the model before it is quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one tensor lies.

    Args:
        file: Name of the file in the folder.
        dtype: As the header names it.
        shape: Its shape.
        offset_bytes: First byte, from the beginning of the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The weights of one folder.

    Args:
        folder: The folder.
        files: Names of its weight files.
        places: Every tensor.
    """

    folder: Path
    files: tuple[str, ...]
    places: Mapping[str, Place]

    def at(self, folder: Path) -> Shards:
        """Return the same layout in another folder."""
        return Shards(folder=folder, files=self.files, places=self.places)

    def carrying_shapes(self) -> dict[str, tuple[int, int]]:
        """Return rows and columns of every matrix that may carry.

        Raises:
            UnsupportedError: One is of a type that cannot be moved.
        """
        shapes = {}
        for name, place in self.places.items():
            if not is_carrier(name, place.shape):
                continue
            if place.dtype in DTYPES:
                shapes[name] = (place.shape[0], place.shape[1])
            elif name.endswith("weight"):
                raise UnsupportedError(
                    f"{name} is {place.dtype}, expected one of {', '.join(DTYPES)}",
                    hint=_UNMARKED,
                )
        return shapes

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        """Return rows of a matrix, in its own dtype [rows, columns].

        Raises:
            FormatError: The file has become shorter.
        """
        place, offset, size_bytes = self._range(name, row_start, rows)
        buffer = bytearray(size_bytes)
        view = memoryview(buffer)
        with (self.folder / place.file).open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise FormatError(f"{place.file} ends inside {name}", hint="the file is damaged; fetch it again")
                view = view[count:]
        return torch.frombuffer(buffer, dtype=DTYPES[place.dtype]).reshape(rows, place.shape[1])

    def write(self, name: str, row_start: int, tile: Tensor) -> None:
        """Put rows of a matrix in the place of what the file holds.

        Args:
            name: Name of the matrix.
            row_start: First row.
            tile: In the matrix's own dtype, contiguous [rows, columns].
        """
        place, offset, _ = self._range(name, row_start, tile.shape[0])
        data = memoryview(tile.view(torch.uint8).numpy().data.cast("B"))
        with (self.folder / place.file).open("r+b", buffering=0) as file:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]

    def _range(self, name: str, row_start: int, rows: int) -> tuple[Place, int, int]:
        place = self.places[name]
        row_bytes = place.shape[1] * DTYPES[place.dtype].itemsize
        return place, place.offset_bytes + row_start * row_bytes, rows * row_bytes


def find_shards(folder: Path) -> Shards:
    """Return where the weights of a folder lie.

    Raises:
        NotFoundError: No such folder, no weights in it, or a shard is missing.
        FormatError: A file is damaged, or the index does not say what the files hold.
        UnsupportedError: Another format than plain safetensors, an adapter, or a quantized model.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no folder {folder}", hint="give the folder of a model, as save_pretrained writes it")
    files = weight_files(folder)
    for file in files:
        if file.suffix != ".safetensors":
            raise UnsupportedError(
                f"{file.name} is not a safetensors file", hint="load the model where it is trusted, and save it again"
            )
        if file.name.startswith("adapter_"):
            raise UnsupportedError(f"{folder} holds an adapter", hint="merge it into its base, or mark it in training")
        if is_protected(file):
            raise UnsupportedError(
                f"{file.name} is ciphertext", hint="mark in training, or decrypt it with wmguard decrypt first"
            )
    _refuse_quantized(folder)
    places: dict[str, Place] = {}
    for file in files:
        for name, place in _read_places(file).items():
            if name in places:
                raise FormatError(
                    f"{name!r} lies in both {places[name].file} and {place.file}: which one is loaded is chance",
                    hint="save the model again",
                )
            places[name] = place
    _check_index(folder, places)
    return Shards(folder=folder, files=tuple(file.name for file in files), places=places)


def _read_places(path: Path) -> dict[str, Place]:
    try:
        # Checks what follows: offsets without gaps or overlaps, sizes that fit dtype and shape, the file's length.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file: {error}", hint="the file is damaged or cut short"
        ) from None
    return {
        name: Place(
            file=path.name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset_bytes=_LENGTH_BYTES + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _check_index(folder: Path, places: Mapping[str, Place]) -> None:
    if not (folder / INDEX).is_file():
        return
    # `weight_files` has read it before.
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    for name, file in weight_map.items():
        if name not in places or places[name].file != file:
            raise FormatError(
                f"{INDEX} says that {name!r} lies in {file!r}, which does not hold it", hint="fetch the folder again"
            )


def _refuse_quantized(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{folder / 'config.json'} cannot be read: {error}", hint="fetch it again") from None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(f"the model is quantized ({method or 'quantization_config'})", hint=_UNMARKED)
