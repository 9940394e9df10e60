"""The block formats of GGUF files that the ``gguf`` package can write. Its K-quants can only be read by it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_wmguard.errors import MissingDependencyError
from hf_wmguard.robustness.attacks import StateDict, on_matrices

TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def quantize_gguf(tensors: StateDict, kind: str) -> dict[str, Tensor]:
    """Return matrices as they are read back from a GGUF file of this type.

    Args:
        tensors: The state dict.
        kind: One of `TYPES`. A matrix whose rows are no multiple of its block is left alone, as llama.cpp does.
    Raises:
        MissingDependencyError: The package ``gguf`` is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError:
        raise MissingDependencyError(
            "quantizing to GGUF types needs gguf", hint="run pip install 'hf-wmguard[stress]'"
        ) from None
    type_id = GGMLQuantizationType[kind]
    block, _ = GGML_QUANT_SIZES[type_id]

    def change(name: str, weight: Tensor) -> Tensor:
        if weight.shape[1] % block:
            return weight
        packed = quants.quantize(weight.float().cpu().numpy(), type_id)
        return torch.from_numpy(quants.dequantize(packed, type_id)).to(weight)

    return on_matrices(tensors, change)
