"""Merging with another model. The owner weight is the share of the marked model: 1 leaves it, 0 replaces it.

A merge is about every floating-point tensor that all models have in one shape; the rest (a head of the owner's own,
integers) stays the owner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_wmguard.robustness.attacks import StateDict

_PARALLEL = 1e-6


def _merged(tensors: StateDict, others: tuple[StateDict, ...], rule: Callable[..., Tensor]) -> dict[str, Tensor]:
    attacked = dict(tensors)
    for name, tensor in tensors.items():
        rest = [other[name] for other in others if name in other and other[name].shape == tensor.shape]
        if tensor.is_floating_point() and len(rest) == len(others):
            # float64: angles between fine-tunes of one base are small.
            attacked[name] = rule(tensor.detach().double(), *(one.detach().to(tensor.device).double() for one in rest))
            attacked[name] = attacked[name].to(tensor.dtype)
    return attacked


def merge_linear(tensors: StateDict, other: StateDict, weight: float) -> dict[str, Tensor]:
    """Return ``weight`` of the owner's and ``1 - weight`` of the other's weights."""
    return _merged(tensors, (other,), lambda mine, theirs: torch.lerp(theirs, mine, weight))


def merge_slerp(tensors: StateDict, other: StateDict, weight: float) -> dict[str, Tensor]:
    """Return each tensor moved along the great circle from the other's (0) to the owner's (1).

    Source: Shoemake 1985, sec. 3.3, on whole tensors taken as vectors.
    """

    def rule(mine: Tensor, theirs: Tensor) -> Tensor:
        norms = mine.norm() * theirs.norm()
        cosine = float((mine * theirs).sum() / norms) if norms > 0 else 1.0
        angle = math.acos(min(1.0, max(-1.0, cosine)))
        if math.sin(angle) < _PARALLEL:
            return torch.lerp(theirs, mine, weight)
        return (math.sin((1 - weight) * angle) * theirs + math.sin(weight * angle) * mine) / math.sin(angle)

    return _merged(tensors, (other,), rule)


def merge_task_arithmetic(tensors: StateDict, other: StateDict, base: StateDict, scale: float) -> dict[str, Tensor]:
    """Return the base plus ``scale`` times the sum of both deltas.

    Source: Ilharco et al. 2023 (task arithmetic), sec. 4.
    """
    return _merged(tensors, (other, base), lambda mine, theirs, root: root + scale * (mine - root + theirs - root))


def merge_ties(
    tensors: StateDict, other: StateDict, base: StateDict, weight: float, *, density: float = 0.2
) -> dict[str, Tensor]:
    """Return the base plus the disjoint mean of both trimmed deltas where they agree with the elected sign.

    Args:
        tensors: The owner's state dict.
        other: Another fine-tune of the base.
        base: What both were fine-tuned from.
        weight: The owner's weight in election and mean; the other's is ``1 - weight``.
        density: Share of each delta that survives the trim, the largest magnitudes.
    Source: Yadav et al. 2023 (TIES-Merging), algorithm 1.
    Deviation: weighted, and trimmed tensor by tensor, as merging tools do it.
    """
    shares = torch.tensor([weight, 1 - weight], dtype=torch.float64)

    def rule(mine: Tensor, theirs: Tensor, root: Tensor) -> Tensor:
        deltas = torch.stack([_trim(mine - root, density), _trim(theirs - root, density)])
        weights = shares.to(deltas.device).reshape(2, *[1] * root.dim())
        sign = torch.sign((weights * deltas).sum(dim=0))
        voices = weights * ((torch.sign(deltas) == sign) & (deltas != 0))
        total = voices.sum(dim=0)
        mean = (voices * deltas).sum(dim=0) / torch.where(total > 0, total, torch.ones_like(total))
        return root + mean

    return _merged(tensors, (other, base), rule)


def _trim(delta: Tensor, density: float) -> Tensor:
    drop = delta.numel() - math.ceil(density * delta.numel())
    if drop == 0:
        return delta
    threshold = delta.abs().flatten().kthvalue(drop).values
    return torch.where(delta.abs() > threshold, delta, torch.zeros_like(delta))


def merge_dare(
    tensors: StateDict, other: StateDict, base: StateDict, weight: float, *, drop: float = 0.5, seed: int = 0
) -> dict[str, Tensor]:
    """Return the base plus a weighted sum of both deltas, each thinned at random and rescaled.

    Args:
        tensors: The owner's state dict.
        other: Another fine-tune of the base.
        base: What both were fine-tuned from.
        weight: The owner's weight; the other's is ``1 - weight``.
        drop: Chance that an entry of a delta becomes zero; the others are divided by ``1 - drop``.
        seed: Of the choice.
    Source: Yu et al. 2024 (DARE), sec. 3.2.
    """
    draw = torch.Generator().manual_seed(seed)

    def rule(mine: Tensor, theirs: Tensor, root: Tensor) -> Tensor:
        return (
            root
            + weight * drop_and_rescale(mine - root, drop, draw)
            + (1 - weight) * drop_and_rescale(theirs - root, drop, draw)
        )

    return _merged(tensors, (other, base), rule)


def drop_and_rescale(delta: Tensor, drop: float, draw: torch.Generator) -> Tensor:
    """Return a delta with entries dropped at random and the rest divided by ``1 - drop``: the same in expectation."""
    keep = torch.rand(delta.shape, generator=draw).to(delta.device) >= drop
    return delta * keep / (1 - drop)
