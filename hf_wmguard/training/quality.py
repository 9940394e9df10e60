"""What marking may cost: quality before and after, and a loss that jumps in between."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_wmguard.config import QualityConfig
from hf_wmguard.errors import ConfigError, QualityError
from hf_wmguard.metrics import load_metric
from hf_wmguard.training.saving import inner_model

BEFORE, AFTER = "wmguard/quality_before", "wmguard/quality_after"
"""Names under which the two values are logged; the first is also where a resumed run finds its own."""
_PREFIX = "wmguard"
_SMALLER_IS_BETTER = ("loss", "perplexity", "error", "errors", "ppl", "nll", "mse", "rmse", "mae", "wer", "cer", "ter")
_SMALLER_ENDINGS = ("loss", "perplexity", "error")
_WRITES_ON = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OWN = ("accuracy", "loss", "perplexity")
_RECENT = 8
_FEWEST = 3
_logger = logging.getLogger(__name__)


class QualityGate:
    """Compares a model before its marked phase with what came out.

    Args:
        config: Which metric, and how much worse it may be.
        measure: Returns the metric of the model as it is now.
    """

    def __init__(self, config: QualityConfig, measure: Callable[[], float]) -> None:
        self._config = config
        self._measure = measure
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.before: float | None = None
        self.after: float | None = None

    def measure_before(self) -> float:
        """Measure the model as it is before anything of the mark is in it."""
        self.before = self._measured()
        return self.before

    def measure_after(self) -> float:
        """Measure the finished model.

        Raises:
            QualityError: It is worse than the config allows, and saving such a model is not allowed.
        """
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
        """Return whether a training loss is so much above those before it that the mark waits."""
        usual = statistics.median(self._recent) if len(self._recent) >= _FEWEST else math.inf
        jumped = not math.isfinite(loss) or loss > self._config.spike * usual
        # A jump does not count as usual: one that stays would otherwise end the wait.
        if not jumped:
            self._recent.append(loss)
        return jumped

    def _measured(self) -> float:
        value = self._measure()
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


def check_metric(trainer: Any, metric: str) -> None:
    """Refuse a metric that a Trainer without ``compute_metrics`` does not have; with one, its first result will tell.

    Raises:
        ConfigError: There is no such metric.
    """
    if trainer.compute_metrics is None and metric.removeprefix("eval_") not in _OWN:
        raise _no_metric(metric, _OWN)


def _no_metric(metric: str, known: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"quality.metric {metric!r} is none of {', '.join(known)}",
        hint="return it from compute_metrics, or name another",
    )


def measure_with(trainer: Any, metric: str) -> float:
    """Return a metric of a Trainer's model on its evaluation data; nothing is logged.

    Args:
        trainer: The Trainer.
        metric: ``loss``, ``perplexity``, ``accuracy``, or a name that its ``compute_metrics`` gives.
    Raises:
        ConfigError: There is no evaluation data, or no such metric.
    """
    if trainer.eval_dataset is None:
        raise ConfigError("quality needs data to evaluate on", hint="pass eval_dataset to the Trainer")
    name = metric.removeprefix("eval_")
    device, plain_preprocess = trainer.args.device, trainer.preprocess_logits_for_metrics
    if name == "accuracy" and trainer.compute_metrics is None:
        # One number in the place of a whole vocabulary's: all of them are kept until the last batch.
        trainer.preprocess_logits_for_metrics = _best
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = trainer.evaluation_loop(
                trainer.get_eval_dataloader(),
                description="quality",
                # Predictions are collected only where something is made of them.
                prediction_loss_only=None if trainer.compute_metrics is not None or name == "accuracy" else True,
                metric_key_prefix=_PREFIX,
            )
    finally:
        trainer.preprocess_logits_for_metrics = plain_preprocess
    metrics: Mapping[str, float] = found.metrics
    if f"{_PREFIX}_{name}" in metrics:
        return float(metrics[f"{_PREFIX}_{name}"])
    if name == "perplexity" and f"{_PREFIX}_loss" in metrics:
        return math.exp(min(700.0, metrics[f"{_PREFIX}_loss"]))
    if name == "accuracy" and found.label_ids is not None:
        return _accuracy(found.predictions, found.label_ids, writes_on=_writes_on(trainer))
    raise _no_metric(metric, sorted({*_OWN, *(one.removeprefix(f"{_PREFIX}_") for one in metrics)}))


def _writes_on(trainer: Any) -> bool:
    """Return whether a Trainer's model says at each token what the next one is."""
    model = inner_model(trainer.accelerator.unwrap_model(trainer.model))
    return type(model).__name__.endswith(_WRITES_ON) and not getattr(model.config, "is_encoder_decoder", False)


def _best(logits: Any, labels: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def _accuracy(predictions: Any, labels: Any, *, writes_on: bool) -> float:
    best, labels = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions), np.asarray(labels)
    if best.ndim == labels.ndim + 1:
        best = best.argmax(axis=-1)
    if best.shape != labels.shape:
        raise ConfigError(
            f"accuracy of predictions {best.shape} against labels {labels.shape} has no meaning",
            hint="name another quality.metric",
        )
    if writes_on:
        best, labels = best[..., :-1], labels[..., 1:]
    wanted = labels != -100
    result: Mapping[str, float] = load_metric("accuracy").compute(predictions=best[wanted], references=labels[wanted])
    return result["accuracy"]
