"""A model that takes a guarded one's place in a Trainer is saved by nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.saving import is_guarded, naming_faults


def watch_saves(trainer: Trainer) -> None:
    """Let a Trainer save guarded models only, from now on: it would write any other in plaintext."""
    plain_save: Any = trainer._save

    def save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not is_guarded(model):
            raise swapped(model)
        if trainer.is_fsdp_enabled:
            folder = Path(str(output_dir or trainer.args.output_dir))
            # What comes before save_pretrained on the main process alone: the others must not wait there for nothing.
            with Ranks.current().together(f"saving {folder}"), naming_faults(folder):
                if trainer.args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
            if not trainer.args.should_save:
                # The Trainer's own would leave here, and the main process be alone with a model that needs all of them.
                model.save_pretrained(folder, state_dict=state_dict, is_main_process=False)
                return
        plain_save(output_dir, state_dict)

    trainer._save = save  # type: ignore[method-assign]


def swapped(model: object) -> UnsupportedError:
    """Return what to raise where this model stands in the place of the one that training began with."""
    return UnsupportedError(
        f"the model was replaced during training by another {type(model).__name__}, which bears no mark and would be "
        "saved in plaintext",
        hint="load other weights into the same model with load_state_dict, or replace it before trainer.train()",
    )
