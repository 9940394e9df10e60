"""Checkpoints that quantization libraries saved, read without these libraries and by rows.

bitsandbytes (NF4, FP4 with plain or doubly quantized scales; LLM.int8), torchao as transformers saves it (int8 and
intx weights unpacked to int8) and compressed-tensors ``pack-quantized`` (GPTQ and others). Any other layout stays
what it is stored as, integers, and so is never taken for weights. What is read is float32, the value the library
itself dequantizes to before it rounds to its compute dtype.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_wmguard.errors import FormatError
from hf_wmguard.suspects.sources import Suspect

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16
_MAX_BLOCK = 1 << 20
_AFFINE = frozenset({"Int8Tensor", "IntxUnpackedToInt8Tensor"})
_PACKED_BITS = (2, 4, 8)
_WORD_BITS = 32


class _Matrix(Protocol):
    """One quantized matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weights."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The stored tensors that make it up."""

    @abstractmethod
    def rows(self, stored: Suspect, start: int, count: int) -> Tensor:
        """Return rows in float32."""


@dataclass(frozen=True, slots=True)
class _Dequantized(Suspect):
    """A suspect whose quantized matrices are read as the weights they stand for."""

    stored: Suspect
    sizes: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, _Matrix]
    config: Mapping[str, Any]
    concurrency: int

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.sizes

    def rows(self, name: str, start: int, count: int) -> Tensor:
        if name not in self.matrices:
            return self.stored.rows(name, start, count)
        try:
            return self.matrices[name].rows(self.stored, start, count)
        except (RuntimeError, IndexError, TypeError) as error:
            # Shapes were checked; a dtype that a stranger chose shows only here.
            raise _cannot_be_right(name, str(error)) from None


def dequantized(stored: Suspect, metadata: Mapping[str, str]) -> Suspect:
    """Return a suspect that reads quantized matrices as the weights they stand for: itself where it has none.

    Args:
        stored: The tensors as they are stored.
        metadata: The metadata of its safetensors files.
    Raises:
        FormatError: Quantization data that cannot be right.
    """
    shapes = stored.shapes()
    matrices: dict[str, _Matrix] = {}
    for found in (_four_bit(stored), _eight_bit(shapes), _affine(shapes, metadata), _packed(stored)):
        matrices.update(found)
    if not matrices:
        return stored
    parts = {part for matrix in matrices.values() for part in matrix.parts}
    sizes = {name: shape for name, shape in shapes.items() if name not in parts}
    sizes |= {name: matrix.shape for name, matrix in matrices.items()}
    return _Dequantized(stored, sizes, matrices, stored.config, stored.concurrency)


