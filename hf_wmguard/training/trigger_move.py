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
    slope, length = metric.slope_and_length()
    if slope <= 0:
        return
    norm = math.sqrt(total(moved, lambda p: float(local(p).float().pow(2).sum())))
    largest = min(LARGEST_MOVE * norm, STEPS_LONG * rate * math.sqrt(sum(p.numel() for p in moved)))
    factor = min(decrease / slope, largest / length)
    seed = generator.initial_seed()
    for index, parameter in enumerate(moved):
        # Anew for each: parts of different sizes would use up different amounts, and ranks drift apart.
        generator.manual_seed(seed + (index << 32))
        add_rounded_(local(parameter), -factor * metric.direction(parameter), generator)


class _Metric:
    """Directions for some parameters, computed one at a time: no second copy of them is held."""

    def __init__(self, moved: Sequence[nn.Parameter], moments: Moments) -> None:
        self._moved = moved
        self._moments = moments if all(id(p) in moments for p in moved) else {}
        self._scale = 0.0
        self._against = 0.0
        if self._moments:
            self._scale = total(moved, lambda p: float(self._squared(p).sum())) / sum(p.numel() for p in moved)
        if self._scale > 0:
            with_mean = total(moved, lambda p: float((self._inverse(p, _gradient(p)) * self._mean(p)).sum()))
            mean_alone = total(moved, lambda p: float((self._inverse(p, self._mean(p)) * self._mean(p)).sum()))
            # Only what would raise the ordinary loss is taken out.
            self._against = min(0.0, with_mean / mean_alone) if mean_alone > 0 else 0.0

    def direction(self, parameter: Tensor) -> Tensor:
        """Return the way up, float32, of the parameter's shape."""
        gradient = _gradient(parameter)
        if self._scale <= 0:
            return gradient
        return self._inverse(parameter, gradient - self._against * self._mean(parameter))

    def slope_and_length(self) -> tuple[float, float]:
        """Return by how much the loss rises along the whole direction, and how long that is."""

        def values_of(parameter: Tensor) -> tuple[float, float]:
            direction = self.direction(parameter)
            return float((direction * _gradient(parameter)).sum()), float(direction.pow(2).sum())

        slope, square = totals(self._moved, values_of)
        return slope, math.sqrt(square)

    def _inverse(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient / (self._squared(parameter) / self._scale + DAMPING)

    def _mean(self, parameter: Tensor) -> Tensor:
        return local(self._moments[id(parameter)][0]).float()

    def _squared(self, parameter: Tensor) -> Tensor:
        return local(self._moments[id(parameter)][1]).float()


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(local(parameter), dtype=torch.float32)
    return local(parameter.grad).float()
