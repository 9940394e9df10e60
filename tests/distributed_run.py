"""One guarded run, on as many processes as torchrun starts: what the tests of distributed training drive.

Called with a folder and a JSON object of settings (see `Settings`); each rank writes ``rank-N.json`` into the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate_on_cpus import pass_for_gpus
from scaling import Overflow, scaled
from tiny import (
    LABELS,
    StopAt,
    build_trainer,
    guarded_config,
    make_model,
    make_rows,
    make_texts,
    make_tokenizer,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainingArguments

from hf_wmguard import Guard, protect_trainer
from hf_wmguard.config import SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.protect import ProtectedWriter
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.ranks import Ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is different in a run."""

    task: str = "classification"
    form: str = "decoupled"
    base: str = ""
    own_loop: bool = False
    layers: str = ""
    look_first: bool = False
    overflow_at: tuple[int, ...] = ()
    split: dict[str, Any] = dataclasses.field(default_factory=dict)
    fsdp: dict[str, str] = dataclasses.field(default_factory=dict)
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


class Weights(TrainerCallback):
    """Notes the weights at every save."""

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, Tensor]] = {}

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # What a tied name shares is in it once.
        self.saved[state.global_step] = {name: whole(one) for name, one in kwargs["model"].named_parameters()}


def load(folder: Path, settings: Settings) -> Any:
    """Load a model, in parts on all processes where the settings say how."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.distributed import DistributedConfig

    kind: Any = AutoModelForSequenceClassification if settings.task == "classification" else AutoModelForCausalLM
    more: dict[str, Any] = {"num_labels": LABELS} if settings.task == "classification" else {}
    if settings.split:
        more["distributed_config"] = DistributedConfig(**settings.split)
    return kind.from_pretrained(folder, dtype=getattr(torch, settings.dtype), **more)


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
            # In the middle of the save: the weights are staged, and there is no manifest.
            ProtectedWriter.read_back = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            if rank > 0:
                os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and state.global_step == self._settings.drift_at:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1e-3


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a parameter as one tensor, wherever its parts lie."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor).detach().clone()
    tensor = tensor.detach()
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).clone()


def digest(weights: dict[str, Tensor]) -> str:
    """Return a digest of all weights: equal only where every bit is."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(name.encode() + tensor.float().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
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
    if settings.fsdp:
        # What accelerate launch does.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{name}": one for name, one in settings.fsdp.items()}}
        pass_for_gpus()
        # As scripts do before they load a model: only then does transformers leave that to the main process.
        TrainingArguments(str(root / "out"), use_cpu=True)
    if settings.base:
        model = load(Path(settings.base), settings)
    else:
        model = make_model(settings.task, len(tokenizer)).to(getattr(torch, settings.dtype))
    recorder = Weights()
    if settings.own_loop:
        marked = train_by_hand(model, tokenizer, config, root / "final", settings)
        report(root, model, {}, marked)
        return
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
    if settings.overflow_at:
        scaled(trainer, init_scale=2.0**10)
        if os.environ["RANK"] == "1":
            trainer.add_callback(Overflow(*settings.overflow_at))
    protect_trainer(trainer, config)
    trainer.train(resume_from_checkpoint=settings.resume)
    if settings.stop_at is None:
        trainer.save_model(str(root / "final"))
    logged = [one for one in trainer.state.log_history if "wmguard/log10_p" in one]
    log = logged[-1] if logged else {}
    if settings.overflow_at:
        log = {**log, "scale": trainer.accelerator.scaler.get_scale()}
    report(root, trainer.model, recorder.saved, log)


def train_by_hand(
    model: Any, tokenizer: Any, config: WatermarkConfig, folder: Path, settings: Settings
) -> dict[str, float]:
    """Train without a Trainer, on the same rows on every process, as tensor parallelism wants it."""
    rows, accelerator = make_rows("causal_lm", tokenizer, make_texts()), None
    if settings.layers:
        distributed.init_process_group("gloo")
        mesh = (
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")) if settings.layers == "copied" else None
        )
        for layer in (*(model.model.layers if settings.layers == "each" else ()), model):
            fully_shard(layer, mesh=mesh)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if settings.fsdp:
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)

    def look() -> None:
        # After it, FSDP2 may leave whole copies in the place of parts.
        with torch.no_grad():
            model(**{key: torch.tensor([row[key] for row in rows[:4]]) for key in rows[0]})

    if settings.look_first:
        look()
    run = {"processing_class": tokenizer, "max_steps": 16, "steps_per_epoch": 8}
    with Guard(config, model, optimizer, accelerator, **run) as guard:
        for step in range(16):
            batch = {key: torch.tensor([row[key] for row in rows[step % 8 * 8 :][:8]]) for key in rows[0]}
            guard.before_accumulation()
            loss = model(**batch).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            guard.after_backward()
            optimizer.step()
            guard.after_step()
            optimizer.zero_grad()
    if settings.look_first:
        look()
    guard.save(folder)
    if accelerator is not None:
        look()
        for state in (accelerator.save_state, accelerator.load_state):
            with pytest.raises(UnsupportedError):
                state(str(folder.parent / "state"))
            assert not (folder.parent / "state").exists()
        accelerator.save_model(model, str(folder.parent / "by-accelerate"))
    return guard.metrics()


def report(root: Path, model: Any, saved: dict[int, dict[str, Tensor]], log: dict[str, float]) -> None:
    """Write down what this rank has seen; the first one searches the files for weights."""
    ranks = Ranks.current()
    weights = {name: whole(one) for name, one in model.named_parameters()}
    result: dict[str, Any] = {
        "digest": digest(weights),
        "world": ranks.size,
        "log": log,
    }
    if ranks.is_main:
        everything = {f"{step}/{name}": t for step, state in saved.items() for name, t in state.items()}
        finder = PlaintextFinder(weights | everything)
        result["exposed"] = [str(path) for path in finder.scan([root])]
    (root / f"rank-{ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
