"""The encrypted part of a header: what each tensor is in plaintext, and the caller's own metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_wmguard.canonical import canonical_json, parse_canonical, require_object
from hf_wmguard.container.checks import reading
from hf_wmguard.errors import FormatError, UsageError

MAX_INNER_BYTES = 16 * 1024 * 1024
MAX_DIMENSIONS = 64
MAX_TENSOR_BYTES = 1 << 48
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What a tensor is in plaintext.

    Attributes:
        dtype: safetensors spelling ("F32", "BF16").
        shape: Sizes of the dimensions; () for a scalar.
        size_bytes: Plaintext size.
    Raises:
        UsageError: An unknown dtype, an impossible shape, or a size that dtype and shape do not give.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    def __post_init__(self) -> None:
        bits = DTYPE_BITS.get(self.dtype)
        if bits is None:
            raise UsageError(f"dtype {self.dtype!r} is not known", hint=f"one of {', '.join(DTYPE_BITS)}")
        if len(self.shape) > MAX_DIMENSIONS or any(size < 0 for size in self.shape):
            raise UsageError(f"shape {self.shape} is impossible", hint=f"0 to {MAX_DIMENSIONS} dimensions")
        if self.size_bytes > MAX_TENSOR_BYTES or math.prod(self.shape) * bits != self.size_bytes * 8:
            raise UsageError(
                f"{self.size_bytes} bytes are not the size of {self.dtype} {list(self.shape)}",
                hint="pass the contiguous bytes of the tensor, with its own dtype and shape",
            )


def encode_inner(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the plaintext of the inner header."""
    return canonical_json(
        {
            "metadata": dict(metadata),
            "tensors": {name: dataclasses.asdict(info) for name, info in tensors.items()},
        }
    )


def decode_inner(plaintext: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return what `encode_inner` was given.

    Raises:
        FormatError: Not the canonical encoding of any tensors and metadata.
    """
    document = require_object(
        parse_canonical(plaintext, "inner header", MAX_INNER_BYTES),
        {"metadata": (dict,), "tensors": (dict,)},
        "inner header",
    )
    tensors = {}
    for name, value in document["tensors"].items():
        entry = require_object(value, {"dtype": (str,), "shape": (list,), "size_bytes": (int,)}, "inner header entry")
        if any(type(size) is not int for size in entry["shape"]):
            raise FormatError(f"{name!r}: the shape is not a list of integers", hint="write the file again")
        with reading(repr(name)):
            tensors[name] = TensorInfo(
                dtype=entry["dtype"], shape=tuple(entry["shape"]), size_bytes=entry["size_bytes"]
            )
    metadata = document["metadata"]
    if any(type(text) is not str for text in metadata.values()):
        raise FormatError("the metadata are not strings", hint="write the file again")
    return tensors, metadata
