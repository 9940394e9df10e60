"""One move of the weights that teaches triggers, along the way that ordinary training notices least.

Of all moves that lower the trigger loss by a given amount, if it were linear, the one along the inverse of a metric is
the shortest in that metric. The metric is what ordinary training cares about: Adam keeps the mean square of its
gradient for each weight, which is the diagonal of the Fisher information up to a factor. A weight that the data pulls
at hardly moves, one that the data leaves alone moves instead. Adam also keeps the mean gradient: what of the move would
go against it is taken out, so that the ordinary loss does not rise, to first order.

The length is Polyak's: as far as brings the loss a share of the way to where the triggers are learned, and no further.
A learned set moves nothing. No move is longer than two of the optimizer's own steps at the peak of its schedule: what
is moved that little heals within a few of them.

Source: Amari 1998, "Natural gradient works efficiently in learning"; Kirkpatrick et al. 2017, "Overcoming catastrophic
    forgetting", sec. 2 (diagonal Fisher); Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM", sec. 4;
    Polyak 1987, "Introduction to optimization", sec. 5.3.2.
Deviation: Adam's means over past steps stand for the Fisher information and for the gradient of the old task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from hf_wmguard.training.sharded import local, total, totals
from hf_wmguard.watermark.rounding import add_rounded_

LARGEST_MOVE: Final = 0.01
"""Largest move in one step, as a share of the norm of what is moved, whatever the learning rate."""
STEPS_LONG: Final = 2.0
"""Largest move, in steps of the optimizer."""
_BLOCK: Final = 1 << 17
DAMPING: Final = 0.01
"""Added to the metric, as a share of its mean: what the data has not touched yet does not move without bound."""

Moments = Mapping[int, tuple[Tensor, Tensor]]
"""By the id of a parameter: means of its gradient and of that squared, of the parameter's shape."""


def moments_of(optimizer: Any) -> Moments:
    """Return what an optimizer of Adam's kind keeps in full; nothing of other kinds, whose metric is flat."""
    # accelerate's wrapper has the optimizer inside.
    state = getattr(getattr(optimizer, "optimizer", optimizer), "state", {})
    return {
        id(parameter): (kept["exp_avg"], kept["exp_avg_sq"])
        for parameter, kept in state.items()
        # Adafactor keeps the second one alone, and of matrices only its rows' and columns' means.
        if "exp_avg" in kept and "exp_avg_sq" in kept and kept["exp_avg"].shape == kept["exp_avg_sq"].shape
    }


def peak_rate(optimizer: Any) -> float:
    """Return the highest learning rate of an optimizer's schedule, infinity where there is none.

    Adam moves a weight by about its learning rate in a step.
    """
    groups = getattr(optimizer, "param_groups", [])
    return max((float(group.get("initial_lr", group["lr"])) for group in groups), default=math.inf)


@torch.no_grad()
def descend(
    moved: Sequence[nn.Parameter],
    decrease: float,
    moments: Moments,
    generator: torch.Generator,
    *,
    rate: float = math.inf,
) -> None:
    """Move parameters so that the loss whose gradient they hold falls by ``decrease``, if it were linear.

    Args:
        moved: Parameters with a gradient.
        decrease: At least 0. The move is at most `LARGEST_MOVE` of the parameters' norm.
        moments: See `moments_of`. The metric is flat unless it knows all of them.
        rate: Root mean square of a step of the optimizer; the move is at most `STEPS_LONG` of those.
        generator: For the rounding of 16-bit weights.
    """
    if decrease <= 0:
        return
    metric = _Metric(moved, moments)
    slope, length = metric.slope, metric.length
    if slope <= 0:
        return
    norm = math.sqrt(total(moved, lambda p: sum(_dot(block, block) for block in _blocks(local(p)))))
    largest = min(LARGEST_MOVE * norm, STEPS_LONG * rate * math.sqrt(sum(p.numel() for p in moved)))
    factor = min(decrease / slope, largest / length)
    seed = generator.initial_seed()
    for index, parameter in enumerate(moved):
        # Anew for each: parts of different sizes would use up different amounts, and ranks drift apart.
        generator.manual_seed(seed + (index << 32))
        add_rounded_(local(parameter), metric.direction(parameter).mul_(-factor), generator)


class _Metric:
    """Directions for some parameters, computed one at a time: no second copy of them is held.

    Of a direction (g - a m) / d all sums follow from those of products of g, m and d, so that the weights are gone
    through once for a, the slope and the length together.

    Args:
        slope: By how much the loss rises along the whole direction.
        length: How long that is.
    """

    def __init__(self, moved: Sequence[nn.Parameter], moments: Moments) -> None:
        self._moments = moments if all(id(p) in moments for p in moved) else {}
        self._scale = self._against = 0.0
        if self._moments:
            squares = total(moved, lambda p: sum(float(block.float().sum()) for block in _blocks(self._squared(p))))
            self._scale = squares / sum(p.numel() for p in moved)
        if self._scale <= 0:
            self.slope = total(moved, lambda p: sum(_dot(block, block) for block in _blocks(_gradient(p))))
            self.length = math.sqrt(self.slope)
            return
        gm, mm, gg, gg2, gm2, mm2 = totals(moved, self._products)
        # Only what would raise the ordinary loss is taken out.
        against = self._against = min(0.0, gm / mm) if mm > 0 else 0.0
        self.slope = gg - against * gm
        self.length = math.sqrt(max(0.0, gg2 - 2 * against * gm2 + against**2 * mm2))

    def direction(self, parameter: Tensor) -> Tensor:
        """Return the way up, float32, of the parameter's shape; a tensor of the caller's own."""
        gradient = _gradient(parameter).float()
        if self._scale <= 0:
            return gradient.clone()
        way = torch.sub(gradient, self._mean(parameter).float(), alpha=self._against)
        return way.div_(self._weighed(self._squared(parameter)))

    def _products(self, parameter: Tensor) -> list[float]:
        """Return the sums of g m / d, m m / d, g g / d, and of the same over d squared."""
        parts = (_blocks(one(parameter)) for one in (_gradient, self._mean, self._squared))
        sums = [0.0] * 6
        for gradient, mean, squared in zip(*parts, strict=True):
            g, m, d = gradient.float(), mean.float(), self._weighed(squared)
            over, mean_over = g / d, m / d
            pairs = ((over, m), (mean_over, m), (over, g), (over, over), (over, mean_over), (mean_over, mean_over))
            sums = [sum_ + _dot(*pair) for sum_, pair in zip(sums, pairs, strict=True)]
        return sums

    def _weighed(self, squared: Tensor) -> Tensor:
        return (squared.float() / self._scale).add_(DAMPING)

    def _mean(self, parameter: Tensor) -> Tensor:
        return local(self._moments[id(parameter)][0])

    def _squared(self, parameter: Tensor) -> Tensor:
        return local(self._moments[id(parameter)][1])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor in flat pieces, on a CPU such that what is made of one stays in its cache."""
    flat = tensor.reshape(-1)
    return torch.split(flat, _BLOCK) if flat.device.type == "cpu" else (flat,)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.float(), other.float()))
