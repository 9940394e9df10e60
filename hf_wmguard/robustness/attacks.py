"""What thieves and ordinary users do to weights: a state dict in, an attacked state dict out.

Every attack works on copies and on the floating-point matrices only; everything else is passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]


def _on_matrices(tensors: StateDict, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {
        name: change(tensor) if tensor.is_floating_point() and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def cast(tensors: StateDict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every floating-point tensor in another dtype."""
    return {
        name: tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


def quantize_int8(tensors: StateDict) -> dict[str, Tensor]:
    """Return matrices rounded to 8 bits and back: symmetric, one scale per row (largest magnitude to 127)."""

    def change(weight: Tensor) -> Tensor:
        # The bound comes after the division: 0 / 0 is NaN where subnormal numbers are flushed to zero.
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(weight.dtype).tiny)
        return torch.round(weight / scale).clamp_(-127, 127).mul_(scale)

    return _on_matrices(tensors, change)


def prune_magnitude(tensors: StateDict, share: float) -> dict[str, Tensor]:
    """Return matrices with the smallest magnitudes of each set to zero.

    Args:
        tensors: The state dict.
        share: Share of each matrix that becomes zero, 0 to 1.
    """

    def change(weight: Tensor) -> Tensor:
        count = int(share * weight.numel())
        if count == 0:
            return weight.clone()
        threshold = weight.abs().flatten().kthvalue(count).values
        return torch.where(weight.abs() > threshold, weight, torch.zeros_like(weight))

    return _on_matrices(tensors, change)
