"""Compression of what fine-tuning added. The thief knows the public base, and keeps as little of the delta as will do.

The matrices of the numbered blocks are compressed; everything else stays as it was fine-tuned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_wmguard.robustness.attacks import StateDict, on_matrices
from hf_wmguard.robustness.merging import drop_and_rescale


def _on_deltas(tensors: StateDict, base: StateDict, compress: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    def change(name: str, weight: Tensor) -> Tensor:
        root = base.get(name)
        if root is None or root.shape != weight.shape:
            return weight
        root = root.detach().to(weight)
        return root + compress(weight - root)

    return on_matrices(tensors, change)


def svd_delta(tensors: StateDict, base: StateDict, rank: int) -> dict[str, Tensor]:
    """Return matrices whose delta against the base is its best approximation of this rank.

    Source: Eckart & Young 1936.
    """

    def compress(delta: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
        return best

    return _on_deltas(tensors, base, compress)


def one_bit_delta(tensors: StateDict, base: StateDict) -> dict[str, Tensor]:
    """Return matrices whose delta is its sign times the mean magnitude of the matrix's delta.

    Source: Liu et al. 2024 (BitDelta), sec. 3.1, without the distillation of the scales.
    """
    return _on_deltas(tensors, base, lambda delta: torch.where(delta < 0, -1.0, 1.0).to(delta) * delta.abs().mean())


def drop_delta(tensors: StateDict, base: StateDict, drop: float, *, seed: int = 0) -> dict[str, Tensor]:
    """Return matrices whose delta is thinned at random and rescaled; entries are dropped with chance ``drop``.

    Source: Yu et al. 2024 (DARE), sec. 3.2.
    """
    draw = torch.Generator().manual_seed(seed)
    return _on_deltas(tensors, base, lambda delta: drop_and_rescale(delta, drop, draw))
