"""One guarded run, on as many processes as torchrun starts: what the tests of distributed training drive.

Called with a folder and a JSON object of settings (see `Settings`); each rank writes ``rank-N.json`` into the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import (
    LABELS,
    Recorder,
    StopAt,
    build_trainer,
    digest_weights,
    guarded_config,
    make_model,
    make_texts,
    make_tokenizer,
)
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from hf_wmguard import protect_trainer
from hf_wmguard.config import SignatureConfig, TriggerConfig
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.ranks import Ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is different in a run."""

    task: str = "classification"
    form: str = "decoupled"
    trigger_form: str | None = "gradient"
    dtype: str = "float32"
    epochs: int = 3
    stop_at: int | None = None
    resume: str | None = None
    disk_full_at: int | None = None
    kill_rank: int | None = None
    kill_at: int | None = None
    drift_at: int | None = None
    other_model_id: bool = False
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


class Saboteur(TrainerCallback):
    """Makes a disk full, kills a rank in its save, or changes the weights of one rank."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        import resource

        rank, model = Ranks.current().rank, kwargs["model"]
        if rank == 0 and state.global_step == self._settings.disk_full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
        if rank == self._settings.kill_rank and state.global_step == self._settings.kill_at:
            # In the middle of the save: after the first shard has been written.
            from hf_wmguard.container import files

            files.ProtectedFile.read = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            if rank > 0:
                os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and state.global_step == self._settings.drift_at:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1e-3


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a parameter as one tensor, wherever its parts lie."""
    tensor = tensor.detach()
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).clone()


def main() -> None:
    torch.set_num_threads(1)
    root, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    tokenizer, texts = make_tokenizer(), make_texts()
    config = dataclasses.replace(
        guarded_config(root),
        signature=SignatureConfig(budget=0.06, last_epochs=2, form=settings.form),
        triggers=None
        if settings.trigger_form is None
        else TriggerConfig(count=8, batch_size=4, last_epochs=2, contexts=0.0, form=settings.trigger_form),
    )
    if settings.other_model_id and os.environ.get("RANK") == "1":
        config = dataclasses.replace(config, model_id="acme/other")
    model = make_model(settings.task, len(tokenizer)).to(getattr(torch, settings.dtype))
    recorder = Recorder()
    callbacks: list[TrainerCallback] = [recorder, Saboteur(settings)]
    if settings.stop_at is not None:
        callbacks.append(StopAt(settings.stop_at, save=True))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = build_trainer(
        root / "out",
        tokenizer,
        texts,
        settings.task,
        model=model,
        trainer={"callbacks": callbacks},
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=8 // processes,
        **settings.arguments,
    )
    protect_trainer(trainer, config)
    trainer.train(resume_from_checkpoint=settings.resume)
    if settings.stop_at is None:
        trainer.save_model(str(root / "final"))
    ranks = Ranks.current()
    weights = {name: whole(one) for name, one in trainer.model.named_parameters()}
    result: dict[str, Any] = {
        "digest": digest_weights(trainer.model),
        "world": ranks.size,
        "labels": LABELS,
        "logs": recorder.logs,
        "random": torch.rand(1).item(),
    }
    if ranks.is_main:
        saved = {f"{step}/{name}": t for step, state in recorder.saved.items() for name, t in state.items()}
        finder = PlaintextFinder(weights | saved)
        result["exposed"] = [str(path) for path in finder.scan([root])]
    (root / f"rank-{ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
