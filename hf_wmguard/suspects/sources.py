"""What a suspect is to its reader: named matrices, read by rows. Here in memory, in safetensors and in ciphertext."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hf_wmguard.container.files import ProtectedFile
from hf_wmguard.container.plain import FileTensor
from hf_wmguard.errors import FormatError
from hf_wmguard.suspects.tensors import decode

REMOTE_READERS = 16


class Suspect(ABC):
    """Named matrices that can be read by rows."""

    is_delta: bool = False
    """Whether what is read is a change of weights, on top of a base model that the suspect does not hold."""

    concurrency: int = 1
    """How many threads may read at once to good effect: several where each read waits for a network."""

    config: Mapping[str, Any]
    """The suspect's ``config.json``, or nothing: what heads a fused matrix is interleaved by."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor."""

    @abstractmethod
    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Return ``count`` rows of a tensor from row ``start`` on.

        A tensor of more than two dimensions is read as the matrix of all but its last dimension; the rows of a
        vector are its elements.

        Raises:
            FormatError: What is stored there cannot be read.
        """

    def alias(self, name: str) -> str | None:
        """Return under which name the suspect would hold a Hugging Face name, where it keeps names of its own."""
        return None


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as `Suspect.rows` sees it: all dimensions but the last are one."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 2 else shape


@dataclass(frozen=True, slots=True)
class InMemory(Suspect):
    """A state dict."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        tensor = self.tensors[name]
        return tensor.reshape(matrix_shape(tuple(tensor.shape)))[start : start + count]


@dataclass(frozen=True, slots=True)
class Safetensors(Suspect):
    """Mapped safetensors files: tensor name to open file, and to its shape."""

    files: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.sizes

    def rows(self, name: str, start: int, count: int) -> Tensor:
        stored, shape = self.files[name].get_slice(name), self.sizes[name]
        try:
            if len(shape) == 3:
                # One expert at a time, so that no more than the rows asked for is read.
                inner = shape[1]
                experts = range(start // inner, -(-(start + count) // inner))
                spans = [(e, max(start - e * inner, 0), min(start + count - e * inner, inner)) for e in experts]
                return torch.cat([stored[e, first:last] for e, first, last in spans])
            if len(shape) > 3:
                whole: Tensor = self.files[name].get_tensor(name)
                return whole.reshape(matrix_shape(shape))[start : start + count]
            tile: Tensor = stored[start : start + count]
        except SafetensorError as error:
            raise FormatError(f"{name} cannot be read: {error}", hint="it is stored in an unknown dtype") from None
        return tile


@dataclass(frozen=True, slots=True)
class Ranges(Suspect):
    """Plain safetensors files that are kept elsewhere: of each tensor only the bytes of its rows are fetched."""

    tensors: Mapping[str, FileTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = REMOTE_READERS

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.what.shape for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        tensor = self.tensors[name]
        shape = matrix_shape(tensor.what.shape)
        row_bytes = tensor.what.size_bytes // max(1, shape[0])
        data = bytearray(count * row_bytes)
        tensor.part(start * row_bytes, (start + count) * row_bytes, memoryview(data))
        return decode(tensor.what.dtype, (count, *shape[1:]), data)


@dataclass(frozen=True, slots=True)
class Encrypted(Suspect):
    """The ciphertext files of one save, opened: tensor name to file."""

    files: Mapping[str, ProtectedFile]
    config: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 1

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: file.info(name).shape for name, file in self.files.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        info = self.files[name].info(name)
        shape = matrix_shape(info.shape)
        row_bytes = info.size_bytes // max(1, shape[0])
        buffer = self.files[name].read_range(name, start * row_bytes, (start + count) * row_bytes)
        return decode(info.dtype, (count, *shape[1:]), buffer)


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return the contents of a small file.

    Raises:
        FormatError: The file is larger than the limit.
    """
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise FormatError(f"{path} is larger than {limit_bytes} bytes", hint="no such file is that large")
    return data
