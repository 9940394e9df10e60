"""Between torch tensors and the bytes of the container."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hf_wmguard.container.files import ProtectedFile, TensorData, TensorInfo
from hf_wmguard.errors import FormatError, UnsupportedError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def encode(name: str, tensor: Tensor) -> TensorData:
    """Return a tensor as dtype, shape and its bytes in row-major order, sharing memory where it is on the CPU.

    Raises:
        UnsupportedError: A dtype that safetensors files do not have.
    """
    if tensor.dtype not in _NAMES:
        raise UnsupportedError(f"{name}: dtype {tensor.dtype} cannot be saved", hint="convert the tensor first")
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return TensorData(
        dtype=_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        data=flat.view(torch.uint8).numpy().data.cast("B"),
    )


class TensorBytes:
    """A tensor whose bytes are brought to the CPU, contiguous, when the first of them is asked for.

    Args:
        name: For messages.
        tensor: On any device.
    Raises:
        UnsupportedError: As `encode`.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in _NAMES:
            raise UnsupportedError(f"{name}: dtype {tensor.dtype} cannot be saved", hint="convert the tensor first")
        self._name, self._tensor = name, tensor
        self._bytes: memoryview | None = None
        self._lock = threading.Lock()

    def info(self) -> TensorInfo:
        """Return what the tensor is; moves nothing."""
        size_bytes = self._tensor.numel() * self._tensor.element_size()
        return TensorInfo(dtype=_NAMES[self._tensor.dtype], shape=tuple(self._tensor.shape), size_bytes=size_bytes)

    def part(self, start: int, stop: int, scratch: memoryview) -> memoryview:
        """Return the bytes ``start`` to ``stop``, not copied where the tensor is contiguous on the CPU."""
        with self._lock:
            if self._bytes is None:
                self._bytes = encode(self._name, self._tensor).view()
        return self._bytes[start:stop]


class Encoded(Mapping[str, TensorBytes]):
    """Tensors as `write_protected` takes them: one that lies on another device is copied when it is its turn."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorBytes:
        # A new one for each look: the copy goes when the writer is done with it.
        return TensorBytes(name, self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def decode(dtype: str, shape: tuple[int, ...], buffer: bytearray | memoryview) -> Tensor:
    """Return the tensor in a buffer, without copying it.

    Raises:
        FormatError: An unknown dtype, or a buffer that does not hold the shape.
    """
    known = torch_dtype(dtype)
    if not buffer and 0 in shape:
        return torch.empty(shape, dtype=known)
    try:
        return torch.frombuffer(buffer, dtype=known).reshape(shape)
    except (ValueError, RuntimeError) as error:
        raise FormatError(
            f"tensor of {len(buffer)} bytes is not {dtype} {shape}: {error}", hint="the file is damaged; fetch it again"
        ) from None


def has_name(dtype: torch.dtype) -> bool:
    """Return whether tensors of this dtype can be stored."""
    return dtype in _NAMES


def torch_dtype(dtype: str) -> torch.dtype:
    """Return what torch calls a dtype in safetensors spelling.

    Raises:
        FormatError: An unknown dtype.
    """
    if dtype not in _DTYPES:
        raise FormatError(f"tensor has unknown dtype {dtype!r}", hint="read it with a newer version of hf-wmguard")
    return _DTYPES[dtype]


def read_tensor(file: ProtectedFile, name: str) -> Tensor:
    """Return a tensor decrypted where it will stay: there is no second copy of it, and no zeroed memory first.

    Raises:
        FormatError, AuthenticationError, UsageError: As `ProtectedFile.read_into`.
    """
    info = file.info(name)
    tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    file.read_into(name, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor
