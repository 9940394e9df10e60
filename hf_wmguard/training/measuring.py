"""Ask a Trainer for one metric in the middle of a run, as its own evaluation would give it, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from hf_wmguard.errors import ConfigError
from hf_wmguard.metrics import load_metric
from hf_wmguard.training.quality import named, undisturbed, unknown

_MISSING = object()


def measure_with(trainer: Any, metric: str) -> float:
    """Return a metric of a Trainer's model on its evaluation data; nothing is logged and no callback asked.

    Through ``trainer.evaluate()``: a Trainer may have more to it than the loop over the data, as `Seq2SeqTrainer` has
    lengths of what is generated, and TRL's have metrics of their own.

    Args:
        trainer: The Trainer.
        metric: A name that ``trainer.evaluate()`` returns; ``perplexity`` and ``accuracy`` it need not return.
    Raises:
        ConfigError: There is no such metric, or it is no number.
    """
    outputs: list[Any] = []
    plain_loop = trainer.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        # Predictions are collected only where something is made of them.
        outputs.append(plain_loop(*args, **{**kwargs, "prediction_loss_only": None}))
        return outputs[-1]

    with ExitStack() as stack:
        stack.enter_context(undisturbed(trainer.model))
        stack.enter_context(_unheard(trainer))
        if metric.removeprefix("eval_") == "accuracy":
            stack.enter_context(_shadowed(trainer, "evaluation_loop", evaluation_loop))
        metrics: Mapping[str, Any] = trainer.evaluate()
    value = named(metrics, metric)
    if value is None and outputs and outputs[-1].label_ids is not None:
        return _accuracy(outputs[-1].predictions, outputs[-1].label_ids)
    if value is None:
        raise unknown(metric, metrics, hint="return it from compute_metrics, or name another")
    return value


@contextmanager
def _unheard(trainer: Any) -> Iterator[None]:
    """Keep what a Trainer logs and tells its callbacks from both, and its flags of what comes next as they are."""
    control = dict(vars(trainer.control))

    def call_event(event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return control

    with (
        _shadowed(trainer.callback_handler, "call_event", call_event),
        _shadowed(trainer.state, "log_history", []),
    ):
        try:
            yield
        finally:
            vars(trainer.control).update(control)


@contextmanager
def _shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something in an attribute's place on one object, and what was there back."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _accuracy(predictions: Any, labels: Any) -> float:
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    best = np.asarray(logits).argmax(axis=-1)
    labels = np.asarray(labels)
    if best.shape != labels.shape:
        raise ConfigError(
            f"accuracy of logits {np.asarray(logits).shape} against labels {labels.shape} has no meaning",
            hint="name another quality.metric",
        )
    wanted = labels != -100
    result: Mapping[str, float] = load_metric("accuracy").compute(predictions=best[wanted], references=labels[wanted])
    return result["accuracy"]
