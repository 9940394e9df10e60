"""fp16 training on a CPU, and gradients that overflow in some of its steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState


def scaled(trainer: Trainer, **scaler: Any) -> Trainer:
    """Put fp16 autocast and torch's own scaler into a Trainer: accelerate itself makes them on GPUs only."""
    accelerator: Any = trainer.accelerator
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
    return trainer


class Overflow(TrainerCallback):
    """Makes the gradient of some steps infinite, as a loss scale that is too high does."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps
        self.skipped: list[int] = []
        self._hook: Any = None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step + 1 in self._steps:
            bias = next(p for p in reversed(list(kwargs["model"].parameters())) if p.requires_grad)
            self._hook = bias.register_hook(lambda gradient: gradient * math.inf)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if kwargs["optimizer"].step_was_skipped:
            self.skipped.append(state.global_step)
