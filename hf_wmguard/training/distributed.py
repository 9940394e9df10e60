"""What a guarded Trainer needs where several processes train one model."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hf_wmguard.training.mark import Mark
from hf_wmguard.training.optimizer import OptimizerGuard
from hf_wmguard.training.ranks import Ranks


def join_saves(trainer: Trainer, mark: Mark, optimizer: OptimizerGuard) -> None:
    """Make every process wait for a Trainer's checkpoints, and hear of those that fail.

    The Trainer lets the others go on while the main process writes: they would wait for it in the next step's
    collective, until a timeout, if its save failed. Shadowed on the instance, as the rest of a guarded Trainer.
    """
    plain_save, plain_state = trainer.save_model, trainer._save_optimizer_and_scheduler

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        ranks = Ranks.current()
        if ranks.size == 1 or not _internal_call:
            # Somebody's own call, which may come on the main process alone: nobody else is there to wait for.
            plain_save(output_dir, _internal_call)
            return
        mark.check_ranks(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
        with ranks.together("saving the model"):
            plain_save(output_dir, _internal_call)

    def save_optimizer_and_scheduler(output_dir: str) -> None:
        with Ranks.current().together("saving the optimizer's state"):
            # The Trainer asks the main process alone for it, which has only its own parts.
            optimizer.collect(trainer.optimizer)
            plain_state(output_dir)

    own: Any = trainer
    own.save_model, own._save_optimizer_and_scheduler = save_model, save_optimizer_and_scheduler
