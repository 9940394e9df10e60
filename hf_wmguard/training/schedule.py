"""When the mark is brought in: steps counted from the end of training."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

_logger = logging.getLogger(__name__)
State = Literal["pending", "ramping", "complete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The marked phase: optimizer steps ``start + 1`` to ``end``, counted from 1.

    Args:
        start: Last ordinary step.
        end: Last step of the phase.
    """

    start: int
    end: int

    @classmethod
    def last(cls, epochs: float, *, max_steps: int, steps_per_epoch: int | None) -> Self:
        """Return the phase that covers the last epochs of a run.

        Args:
            epochs: Length in epochs; where the data has no length, the share of ``max_steps`` (at most 1).
            max_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of one epoch, or None for data without a length.
        """
        steps = epochs * steps_per_epoch if steps_per_epoch is not None else min(1.0, epochs) * max_steps
        return cls(start=max(0, max_steps - max(1, math.ceil(steps))), end=max_steps)

    def without_last(self, share: float) -> Phase:
        """Return the phase without a share of it at its end, at least one step."""
        return Phase(start=self.start, end=max(self.start + 1, self.end - math.floor(share * (self.end - self.start))))

    def contains(self, step: int) -> bool:
        """Return whether a step lies in the phase."""
        return self.start < step <= self.end


def last_epochs(channel: str, epochs: float, max_steps: int, steps_per_epoch: int | None) -> Phase:
    """Return the phase of the last epochs, as `Phase.last`; warn where that is more than the whole run."""
    if epochs * (steps_per_epoch or max_steps) > max_steps:
        _logger.warning(
            "%s.last_epochs is %g, longer than this run of %d steps: the mark is brought in from the first step",
            channel,
            epochs,
            max_steps,
        )
    return Phase.last(epochs, max_steps=max_steps, steps_per_epoch=steps_per_epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """Strength of the signature step: 0 before the phase, growing to 1, then held at 1.

    Taking 1/(steps left) of the way at each step moves the weights evenly: after t of T steps a share t/T of the
    way is done, no step is larger than another, and the last one lands on the lattice.

    Args:
        phase: The marked phase.
        share: Share of the phase over which the mark is brought in.
    """

    phase: Phase
    share: float

    @property
    def full(self) -> int:
        """First step after which the mark is complete."""
        return self.phase.start + max(1, math.ceil(self.share * (self.phase.end - self.phase.start)))

    def strength(self, step: int) -> float:
        """Return the share of the remaining way to take after optimizer step ``step``."""
        if step <= self.phase.start:
            return 0.0
        return 1.0 / max(1, self.full - step + 1)

    def state(self, step: int) -> State:
        """Return ``pending``, ``ramping`` or ``complete``: what a save after this step holds."""
        if step <= self.phase.start:
            return "pending"
        return "complete" if step >= self.full else "ramping"


def count_steps(dataloader: Any, accumulation: int) -> int | None:
    """Return the optimizer steps of an epoch, None for data without a length.

    Args:
        dataloader: As this process goes through it.
        accumulation: Batches of a step.
    """
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(1, math.ceil(batches / accumulation))
