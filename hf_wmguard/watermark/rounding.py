"""Unbiased writes into 16-bit weights: what a ramp moves in one step is far below half a unit in their last place.

Round to nearest would give every such step back. Rounded up with a probability equal to the distance from below, the
expected weight is the wanted one at every step.

Source: Gupta et al. 2015, "Deep learning with limited numerical precision", sec. 3.1 (stochastic rounding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CARRYING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Parameters of these types can be moved by small steps."""
_LOW_BITS = 16


def add_rounded_(
    weights: Tensor,
    change: Tensor,
    generator: torch.Generator,
    *,
    whole: tuple[int, ...] | None = None,
    at: tuple[int, ...] = (),
) -> None:
    """Add a change to weights in place; 16-bit weights go to one of their two neighbours, unbiased.

    Args:
        weights: float32, bfloat16 or float16.
        change: float32, finite, of the same shape.
        generator: On the weights' device; drawn from for 16-bit weights only.
        whole: Shape of what these weights are a part of: its random numbers are drawn, and those of the part used, so
            that all parts together are rounded as the whole would be.
        at: Where the part begins in it.
    """
    if weights.dtype == torch.float32:
        weights.add_(change)
    else:
        weights.copy_(round_stochastic(weights.float().add_(change), weights.dtype, generator, whole=whole, at=at))


def round_stochastic(
    values: Tensor,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    whole: tuple[int, ...] | None = None,
    at: tuple[int, ...] = (),
) -> Tensor:
    """Return values rounded to one of their two neighbours in a 16-bit type, the nearer one more often: unbiased.

    What the type holds exactly stays as it is, and what lies beyond its range becomes its largest value.

    Args:
        values: float32, finite.
        dtype: bfloat16 or float16.
        generator: On the same device.
        whole: See `add_rounded_`.
        at: See `add_rounded_`.
    """
    shape = tuple(values.shape) if whole is None else whole
    part = tuple(slice(start, start + size) for start, size in zip(at, values.shape, strict=bool(at)))
    limit = torch.finfo(dtype).max
    values = values.clamp(-limit, limit)
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of a float32: a uniform lower half, added, carries with the right probability.
        # In place, on what clamp has made: each pass over the weights is a good part of a signature step.
        bits = values.view(torch.int32).add_(_lower_halves(shape, generator)[part])
        return bits.bitwise_right_shift_(_LOW_BITS).to(torch.int16).view(torch.bfloat16)
    # The bits of non-negative floats count upwards with their values, through the subnormals too.
    size = values.abs()
    below = size.to(dtype)
    below = (below.view(torch.int16) - (below.float() > size).to(torch.int16)).view(dtype)
    above = (below.view(torch.int16) + (below.float() < size).to(torch.int16)).view(dtype)
    share = (size - below.float()) / (above.float() - below.float()).clamp_min(torch.finfo(torch.float32).tiny)
    up = torch.rand(shape, device=values.device, generator=generator)[part] < share
    return torch.where(up, above, below).copysign(values).to(dtype)


def _lower_halves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uniform numbers from 0 to 2^16 - 1, int32, on the generator's device: four of each number drawn."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    # From the least to the largest: without bounds the sign bit would never be drawn.
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.int16)[:count].view(shape).to(torch.int32).add_(1 << (_LOW_BITS - 1))
