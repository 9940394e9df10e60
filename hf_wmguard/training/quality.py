"""What marking may cost: quality before and after, and a loss that jumps in between."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_wmguard.config import QualityConfig
from hf_wmguard.errors import ConfigError, QualityError
from hf_wmguard.training.mark import Mark
from hf_wmguard.training.ranks import Ranks

BEFORE, AFTER = "wmguard/quality_before", "wmguard/quality_after"
"""Names under which the two values are logged; the first is also where a resumed run finds its own."""
_SMALLER_IS_BETTER = ("loss", "perplexity", "error", "errors", "ppl", "nll", "mse", "rmse", "mae", "wer", "cer", "ter")
_SMALLER_ENDINGS = ("loss", "perplexity", "error")
_RECENT = 8
_FEWEST = 3
_logger = logging.getLogger(__name__)


class QualityGate:
    """Compares a model before its marked phase with what came out.

    Where several processes train, each of them measures, and the main one's numbers count: all of them come to the same
    end.

    Args:
        config: Which metric, and how much worse it may be.
        measure: Returns the metric of the model as it is now.
    """

    def __init__(self, config: QualityConfig, measure: Callable[[], float]) -> None:
        self._config = config
        self._measure = measure
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._breach: QualityError | None = None
        self.before: float | None = None
        self.after: float | None = None

    def measure_before(self) -> float:
        """Measure the model as it is before anything of the mark is in it."""
        self.before = self._measured()
        return self.before

    def measure_after(self) -> float:
        """Measure the finished model.

        Raises:
            QualityError: It is worse than the config allows, and saving such a model is not allowed: from now on
                `check_save` raises it too.
        """
        try:
            return self._compared()
        except QualityError as error:
            self._breach = error
            raise

    def check_resumed(self, step: int, first: int, where: str) -> None:
        """Refuse to go on inside the marked phase without what was measured before it.

        Args:
            step: Optimizer steps done.
            first: Those before the marked phase.
            where: It was looked for, for the message.
        Raises:
            ConfigError: There is no such value.
        """
        if self.before is None and step > first:
            raise ConfigError(
                f"resuming at step {step}, inside the marked phase, with no {BEFORE} {where}",
                hint="resume without quality, or from a checkpoint of step "
                f"{first} or before: what the model was worth unmarked cannot be measured any more",
            )

    @property
    def is_breached(self) -> bool:
        """Whether the finished model was refused."""
        return self._breach is not None

    def check_save(self) -> None:
        """Refuse to save a model that `measure_after` has refused.

        Raises:
            QualityError: It has; the same numbers.
        """
        if self._breach is not None:
            raise QualityError(self._breach.message, hint=self._breach.hint)

    def metrics(self) -> dict[str, float]:
        """Return what has been measured, under the names that are logged."""
        return {name: value for name, value in ((BEFORE, self.before), (AFTER, self.after)) if value is not None}

    @property
    def recent(self) -> tuple[float, ...]:
        """The last training losses that were no jumps: what a resumed run has to know of them."""
        return tuple(self._recent)

    def _compared(self) -> float:
        self.after = self._measured()
        if self.before is None or not self._is_worse(self.before, self.after):
            return self.after
        text = (
            f"{self._config.metric} went from {self.before:.6g} to {self.after:.6g} in the marked phase, "
            f"more than {self._config.tolerance:.3g} of it"
        )
        if self._config.on_breach == "stop":
            raise QualityError(
                f"{text}: the marked model is not saved",
                hint="start a new run with a lower signature.budget or a larger triggers.every_n_steps; "
                "quality.on_breach: warn saves it all the same",
            )
        _logger.warning("%s; it is saved all the same, as quality.on_breach says", text)
        return self.after

    def note_loss(self, loss: float) -> bool:
        """Return whether a training loss is so much above the usual that the mark waits; asks no other process."""
        usual = statistics.median(self._recent) if len(self._recent) >= _FEWEST else math.inf
        jumped = not math.isfinite(loss) or loss > self._config.spike * usual
        # A jump does not count as usual: one that stays would otherwise end the wait.
        if not jumped:
            self._recent.append(loss)
        return jumped

    def _measured(self) -> float:
        ranks = Ranks.current()
        with ranks.together("measuring quality"):
            own = self._measure()
        value = ranks.from_main("measuring quality", lambda: own)
        if not math.isfinite(value):
            raise QualityError(
                f"{self._config.metric} is {value}", hint="training has diverged: resume from an earlier checkpoint"
            )
        return value

    def _is_worse(self, before: float, after: float) -> bool:
        greater = self._config.greater_is_better
        if greater is None:
            greater = _greater_is_better(self._config.metric)
        change = before - after if greater else after - before
        return change > self._config.tolerance * abs(before)


def _greater_is_better(metric: str) -> bool:
    words = re.split(r"[^a-z0-9]+", metric.lower())
    return not any(word in _SMALLER_IS_BETTER or word.endswith(_SMALLER_ENDINGS) for word in words)


def named(metrics: Mapping[str, Any], metric: str) -> float | None:
    """Return the metric of that name, with or without ``eval_`` before it; None where there is none.

    A perplexity that is not among them is made from the loss beside it.
    """
    name = metric.removeprefix("eval_")
    for key in (metric, name, f"eval_{name}"):
        if key in metrics:
            return _number(metric, metrics[key])
    if name.endswith("perplexity"):
        loss = named(metrics, f"{name.removesuffix('perplexity')}loss")
        return None if loss is None else math.exp(min(700.0, loss))
    return None


def unknown(metric: str, metrics: Iterable[str], *, hint: str) -> ConfigError:
    """Return what to raise where a metric is not among those that were found."""
    known = sorted(name.removeprefix("eval_") for name in metrics)
    return ConfigError(f"quality.metric {metric!r} is none of {', '.join(known)}", hint=hint)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give torch's random numbers and every module's mode back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training


def pause(mark: Mark, jumped: bool) -> None:
    """Let a mark wait, or go on, and say so where that is new."""
    if jumped != mark.paused:
        _logger.warning("the training loss has %s", "jumped: the mark waits" if jumped else "come down: it goes on")
    mark.paused = jumped


def _number(metric: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"quality.metric {metric!r} is {type(value).__name__}, expected a number",
            hint="name a metric of one number",
        ) from error
