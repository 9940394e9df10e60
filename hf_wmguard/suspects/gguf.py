"""Read matrices out of GGUF files: only the rows asked for are dequantized, and stand in Hugging Face's order.

The converter of llama.cpp gives tensors names of its own, and for some architectures puts the rows of queries and
keys in another order: within a head, row (half, i) becomes row (i, half), as its rotary embedding wants it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_wmguard.container.source import Source
from hf_wmguard.errors import FormatError, MissingDependencyError
from hf_wmguard.suspects.gguf_header import Header, TensorInfo, read_header
from hf_wmguard.suspects.sources import Suspect, matrix_shape

# Architectures whose queries and keys the converter permutes; all others keep Hugging Face's order.
_PERMUTED = frozenset(
    {
        "llama",
        "llama-embed",
        "mistral3",
        "llada",
        "deci",
        "granite",
        "granitemoe",
        "minicpm",
        "olmo",
        "arctic",
        "deepseek",
        "xverse",
        "smollm3",
        "arcee",
        "chameleon",
    }
)
_PERMUTED_TENSOR = re.compile(r"blk\.(\d+)\.attn_(q|k)\.weight")
# What the converter rearranges in other ways (fused heads regrouped, a square Conv1D transposed, value heads tiled)
# has no name here: it could only be found by its shape.
_REARRANGED = {
    "bloom": "attn_qkv",
    "gptneox": "attn_qkv",
    "falcon": "attn_qkv",
    "gpt2": "attn_output",
    "qwen3next": "attn_qkv|attn_gate|ssm_",
    "qwen35": "attn_qkv|attn_gate|ssm_",
    "qwen35moe": "attn_qkv|attn_gate|ssm_",
}
_BLOCK = re.compile(r"(?<![^.])\d+(?=\.)")


class Gguf(Suspect):
    """One model in one or several GGUF files.

    Args:
        files: The files, open for reading; the metadata is that of the first that names an architecture.
    Raises:
        MissingDependencyError: The package `gguf` is not installed.
        FormatError: A file that cannot be read, or two tensors of one name.
    """

    def __init__(self, files: Sequence[Source]) -> None:
        try:
            import gguf
        except ImportError:
            raise MissingDependencyError(
                "reading GGUF files needs the package gguf", hint="pip install 'hf-wmguard[gguf]'"
            ) from None
        # The converter has written the rows of fused matrices one part after the other.
        self.config = {}
        self._quants = gguf.quants
        self._kinds = gguf.GGMLQuantizationType
        self._sizes: dict[int, tuple[int, int]] = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        headers = [read_header(file, self._sizes) for file in files]
        self._tensors: dict[str, tuple[Source, TensorInfo]] = {}
        for file, header in zip(files, headers, strict=True):
            self._add(file, header)
        metadata: Mapping[str, Any] = next(
            (one.metadata for one in headers if "general.architecture" in one.metadata), {}
        )
        self._architecture = metadata.get("general.architecture")
        known = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}
        arch = known.get(self._architecture) if isinstance(self._architecture, str) else None
        # The map of one block serves for all: names differ by the number of the block only.
        self._names = None if arch is None else gguf.get_tensor_name_map(arch, 1)
        self._heads = {name: heads for name in self._tensors if (heads := self._permuted_heads(name, metadata))}

    def _add(self, file: Source, header: Header) -> None:
        for name, info in header.tensors.items():
            if name in self._tensors:
                raise FormatError(
                    f"{file.name} holds {name!r}, as another file does", hint="give one of the files, not their folder"
                )
            if self._can_dequantize(info.kind):
                self._tensors[name] = (file, info)

    def _can_dequantize(self, kind: int) -> bool:
        block = np.zeros((1, self._sizes[kind][1]), dtype=np.uint8)
        try:
            self._quants.dequantize(block, self._kinds(kind))
        except NotImplementedError:
            return False
        return True

    def _permuted_heads(self, name: str, metadata: Mapping[str, Any]) -> int:
        """Return how many heads a tensor's rows are permuted in, 0 for none."""
        match = _PERMUTED_TENSOR.fullmatch(name)
        if match is None or self._architecture not in _PERMUTED:
            return 0
        heads = metadata.get(f"{self._architecture}.attention.head_count")
        if match[2] == "k":
            heads = metadata.get(f"{self._architecture}.attention.head_count_kv", heads)
        if isinstance(heads, list):
            block = int(match[1][:9])
            heads = heads[block] if block < len(heads) else None
        rows = self._tensors[name][1].shape[0]
        if type(heads) is not int or heads <= 0 or rows % (2 * heads):
            raise FormatError(
                f"{name} has {rows} rows for {heads} heads", hint="the metadata is damaged; fetch the file again"
            )
        return heads

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, (_, info) in self._tensors.items()}

    def rows(self, name: str, start: int, count: int) -> Tensor:
        file, info = self._tensors[name]
        shape = matrix_shape(info.shape)
        weights, block_bytes = self._sizes[info.kind]
        if len(shape) == 1:
            # The elements of a vector: all are read, of which there are few.
            return self._dequantized(file, info, shape[0] // weights * block_bytes, np.arange(1))[
                0, start : start + count
            ]
        wanted = np.arange(start, start + count)
        if name in self._heads:
            head = shape[0] // self._heads[name]
            inside = wanted % head
            half = head // 2
            wanted = wanted - inside + 2 * (inside % half) + inside // half
        return self._dequantized(file, info, shape[1] // weights * block_bytes, wanted)

    def _dequantized(self, file: Source, info: TensorInfo, row_bytes: int, wanted: np.ndarray[Any, Any]) -> Tensor:
        # In one piece, with the rows between those that are wanted: permuted rows lie within one head.
        first, last = (int(wanted.min()), int(wanted.max()) + 1) if wanted.size else (0, 0)
        data = bytearray((last - first) * row_bytes)
        file.read_into(memoryview(data), info.offset_bytes + first * row_bytes)
        stored = np.frombuffer(data, dtype=np.uint8).reshape(-1, row_bytes)[wanted - first]
        # A scale that is not finite is the reader's to report, not NumPy's.
        with np.errstate(all="ignore"):
            values = self._quants.dequantize(np.ascontiguousarray(stored), self._kinds(info.kind))
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def alias(self, name: str) -> str | None:
        if self._names is None or not name.endswith(".weight"):
            return None
        block = _BLOCK.search(name)
        if block is None:
            return None
        key = f"{name[: block.start()]}0{name[block.end() :]}".removesuffix(".weight")
        # A base model lacks the prefix that the map's names have, a wrapped one has more.
        for candidate in (key, f"model.{key}", f"transformer.{key}", *_shortened(key)):
            found = self._names.get_name(candidate)
            if found is not None and found.startswith("blk.0."):
                leaf = found.removeprefix("blk.0.")
                moved = re.match(_REARRANGED.get(str(self._architecture), r"(?!)"), leaf)
                return None if moved else f"blk.{block[0]}.{leaf}.weight"
        return None


def _shortened(key: str) -> list[str]:
    """Return what a key ends in, as long as the number of its block is left."""
    parts = key.split(".")
    return [".".join(parts[first:]) for first in range(1, parts.index("0") + 1)] if "0" in parts else []
