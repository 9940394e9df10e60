"""How many projections at which steps: small steps win under merging, large ones under pruning and noise.

An attack with per-weight error s (in units of the rms) leaves of each cosine, on average,
rho = exp(-2 pi^2 s^2 / D^2); one that shrinks what was embedded to a share w leaves sinc(1 - w): a merge in which the
owner has weight w, or pruning, which shrinks every projection by the energy it takes. The sum of n cosines then
stands sqrt(2 n) rho standard deviations above its mean without the mark, so that what counts is the energy n rho^2,
summed over the steps. `choose_mix` takes the mix that meets every requirement by the largest factor; `predict` says
what to expect of one attack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from hf_wmguard.errors import FormatError
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_p_weighted

MAX_PROJECTIONS = 6144
"""As many give no attack of the table a chance; beyond it the budget is left unspent."""
ERROR_LEVELS = (0.0, 0.3, 0.6, 1.0)
"""Errors, in units of the rms, that a reading is weighted for; each is a test that the p-value is corrected for."""
_STEPS = ((0.75, 1.0), (1.5, 2.0, 3.0), (5.0, 6.0, 8.0))
_PARTS = 20
_MAX_PARTS = 16
# In units of the rms. Below it a reading could not tell two steps apart; beside larger ones than a config takes, the
# phases would depend on the dithers alone.
_MIN_STEP, _MAX_STEP = 1e-3, 16.0
# Energy n rho^2 at which a 256-bit payload decodes: 3.7 dB per bit, 1.4 dB above the code's 1% point (ADR 6).
_PAYLOAD_ENERGY = 600.0
# The statistic has a standard deviation of about 1/sqrt(2) in units of sqrt(n): three of them are kept in hand.
_SLACK = 3 / math.sqrt(2)


def evidence(log10_p: float) -> float:
    """Return the energy at which log10 p is this small nearly always: ln p = -(sqrt(energy) - slack)^2.

    It is also the expected -ln p itself, which must exceed the wanted one by the slack.
    """
    return (math.sqrt(-log10_p * math.log(10)) + _SLACK) ** 2


class Attenuates(Protocol):
    """What an attack leaves of cosines."""

    def attenuation(self, steps: Tensor) -> Tensor:
        """Return the expected cosine of a marked projection at each step (in units of the rms), float64 [k]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What an attack does to projections.

    Args:
        error: Root mean square of what it adds to a projection, in units of the tile's rms.
        owner_weight: What is left of a projection: the share of the marked model in a merge, 0 to 1.
    """

    error: float = 0.0
    owner_weight: float = 1.0

    def attenuation(self, steps: Tensor) -> Tensor:
        """Return the expected cosine of a marked projection at each step (in units of the rms), float64 [k]."""
        merged = torch.sinc(torch.tensor(1 - self.owner_weight, dtype=torch.float64))
        return merged * torch.exp(-2 * math.pi**2 * self.error**2 / steps**2)


# The attacks that decide, and the energy each must leave. Pruning is that of Gaussian weights by magnitude: the
# smallest 70% hold 0.217 of the energy, the smallest 90% hold 0.561.
_REQUIRED: tuple[tuple[Attack, float], ...] = (
    (Attack(error=0.3), _PAYLOAD_ENERGY),
    (Attack(owner_weight=0.5), _PAYLOAD_ENERGY),
    (Attack(error=0.465, owner_weight=0.783), evidence(-61)),
    (Attack(error=0.749, owner_weight=0.439), evidence(-10)),
    (Attack(error=1.0), evidence(-10)),
    (Attack(owner_weight=0.3, error=0.05), evidence(-31)),
    (Attack(owner_weight=0.1, error=0.05), evidence(-10)),
)


@dataclass(frozen=True, slots=True)
class Mix:
    """How many projections have which step.

    Args:
        parts: Pairs of a step, in units of the rms, and a number of projections; steps ascending.
    """

    parts: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        if (
            any(not (_MIN_STEP <= step <= _MAX_STEP and count > 0) for step, count in self.parts)
            or len(self.parts) > _MAX_PARTS
        ):
            raise FormatError(f"steps {self.parts} are impossible", hint="restore the registry from a backup")

    @classmethod
    def from_json(cls, value: list[Any]) -> Self:
        """Return the mix in a list of pairs.

        Raises:
            FormatError: Not pairs of a number and a count.
        """
        if any(not isinstance(pair, list) or [type(one) for one in pair] != [float, int] for pair in value):
            raise FormatError("steps are not pairs of a step and a count", hint="restore the registry from a backup")
        return cls(tuple((step, count) for step, count in value))

    @property
    def projections(self) -> int:
        """Number of projections in all."""
        return sum(count for _, count in self.parts)

    @property
    def mean_square(self) -> float:
        """Mean of the squared step, in units of the squared rms."""
        return sum(count * step**2 for step, count in self.parts) / max(1, self.projections)

    def of(self, total: int) -> Mix:
        """Return the same mix of another number of projections (largest remainders)."""
        exact = [(step, count * total / max(1, self.projections)) for step, count in self.parts]
        counts = [math.floor(share) for _, share in exact]
        for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i][1])[: total - sum(counts)]:
            counts[i] += 1
        return Mix(tuple((step, count) for (step, _), count in zip(exact, counts, strict=True) if count))


def choose_mix(cost: float, step: float | None = None, room: int = MAX_PROJECTIONS) -> Mix:
    """Return the mix that meets the requirements by the largest factor.

    Args:
        cost: Sum of the squared steps of all projections that the budget allows, in units of the squared rms.
        step: The only step to use, in units of the rms; None for a mix.
        room: Projections that there is room for.
    """
    if step is not None:
        count = min(room, int(cost / step**2))
        return Mix(((step, count),) if count else ())
    steps, shares = _grid()
    counts = shares * cost / steps**2
    counts *= (room / counts.sum(1, keepdim=True)).clamp(max=1.0)
    margins = torch.stack(
        [(counts * attack.attenuation(steps) ** 2).sum(1) / energy for attack, energy in _REQUIRED]
    ).amin(0)
    # Of those that do as well as the best, the one that changes the weights least.
    spent = (counts * steps**2).sum(1)
    best = int(torch.where(margins >= 0.99 * margins.max(), spent, torch.inf).argmin())
    found = zip(steps[best].tolist(), counts[best].tolist(), strict=True)
    return Mix(tuple((one, int(count)) for one, count in found if int(count)))


@lru_cache(maxsize=1)
def _grid() -> tuple[Tensor, Tensor]:
    """Return candidate steps and shares of the cost, float64 [k, 3] each."""
    shares = [(a, b, _PARTS - a - b) for a in range(_PARTS + 1) for b in range(_PARTS + 1 - a)]
    rows = [(steps, parts) for steps in product(*_STEPS) for parts in shares]
    return (
        torch.tensor([steps for steps, _ in rows], dtype=torch.float64),
        torch.tensor([parts for _, parts in rows], dtype=torch.float64) / _PARTS,
    )


def weights_for(error: float, steps: Tensor) -> Tensor:
    """Return what a cosine at each step is worth under an error, at most 1, float64 like ``steps``.

    Args:
        error: In units of the rms.
        steps: Steps in units of the rms, float64 [n].
    """
    weights = Attack(error=error).attenuation(steps)
    return weights / weights.max().clamp_min(1e-300)


def predict(mix: Mix, attack: Attenuates) -> tuple[float, float]:
    """Return the expected log10 p after an attack, and the energy that is left for the payload.

    The p-value is what `Reading.score` would give a statistic at its mean; the energy is sum n rho^2, and a payload
    of 256 bits decodes above `_PAYLOAD_ENERGY`.
    """
    steps = torch.tensor([step for step, _ in mix.parts], dtype=torch.float64)
    counts = [count for _, count in mix.parts]
    rho = attack.attenuation(steps)
    best = 0.0
    for error in ERROR_LEVELS:
        weights = weights_for(error, steps)
        statistic = float(sum(n * w * r for n, w, r in zip(counts, weights.tolist(), rho.tolist(), strict=True)))
        best = min(best, log10_p_weighted(statistic, weights.tolist(), counts))
    energy = float(sum(n * r**2 for n, r in zip(counts, rho.tolist(), strict=True)))
    return log10_bonferroni(best, len(ERROR_LEVELS)), energy


def payload_decodes(energy: float) -> bool:
    """Return whether a payload is expected to decode at this energy."""
    return energy >= _PAYLOAD_ENERGY
