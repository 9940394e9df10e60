"""Rounding to few bits and back, from the weights alone. `calibrated` holds what looks at activations as well."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_wmguard.robustness.attacks import StateDict, on_matrices

NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels of NF4. Source: Dettmers et al. 2023 (QLoRA), appendix E."""
LLM_INT8_THRESHOLD = 6.0
"""An input feature that ever reaches this magnitude is an outlier. Source: Dettmers et al. 2022 (LLM.int8), sec. 3."""


def quantize_groups(tensors: StateDict, bits: int, *, group: int = 64) -> dict[str, Tensor]:
    """Return matrices rounded to the nearest of a symmetric grid, one scale per group of weights of a row.

    Args:
        tensors: The state dict.
        bits: 2 to 8; the grid is -(2^(bits-1) - 1) to 2^(bits-1) - 1, its end at the group's largest magnitude.
        group: Weights that share a scale, along the inputs; the last group of a row may be shorter.
    """
    top = 2 ** (bits - 1) - 1

    def change(name: str, weight: Tensor) -> Tensor:
        blocks = _blocks(weight, group)
        scale = (blocks.abs().amax(dim=-1, keepdim=True) / top).clamp_min(torch.finfo(weight.dtype).tiny)
        return _unblock(torch.round(blocks / scale).clamp_(-top, top).mul_(scale), weight)

    return on_matrices(tensors, change)


def quantize_nf4(tensors: StateDict, *, block: int = 64) -> dict[str, Tensor]:
    """Return matrices rounded to the NF4 code book, scaled by the largest magnitude of each block.

    Args:
        tensors: The state dict.
        block: Weights that share a scale, counted over the flattened matrix.
    Source: Dettmers et al. 2023 (QLoRA), sec. 3, without the second quantization of the scales.
    """
    levels = torch.tensor(NF4_CODEBOOK)

    def change(name: str, weight: Tensor) -> Tensor:
        blocks = _blocks(weight.reshape(1, -1), block)
        grid = levels.to(weight)
        scale = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        nearest = torch.bucketize(blocks / scale, (grid[1:] + grid[:-1]) / 2)
        return _unblock(grid[nearest] * scale, weight.reshape(1, -1)).reshape(weight.shape)

    return on_matrices(tensors, change)


def quantize_llm_int8(tensors: StateDict, outliers: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return matrices in fp16 with all but the outlier columns rounded to 8 bits, one scale per row.

    Args:
        tensors: The state dict.
        outliers: bool [inputs] by name of the matrix, True for input features that stay in fp16. Without it, or for a
            matrix that is not in it, none does, which is the harsher attack.
    Source: Dettmers et al. 2022 (LLM.int8), sec. 3.
    """
    kept = outliers or {}

    def change(name: str, weight: Tensor) -> Tensor:
        half = weight.half().to(weight.dtype)
        keep = kept.get(name, torch.zeros(weight.shape[1], dtype=torch.bool)).to(weight.device)
        body = half.masked_fill(keep, 0)
        scale = (body.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(weight.dtype).tiny)
        return torch.where(keep, half, torch.round(body / scale).clamp_(-127, 127) * scale)

    return on_matrices(tensors, change)


def _blocks(weight: Tensor, size: int) -> Tensor:
    """Return [rows, blocks, size]; zeros fill the last block, where they change no largest magnitude."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size))
    return padded.reshape(weight.shape[0], -1, size)


def _unblock(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.reshape(like.shape[0], -1)[:, : like.shape[1]]
