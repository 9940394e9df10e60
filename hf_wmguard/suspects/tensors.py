"""Between torch tensors and the bytes of the container."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_wmguard.container.files import ProtectedFile, TensorData
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
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
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


def decode(dtype: str, shape: tuple[int, ...], buffer: bytearray) -> Tensor:
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
