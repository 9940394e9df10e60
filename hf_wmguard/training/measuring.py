"""Ask a Trainer for one metric in the middle of a run, as its own evaluation would give it, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from transformers import Seq2SeqTrainer, Trainer

from hf_wmguard.errors import ConfigError
from hf_wmguard.metrics import load_metric
from hf_wmguard.training.quality import named, undisturbed, unknown
from hf_wmguard.training.saving import inner_model

_MISSING = object()
_WRITES_ON = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OWN = ("accuracy", "loss", "perplexity")
_HINT = "return it from compute_metrics, or name another"


def check_metric(trainer: Any, metric: str) -> None:
    """Refuse a metric that nobody computes, where that is known: any other Trainer may have metrics of its own.

    Raises:
        ConfigError: There is no such metric.
    """
    plain = type(trainer) in (Trainer, Seq2SeqTrainer) and trainer.compute_metrics is None
    if plain and not metric.removeprefix("eval_").endswith(_OWN):
        raise unknown(metric, _OWN, hint=_HINT)


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

    own = metric.removeprefix("eval_") == "accuracy"
    with ExitStack() as stack:
        stack.enter_context(undisturbed(trainer.model))
        stack.enter_context(_unheard(trainer))
        if own:
            stack.enter_context(_shadowed(trainer, "evaluation_loop", evaluation_loop))
        if own and trainer.compute_metrics is None:
            # One number in the place of a whole vocabulary's: all of them are kept until the last batch.
            stack.enter_context(_shadowed(trainer, "preprocess_logits_for_metrics", _best))
        metrics: Mapping[str, Any] = trainer.evaluate()
    value = named(metrics, metric)
    if value is None and outputs and outputs[-1].label_ids is not None:
        return _accuracy(outputs[-1].predictions, outputs[-1].label_ids, writes_on=_writes_on(trainer))
    if value is None:
        raise unknown(metric, metrics, hint=_HINT)
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
