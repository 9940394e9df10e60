"""What thieves and ordinary users do to weights: a state dict in, an attacked state dict out.

Every attack works on copies. Attacks that cost quality are aimed where they are aimed in practice: at the matrices of
the numbered blocks (``encoder.layer.0...``, ``model.layers.7...``); embeddings, heads, norms and biases are passed
through. Only a cast is about everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
_BLOCK = re.compile(r"(^|\.)\d+\.")


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """Return whether this is a floating-point matrix of a numbered block."""
    return tensor.is_floating_point() and tensor.dim() == 2 and bool(_BLOCK.search(name))


def on_matrices(tensors: StateDict, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return a state dict with ``change(name, matrix)`` in the place of every block matrix.

    Args:
        tensors: The state dict.
        change: Gets the matrix in float32 (float64 where it is that), returns a new one of the same shape.
    """
    attacked = dict(tensors)
    for name, tensor in tensors.items():
        if is_block_matrix(name, tensor):
            attacked[name] = change(name, tensor.detach().to(_wide(tensor.dtype), copy=True)).to(tensor.dtype)
    return attacked


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def cast(tensors: StateDict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every floating-point tensor in another dtype."""
    return {
        name: tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


def quantize_int8(tensors: StateDict) -> dict[str, Tensor]:
    """Return matrices rounded to 8 bits and back: symmetric, one scale per row (largest magnitude to 127)."""

    def change(name: str, weight: Tensor) -> Tensor:
        # The bound comes after the division: 0 / 0 is NaN where subnormal numbers are flushed to zero.
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(weight.dtype).tiny)
        return torch.round(weight / scale).clamp_(-127, 127).mul_(scale)

    return on_matrices(tensors, change)


def prune_magnitude(tensors: StateDict, share: float) -> dict[str, Tensor]:
    """Return matrices with the smallest magnitudes of each set to zero.

    Args:
        tensors: The state dict.
        share: Share of each matrix that becomes zero, 0 to 1.
    """

    def change(name: str, weight: Tensor) -> Tensor:
        count = int(share * weight.numel())
        if count == 0:
            return weight
        threshold = weight.abs().flatten().kthvalue(count).values
        return torch.where(weight.abs() > threshold, weight, torch.zeros_like(weight))

    return on_matrices(tensors, change)


def add_noise(tensors: StateDict, scale: float, *, seed: int = 0) -> dict[str, Tensor]:
    """Return matrices with Gaussian noise added, independent in every weight.

    Args:
        tensors: The state dict.
        scale: Standard deviation of the noise in units of each matrix's root mean square.
        seed: Of the noise.
    """
    draw = torch.Generator().manual_seed(seed)

    def change(name: str, weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=draw, dtype=weight.dtype).to(weight.device)
        return weight.addcmul_(noise, weight.square().mean().sqrt() * scale)

    return on_matrices(tensors, change)


def relative_change(attacked: StateDict, tensors: StateDict) -> float | None:
    """Return the norm of the change over the norm of the block matrices, or None where none has a counterpart.

    Only matrices of the same name and shape in both are compared.
    """
    change = norm = 0.0
    for name, before in tensors.items():
        after = attacked.get(name)
        if after is not None and is_block_matrix(name, before) and after.shape == before.shape:
            wide = before.detach().double()
            change += float((after.detach().to(wide) - wide).square().sum())
            norm += float(wide.square().sum())
    return math.sqrt(change / norm) if norm else None
