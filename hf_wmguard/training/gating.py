"""The quality gate in a Trainer: when it measures, where the numbers are kept, and what a breach leaves undone.

The value before the mark lies in ``state.log_history``, which the Trainer keeps in its checkpoints: a run that is
resumed inside the marked phase compares with what was measured before it, and not with a model half marked. So do the
training losses, by which a jump is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import Trainer, TrainerState

from hf_wmguard.config import QualityConfig
from hf_wmguard.errors import ConfigError
from hf_wmguard.training.measuring import check_metric, measure_with
from hf_wmguard.training.quality import AFTER, BEFORE, QualityGate


class TrainerGate:
    """Measures a Trainer's model before the first marked step and after the last, and watches the loss between.

    Args:
        config: Which metric, and how much worse it may be.
        trainer: The Trainer, which has data to evaluate on.
    Raises:
        ConfigError: It has none, or several sets and a metric of none of them, or cannot know this metric.
    """

    def __init__(self, config: QualityConfig, trainer: Trainer) -> None:
        _check_data(config.metric, trainer.eval_dataset)
        check_metric(trainer, config.metric)
        self._config = config
        self._trainer = trainer
        self._gate = self._new_gate()

    def begin(self, state: TrainerState, first: int) -> bool:
        """Start anew, or go on with what a resumed run has measured before.

        Args:
            state: The Trainer's.
            first: Optimizer steps before the marked phase.
        Returns:
            Whether the last loss of the log had jumped.
        Raises:
            ConfigError: It is resumed inside the marked phase, and nothing was measured before that.
        """
        self._gate, jumped = self._new_gate(), False
        for entry in state.log_history:
            self._gate.before = entry.get(BEFORE, self._gate.before)
            jumped = self.is_jump(entry, jumped)
        self._gate.check_resumed(state.global_step, first, "in the log")
        return jumped

    def before_step(self, state: TrainerState, first: int) -> None:
        """Measure where the coming step is the first one that may move anything."""
        if self._gate.before is None and state.global_step >= first:
            self._log(BEFORE, self._gate.measure_before())

    def is_jump(self, logs: Mapping[str, Any], otherwise: bool) -> bool:
        """Return whether logs hold a training loss that has jumped; what was so before where they hold none."""
        loss = logs.get("loss")
        return self._gate.note_loss(float(loss)) if isinstance(loss, int | float) else otherwise

    def finish(self) -> None:
        """Measure the finished model.

        Raises:
            QualityError: It is worse than the config allows; from now on it is not saved.
        """
        try:
            self._gate.measure_after()
        finally:
            if self._gate.after is not None:
                self._log(AFTER, self._gate.after)

    def check_save(self) -> None:
        """Refuse to save a model that `finish` has refused.

        Raises:
            QualityError: It has; the same numbers.
        """
        self._gate.check_save()

    @property
    def is_breached(self) -> bool:
        """Whether the finished model was refused."""
        return self._gate.is_breached

    def _new_gate(self) -> QualityGate:
        return QualityGate(self._config, partial(measure_with, self._trainer, self._config.metric))

    def _log(self, name: str, value: float) -> None:
        # Not through a subclass: TRL's would empty its own averages into this entry.
        Trainer.log(self._trainer, {name: value})


def _check_data(metric: str, data: Any) -> None:
    if data is None or (isinstance(data, dict) and not data):
        raise ConfigError(
            "quality needs data to evaluate on", hint="pass eval_dataset to the Trainer, or leave out quality"
        )
    name = metric.removeprefix("eval_")
    if isinstance(data, dict) and not any(name.startswith(f"{one}_") for one in data):
        raise ConfigError(
            f"quality.metric {metric!r} is of none of the sets to evaluate on: {', '.join(data)}",
            hint=f"put a set's name before it, as in {next(iter(data))}_{name}",
        )
