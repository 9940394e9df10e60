"""Tensors of a protected folder that are decrypted when, and only if, somebody takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_wmguard.container.files import ProtectedFile
from hf_wmguard.errors import WmguardError
from hf_wmguard.suspects.tensors import decode, read_tensor, torch_dtype


class LazyTensor:
    """Stands where a tensor will be, as the slices of `safetensors.safe_open` do: ``lazy[...]`` decrypts it.

    transformers takes a state dict of these as it takes its own files, tensor by tensor and from several threads.

    Args:
        file: The open protected file.
        name: The tensor's name in it.
        failed: Where the first error goes, see `reraising`. Once there is one, nothing more is decrypted.
    """

    __slots__ = ("_failed", "_file", "_info", "_name")

    def __init__(self, file: ProtectedFile, name: str, failed: list[WmguardError]) -> None:
        self._file = file
        self._name = name
        self._info = file.info(name)
        self._failed = failed

    def get_shape(self) -> list[int]:
        """Return the sizes of the dimensions."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """Return the dtype in safetensors spelling ("BF16")."""
        return self._info.dtype

    @property
    def shape(self) -> torch.Size:
        """The sizes of the dimensions."""
        return torch.Size(self._info.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return torch_dtype(self._info.dtype)

    def is_floating_point(self) -> bool:
        """Return whether the dtype is a floating-point one."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """Return the tensor, or the part of it that an index takes; of leading rows only their chunks are read.

        Raises:
            AuthenticationError, FormatError, EnvironmentFault: As `ProtectedFile.read_into`.
        """
        if self._failed:
            raise self._failed[0]
        try:
            return self._take(index)
        except WmguardError as error:
            self._failed.append(error)
            raise

    def _take(self, index: Any) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        shape = self._info.shape
        if isinstance(first, slice) and first.step in (None, 1) and 0 not in shape[:1] and shape:
            start, stop, _ = first.indices(shape[0])
            if 0 < stop - start < shape[0]:
                row_bytes = self._info.size_bytes // shape[0]
                rows = self._file.read_range(self._name, start * row_bytes, stop * row_bytes)
                return decode(self._info.dtype, (stop - start, *shape[1:]), rows)[(slice(None), *rest)]
        return read_tensor(self._file, self._name)[index]

    def __repr__(self) -> str:
        return f"LazyTensor({self._name!r}, {self._info.dtype}, {list(self._info.shape)})"


def lazy_state_dict(files: Iterable[ProtectedFile], failed: list[WmguardError]) -> dict[str, LazyTensor]:
    """Return all tensors of some open protected files, by name, none of them decrypted yet."""
    return {name: LazyTensor(file, name, failed) for file in files for name in file.names()}


@contextmanager
def reraising(failed: list[WmguardError]) -> Iterator[None]:
    """Raise the first error that a `LazyTensor` met, whatever became of it on its way through somebody's loader.

    transformers collects what goes wrong with single tensors into a report; what is not authentic has to stop a load
    under its own name.
    """
    try:
        yield
    except RuntimeError:
        if not failed:
            raise
    if failed:
        raise failed[0].with_traceback(None)