def _cannot_be_right(name: str, why: str) -> FormatError:
    return FormatError(f"{name}: its quantization data cannot be right: {why}", hint="the file is damaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class _FourBit:
    """bitsandbytes: two codes in a byte, one scale for each block of consecutive weights, rows regardless."""

    name: str
    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float
    state: str

    @property
    def parts(self) -> tuple[str, ...]:
        nested = ("nested_absmax", "nested_quant_map") if self.nested_block else ()
        return (self.name, self.state, *(f"{self.name}.{part}" for part in ("absmax", "quant_map", *nested)))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        blocks = -(-math.prod(self.shape) // self.block)
        wanted = {"absmax": (blocks,), "quant_map": (16,)}
        if self.nested_block:
            wanted |= {"nested_absmax": (-(-blocks // self.nested_block),), "nested_quant_map": (256,)}
        for part, size in wanted.items():
            if shapes.get(f"{self.name}.{part}") != size:
                raise _cannot_be_right(self.name, f"{part} is {shapes.get(f'{self.name}.{part}')}, expected {size}")

    def rows(self, stored: Suspect, start: int, count: int) -> Tensor:
        columns = self.shape[1]
        first, last = start * columns, (start + count) * columns
        # Storage may be of wider items than bytes; the second dimension is 1.
        items = stored.shapes()[self.name][0]
        in_item = -(-math.prod(self.shape) // items)
        begin = first // in_item
        packed = stored.rows(self.name, begin, -(-last // in_item) - begin).contiguous().view(torch.uint8).reshape(-1)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[first - begin * in_item :][: last - first]
        block = first // self.block
        scales = self._scales(stored, block, -(-last // self.block) - block)
        which = torch.arange(first, last) // self.block - block
        levels = stored.rows(f"{self.name}.quant_map", 0, 16).float()
        return (levels[codes.long()] * scales[which]).reshape(count, columns)

    def _scales(self, stored: Suspect, start: int, count: int) -> Tensor:
        scales = stored.rows(f"{self.name}.absmax", start, count)
        if not self.nested_block:
            return scales.float()
        first = start // self.nested_block
        groups = -(-(start + count) // self.nested_block) - first
        outer = stored.rows(f"{self.name}.nested_absmax", first, groups).float()
        levels = stored.rows(f"{self.name}.nested_quant_map", 0, 256).float()
        which = torch.arange(start, start + count) // self.nested_block - first
        return levels[scales.long()] * outer[which] + self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grouped:
    """Integers with one scale, and perhaps one zero point, for each row or each group of columns."""

    name: str
    shape: tuple[int, int]
    scale: str
    zero: str | None = None
    divisor: float = 1.0
    extra: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name, self.scale, *((self.zero,) if self.zero else ()), *self.extra)

    def rows(self, stored: Suspect, start: int, count: int) -> Tensor:
        codes = stored.rows(self.name, start, count)
        if codes.dtype != torch.int8:
            raise TypeError(f"codes are {codes.dtype}, expected int8")
        scales = stored.rows(self.scale, start, count).float().reshape(count, -1)
        values = codes.float().reshape(count, scales.shape[1], -1)
        if self.zero is not None:
            values = values - stored.rows(self.zero, start, count).float().reshape(count, -1, 1)
        return (values * scales[:, :, None] / self.divisor).reshape(count, self.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """compressed-tensors: codes packed into int32, the first in the lowest bits; zero points likewise, by columns."""

    stem: str
    shape: tuple[int, int]
    bits: int
    zero: bool
    grouped: bool

    @property
    def parts(self) -> tuple[str, ...]:
        ends = (
            "packed",
            "scale",
            "shape",
            *(["zero_point"] if self.zero else []),
            *(["g_idx"] if self.grouped else []),
        )
        return tuple(f"{self.stem}_{end}" for end in ends)

    def rows(self, stored: Suspect, start: int, count: int) -> Tensor:
        columns = self.shape[1]
        codes = self._unpack(stored.rows(f"{self.stem}_packed", start, count))[:, :columns].float()
        scales = stored.rows(f"{self.stem}_scale", start, count).float().reshape(count, -1)
        groups = scales.shape[1]
        which = torch.arange(columns) // (columns // groups)
        if self.grouped:
            which = stored.rows(f"{self.stem}_g_idx", 0, columns).long()
        if self.zero:
            in_word = _WORD_BITS // self.bits
            first = start // in_word
            words = stored.rows(f"{self.stem}_zero_point", first, -(-(start + count) // in_word) - first)
            zeros = self._unpack(words.T).T[start - first * in_word :][:count]
            codes = codes - zeros.float()[:, which]
        return codes * scales[:, which]

    def _unpack(self, words: Tensor) -> Tensor:
        if words.dtype != torch.int32:
            raise TypeError(f"codes are packed in {words.dtype}, expected int32")
        shifts = torch.arange(0, _WORD_BITS, self.bits, dtype=torch.int32)
        codes = (words[:, :, None] >> shifts) & ((1 << self.bits) - 1)
        return codes.reshape(words.shape[0], -1) - (1 << (self.bits - 1))


def _four_bit(stored: Suspect) -> Iterator[tuple[str, _Matrix]]:
    shapes = stored.shapes()
    for name, size in shapes.items():
        base, found, _ = name.partition(_STATE)
        if not found or base not in shapes:
            continue
        if len(size) != 1 or not 0 < size[0] <= _MAX_STATE_BYTES:
            raise _cannot_be_right(base, f"its description is {size}")
        shape, block, nested, offset = _read_state(base, stored.rows(name, 0, size[0]))
        items = shapes[base]
        if len(items) != 2 or items[1] != 1 or not 0 < items[0] <= math.prod(shape):
            raise _cannot_be_right(base, f"{items} items for {shape} weights")
        matrix = _FourBit(name=base, shape=shape, block=block, nested_block=nested, offset=offset, state=name)
        matrix.check(shapes)
        yield base, matrix


def _read_state(name: str, packed: Tensor) -> tuple[tuple[int, int], int, int, float]:
    try:
        state: Any = json.loads(bytes(packed.tolist()))
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested, offset = state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _cannot_be_right(name, f"{type(error).__name__} in its description") from None
    whole = all(type(value) is int for value in (*shape, block, nested)) and type(offset) in (int, float)
    if not (
        whole
        and len(shape) == 2
        and all(0 < side < 1 << 31 for side in shape)
        and 0 < block <= _MAX_BLOCK
        and 0 <= nested <= _MAX_BLOCK
        and abs(offset) < math.inf
    ):
        raise _cannot_be_right(name, f"shape {shape}, blocks of {block} and {nested}")
    return (shape[0], shape[1]), block, nested, float(offset)


def _eight_bit(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, _Matrix]]:
    for scale, size in shapes.items():
        base = scale.removesuffix("SCB")
        shape = shapes.get(f"{base}weight", ())
        if base != scale and len(shape) == 2 and size == shape[:1]:
            extra = (f"{base}weight_format",) if f"{base}weight_format" in shapes else ()
            # The scale is the largest magnitude of its row, which stands for 127.
            yield (
                f"{base}weight",
                _Grouped(name=f"{base}weight", shape=(shape[0], shape[1]), scale=scale, divisor=127.0, extra=extra),
            )


def _affine(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Iterator[tuple[str, _Matrix]]:
    for name in metadata:
        module, _, weight = name.rpartition(".")
        codes, scale, zero = (f"{module}._{weight}_{end}" for end in ("qdata", "scale", "zero_point"))
        shape, scales = shapes.get(codes, ()), shapes.get(scale, ())
        if len(shape) != 2 or len(scales) != 2 or _torchao_kind(metadata[name]) not in _AFFINE:
            continue
        if scales[0] != shape[0] or not scales[1] or shape[1] % scales[1] or shapes.get(zero, scales) != scales:
            raise _cannot_be_right(name, f"codes {shape}, scales {scales}, zero points {shapes.get(zero)}")
        yield (
            name,
            _Grouped(name=codes, shape=(shape[0], shape[1]), scale=scale, zero=zero if zero in shapes else None),
        )


def _torchao_kind(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value.get("_type") if isinstance(value, dict) else None


def _packed(stored: Suspect) -> Iterator[tuple[str, _Matrix]]:
    shapes = stored.shapes()
    for name, words in shapes.items():
        stem = name.removesuffix("_packed")
        scales = shapes.get(f"{stem}_scale", ())
        if stem == name or shapes.get(f"{stem}_shape") != (2,) or len(words) != 2 or len(scales) != 2:
            continue
        rows, columns = (int(side) for side in stored.rows(f"{stem}_shape", 0, 2).tolist())
        bits = [bits for bits in _PACKED_BITS if columns > 0 and words == (rows, -(-columns * bits // _WORD_BITS))]
        if len(bits) != 1:
            # Other widths are packed in ways that differ between versions: left as the integers they are.
            continue
        zeros, order = shapes.get(f"{stem}_zero_point"), shapes.get(f"{stem}_g_idx")
        even = scales[0] == rows and scales[1] > 0 and columns % scales[1] == 0
        zeroed = zeros is None or zeros == (-(-rows * bits[0] // _WORD_BITS), scales[1])
        if not (even and zeroed and order in (None, (columns,))):
            raise _cannot_be_right(stem, f"scales {scales}, zero points {zeros}, order {order} for {rows} x {columns}")
        matrix = _Packed(
            stem=stem, shape=(rows, columns), bits=bits[0], zero=zeros is not None, grouped=order is not None
        )
        yield stem, matrix
