"""A thin callback for Lightning: the three calls of a `Guard` at Lightning's hooks, and one save at the end.

Lightning writes and reads checkpoints in plaintext only: none may be written beside this callback, and none is resumed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

from peft import PeftModel
from transformers import PreTrainedModel

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import MissingDependencyError, UnsupportedError
from hf_wmguard.training.guard import Guard

_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")


def lightning_guard(config: WatermarkConfig, folder: str | Path, **settings: Any) -> Any:
    """Return a callback that marks a `LightningModule`'s model and saves it; its ``guard`` saves it elsewhere too.

    Args:
        config: What to embed and how to protect it.
        folder: Where the finished model goes.
        settings: Other arguments of `Guard`: ``processing_class``, ``dataloader``, ``evaluate``.
    Raises:
        MissingDependencyError: Lightning is not installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingDependencyError(
            "the Lightning callback needs lightning", hint="run pip install 'hf-wmguard[lightning]'"
        ) from error
    return type("LightningGuard", (_Hooks, Callback), {})(config, Path(folder), settings)


class _Hooks:
    """What the callback does at each of Lightning's hooks."""

    def __init__(self, config: WatermarkConfig, folder: Path, settings: dict[str, Any]) -> None:
        self._config = config
        self._folder = folder
        self._settings = settings
        self._stepped = False
        self.guard: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the promises can be kept, and make the guard."""
        _check_modes(trainer, pl_module, self._config)
        trainer.save_checkpoint = trainer.strategy.save_checkpoint = _refuse_checkpoint
        self.guard = Guard(
            self._config,
            _model_of(pl_module),
            trainer.optimizers[0],
            max_steps=int(trainer.estimated_stepping_batches),
            steps_per_epoch=math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches),
            **self._settings,
        )

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        # Not before the forward: Lightning sets gradients to zero after it.
        self.guard.before_accumulation()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.guard.after_backward()
        self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        if self._stepped:
            self._stepped = False
            self.guard.after_step(loss=outputs["loss"])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.guard.finish()
        self.guard.save(self._folder)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.guard is not None:
            self.guard.__exit__(type(exception), exception, None)


def _check_modes(trainer: Any, pl_module: Any, config: WatermarkConfig) -> None:
    batches = trainer.num_training_batches + trainer.estimated_stepping_batches
    clips = trainer.gradient_clip_val and config.signature is not None and config.signature.form == "gradient"
    refused = [
        (trainer.checkpoint_callbacks, "ModelCheckpoint, which writes plaintext", "pass enable_checkpointing=False"),
        (trainer.ckpt_path, "a run resumed from Lightning's checkpoint", "load the weights into the model instead"),
        (type(trainer.strategy).__name__ != "SingleDeviceStrategy", "several devices", "use accelerate and Guard"),
        (trainer.precision not in _PRECISIONS, f"precision {trainer.precision}", "use bf16-mixed or 32-true"),
        (len(trainer.optimizers) != 1, f"{len(trainer.optimizers)} optimizers", "use Guard in a loop of your own"),
        (not pl_module.automatic_optimization, "manual optimization", "call a Guard of your own around the steps"),
        (math.isinf(batches), "a run without a known length", "set max_epochs and limit_train_batches"),
        (clips, "clipping a mark in the gradient form", "set signature.form to decoupled"),
    ]
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"training mode is not supported beside Lightning: {what}", hint=instead)


def _model_of(pl_module: Any) -> Any:
    """Return the one model of transformers or peft in a module, if nothing is trained beside it."""
    models = [one for one in pl_module.children() if isinstance(one, PreTrainedModel | PeftModel)]
    own = {id(parameter) for model in models[:1] for parameter in model.parameters()}
    if len(models) != 1 or any(one.requires_grad and id(one) not in own for one in pl_module.parameters()):
        raise UnsupportedError(
            f"{type(pl_module).__name__} holds {len(models)} models, or trains other weights that no save would hold",
            hint="give it one model as an attribute, and train nothing beside it",
        )
    return models[0]


def _refuse_checkpoint(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(
        "Lightning's checkpoint of a guarded model would be plaintext", hint="use the callback's guard.save(folder)"
    )
