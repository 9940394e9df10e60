"""The quality gate of an own loop: it measures with the loop's function, and keeps its numbers in checkpoints.

They lie in a small file beside the weights, in plaintext as a Trainer's in its ``trainer_state.json``: a run that is
resumed inside the marked phase compares with what was measured before it, and not with a model half marked.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_wmguard.atomic import write_atomic
from hf_wmguard.config import QualityConfig
from hf_wmguard.errors import FormatError
from hf_wmguard.training.mark import Mark
from hf_wmguard.training.quality import QualityGate, named, pause, undisturbed, unknown
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.saving import Model

QUALITY_NAME = "wmguard_quality.json"
"""What a checkpoint of a loop holds of the gate."""
Evaluate = Callable[[Any], Mapping[str, float] | float]
_logger = logging.getLogger(__name__)


class LoopGate:
    """Measures a loop's model before the first marked step and after the last, and watches the losses it is told.

    Args:
        config: Which metric, and how much worse it may be; None: nothing is measured, and nothing refused.
        evaluate: Returns the metric, or several by name, of the model that it is given.
        model: The model.
        mark: What waits while a loss has jumped.
    """

    def __init__(self, config: QualityConfig | None, evaluate: Evaluate | None, model: Model, mark: Mark) -> None:
        self._config = config
        self._evaluate = evaluate
        self._model = model
        self._mark = mark
        self._gate = self._new_gate()

    def before_step(self, first: int) -> None:
        """Measure where the coming step is the first one that may move anything.

        Args:
            first: Optimizer steps before the marked phase.
        """
        if self._gate is not None and self._gate.before is None and self._mark.step >= first:
            _logger.info("quality before the marked phase: %.6g", self._gate.measure_before())

    def note_loss(self, loss: Any) -> None:
        """Let the mark wait where the main process's loss, if there is one, has jumped; every process must call it."""
        gate = self._gate
        if gate is not None and loss is not None:
            # Of a loop's own loss, which still knows its gradients.
            loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
            pause(self._mark, Ranks.current().from_main("looking at the loss", lambda: gate.note_loss(float(loss))))

    def finish(self) -> None:
        """Measure the finished model.

        Raises:
            QualityError: It is worse than the config allows; from now on it is not saved.
        """
        if self._gate is not None:
            _logger.info("quality of the finished model: %.6g", self._gate.measure_after())

    def check_save(self) -> None:
        """Refuse to save a model that `finish` has refused.

        Raises:
            QualityError: It has; the same numbers.
        """
        if self._gate is not None:
            self._gate.check_save()

    @property
    def is_breached(self) -> bool:
        """Whether the finished model was refused."""
        return self._gate is not None and self._gate.is_breached

    def metrics(self) -> dict[str, float]:
        """Return what has been measured, under the names that a Trainer logs."""
        return {} if self._gate is None else self._gate.metrics()

    def write(self, folder: Path) -> None:
        """Write into a save what a resumed run has to know, if anything.

        Raises:
            EnvironmentFault: It cannot be written.
        """
        if self._gate is None:
            return
        values = {"before": self._gate.before, "losses": self._gate.recent, "paused": self._mark.paused}
        write_atomic(folder / QUALITY_NAME, json.dumps(values).encode() + b"\n")

    def resume(self, folder: Path) -> None:
        """Go on with what an interrupted run has measured, where its checkpoint says so.

        Raises:
            FormatError: The file cannot be read.
            ConfigError: It was written inside the marked phase, and nothing was measured before that.
        """
        self._gate, path = self._new_gate(), folder / QUALITY_NAME
        if self._gate is None:
            return
        if path.is_file():
            self._gate.before, losses, self._mark.paused = _read(path)
            for loss in losses:
                self._gate.note_loss(loss)
        if self._mark.committed is not None:
            self._gate.check_resumed(self._mark.step, self._mark.first, f"in {folder}")

    def _new_gate(self) -> QualityGate | None:
        if self._config is None or self._evaluate is None:
            return None
        return QualityGate(self._config, partial(self._measure, self._config.metric, self._evaluate))

    def _measure(self, metric: str, evaluate: Evaluate) -> float:
        with undisturbed(self._model), torch.no_grad():
            self._model.eval()
            found = evaluate(self._model)
        if not isinstance(found, Mapping):
            found = {metric: found}
        value = named(found, metric)
        if value is None:
            raise unknown(metric, found, hint="return it from evaluate, or name another")
        return value


def _read(path: Path) -> tuple[float | None, list[float], bool]:
    try:
        values = json.loads(path.read_bytes())
        before, losses, paused = values["before"], values["losses"], values["paused"]
        numbers = [float(one) for one in ([] if before is None else [before]) + losses]
    except (ValueError, TypeError, KeyError) as error:
        raise _spoilt(path) from error
    if not isinstance(paused, bool) or not all(map(math.isfinite, numbers)):
        raise _spoilt(path)
    return before, numbers[0 if before is None else 1 :], paused


def _spoilt(path: Path) -> FormatError:
    return FormatError(f"{path} is not what a save wrote there", hint="resume from another checkpoint")
