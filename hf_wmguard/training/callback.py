"""The one line that a Trainer script gets: ``protect_trainer(trainer, config)``."""

from __future__ import annotations

import atexit
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.owner import load_owner
from hf_wmguard.delivery.checking import check_place
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.errors import ManifestError, UnsavedRunError, UnsupportedError, UsageError
from hf_wmguard.evidence.manifest import check_free_for
from hf_wmguard.hardening import hold, release
from hf_wmguard.stores.location import is_location, parse_location
from hf_wmguard.training.backends import ADAPTER
from hf_wmguard.training.delivering import DELIVERY, deliver_folder, push_saved, save_finished
from hf_wmguard.training.distributed import check_parallelism, join_saves, refuse_states
from hf_wmguard.training.gating import TrainerGate
from hf_wmguard.training.mark import Mark
from hf_wmguard.training.merging import guard_merge
from hf_wmguard.training.optimizer import OptimizerGuard
from hf_wmguard.training.pushing import TrainerPushes
from hf_wmguard.training.quality import pause
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.reading import read_weights
from hf_wmguard.training.saving import Model, Save, guard_saves
from hf_wmguard.training.schedule import count_steps
from hf_wmguard.training.support import check_arguments, check_model, check_optimizer, check_recipients, check_trains
from hf_wmguard.training.swapping import swapped, watch_saves

_logger = logging.getLogger(__name__)


class WatermarkCallback(TrainerCallback):
    """Marks the model in its last epochs and turns every save into ciphertext with a signed manifest.

    Added with `protect_trainer`, it also guards saves before training, reads its own checkpoints back (resuming,
    ``load_best_model_at_end``) and sends its metrics through the Trainer's reporters. Added bare, with
    ``trainer.add_callback(WatermarkCallback(config))``, it guards from the start of training on and writes its
    metrics to ``state.log_history`` only, because a callback has no way to reach its Trainer.

    Args:
        config: What to embed and how to protect it. The key and the recipients are read and tried at once, so that
            a missing key stops the script before training rather than after it.
    Raises:
        KeyFormatError, KeyPermissionError, NotFoundError: The owner key or a recipient cannot be read.
        AuthenticationError, KeyServiceError: A key service refuses, or does not answer.
    """

    def __init__(self, config: WatermarkConfig) -> None:
        self.config = config
        self.mark = Mark(config, load_owner(config.owner_key))
        check_recipients(config)
        destination = config.protection.destination
        self._destination = parse_location(destination) if destination and is_location(destination) else None
        self._pushes: TrainerPushes | None = None
        self._holding = False
        self._optimizer = OptimizerGuard(self.mark.owner, hide_names=config.protection.hide_names)
        self._trainer: Trainer | None = None
        self._gate: TrainerGate | None = None
        self._begun: Any = None
        self._logging = False

    def attach(self, trainer: Trainer) -> None:
        """Guard a Trainer's model and its pushes from now on, and let the Trainer read encrypted checkpoints.

        Raises:
            ExposureError, StoreError: It pushes to a repo that is public, or that cannot be reached.
            ConfigError: Quality is asked for, and there is no data to measure it on.
        """
        if self.config.quality is not None:
            self._gate = TrainerGate(self.config.quality, trainer)
        pushes = TrainerPushes(trainer, self.config.protection, lambda: self.mark.saved)
        pushes.attach()
        watch_saves(trainer)
        self._trainer, self._pushes = trainer, pushes
        self._guard(trainer.model, loaded=not trainer.is_fsdp_enabled)

        def load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
            folder = Path(resume_from_checkpoint)
            self._load(folder, trainer.model if model is None else model)
            if not (folder / TRAINER_STATE_NAME).is_file():
                # The Trainer writes it last.
                raise ManifestError(
                    f"checkpoint {folder} has no {TRAINER_STATE_NAME}: its save was interrupted",
                    hint="resume from the checkpoint before: resume_from_checkpoint=FOLDER, or delete this one",
                )

        def load_best_model() -> None:
            self._load(Path(str(trainer.state.best_model_checkpoint)), trainer.model)

        plain_load = trainer._load_optimizer_and_scheduler

        def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            self._optimizer.guard(trainer.optimizer)
            with self._optimizer.reading(Path(checkpoint)):
                plain_load(checkpoint)

        # On the instance: the class, and any other Trainer in the process, stay as they are.
        trainer._load_from_checkpoint = load_from_checkpoint  # type: ignore[method-assign]
        trainer._load_best_model = load_best_model  # type: ignore[method-assign]
        trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler  # type: ignore[method-assign]
        join_saves(trainer, self.mark)

    def _guard(self, model: Any, *, loaded: bool = True) -> Model:
        checked = check_model(model, loaded=loaded)
        guard_saves(checked, self._save, self._push)
        if isinstance(checked, PeftModel):
            guard_merge(checked, self._save, self._push)
        return checked

    def _push(self, folder: Path, repo: str, options: dict[str, Any]) -> Pushed:
        return push_saved(folder, repo, options, allow_public=self.config.protection.allow_public)

    def _save(self, model: Model, plain_save: Save, folder: Path, kwargs: dict[str, Any]) -> None:
        if self._gate is not None:
            self._gate.check_save()
        if isinstance(model, PeftModel):
            # Frozen ones beside it, such as DPO's reference, are no part of what was trained.
            kwargs = {"selected_adapters": [ADAPTER], **kwargs}
        manifest = self.mark.save(model, plain_save, folder, kwargs)
        if manifest is not None and folder.name == f"{PREFIX_CHECKPOINT_DIR}-{self.mark.step}":
            self._optimizer.follow(folder, manifest)

    def _load(self, folder: Path, model: Any) -> None:
        read_weights(folder, model, self.mark.owner)
        self.mark.resumed_from(folder, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the promises can be kept, then commit, before the first step."""
        if not self._holding:
            # Core dumps stay off while this trains; one that fails leaves them off.
            hold()
            self._holding = True
        self._check_alone()
        check_arguments(args, attached=self._trainer is not None)
        if self._trainer is not None:
            check_parallelism(self._trainer, self.config)
            refuse_states(self._trainer)
        if self.config.quality is not None and self._gate is None:
            raise UnsupportedError(
                "quality beside a bare callback, which cannot have its Trainer evaluate",
                hint="use protect_trainer(trainer, config) instead of trainer.add_callback(...)",
            )
        model = self._begun = self._guard(kwargs["model"])
        check_trains(model)
        check_optimizer(kwargs.get("optimizer"))
        self._optimizer.guard(kwargs.get("optimizer"))
        out, finished = self._run_folder(args), self._finished_folder(args)
        if finished is not None and state.is_hyper_param_search:
            raise UnsupportedError(
                "protection.destination beside a hyperparameter search, where each trial would take the place of the "
                "one before",
                hint="search with destination null, then train a new Trainer with the best values and the destination",
            )
        for folder in [out, *out.glob("checkpoint-*")] + ([finished] if finished else []):
            check_free_for(folder, key_id=self.mark.owner.key_id(), model_id=self.config.model_id)
        if self._pushes is not None:
            self._pushes.check()
        if self._destination is not None:
            # By one process for all: it may have to make the repo.
            check = partial(check_place, self._destination, allow_public=self.config.protection.allow_public)
            Ranks.current().from_main("checking the destination", check)
        self.mark.begin(
            model,
            kwargs.get("processing_class"),
            max_steps=state.max_steps,
            steps_per_epoch=count_steps(kwargs.get("train_dataloader"), args.gradient_accumulation_steps),
            step=state.global_step,
            data=kwargs.get("train_dataloader"),
        )
        if self._gate is not None:
            self.mark.paused = self._gate.begin(state, self.mark.first)
        # Once, however often this trainer trains.
        atexit.unregister(self._report_unsaved)
        atexit.register(self._report_unsaved)

    def _check_alone(self) -> None:
        # Of a bare callback nobody can ask: it does not know its Trainer, which warns of a second one itself.
        others = self._trainer.callback_handler.callbacks if self._trainer is not None else []
        if any(isinstance(other, WatermarkCallback) and other is not self for other in others):
            raise UsageError(
                "two watermark callbacks guard one trainer", hint="keep protect_trainer, and add no callback beside it"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure quality before the marked phase; add the triggers' gradient, before the ordinary one."""
        if self._gate is not None:
            self._gate.before_step(state, self.mark.first)
        self.mark.before_step(kwargs["model"], kwargs.get("optimizer"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the signature's gradient, after clipping."""
        self.mark.before_optimizer()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the triggers' and the signature's own steps."""
        self.mark.after_step(kwargs["model"], kwargs.get("optimizer"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the checkpoint that was just written holds no plaintext state of the optimizer."""
        self._optimizer.finish()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Log the watermark's metrics wherever the loss is logged."""
        if self._logging or "loss" not in (logs or {}):
            return
        if self._gate is not None:
            pause(self.mark, self._gate.is_jump(logs, self.mark.paused))
        metrics = self.mark.metrics()
        if not metrics:
            return
        if self._trainer is None:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
            return
        self._logging = True
        try:
            # Reporters have run already by the time a callback sees on_log: what it adds to logs never reaches them.
            # Not through a subclass: TRL's would add its own averages and tables once more.
            Trainer.log(self._trainer, metrics)
        finally:
            self._logging = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the mark to its end, and write the finished model where the config says."""
        if self._holding:
            release()
            self._holding = False
        if kwargs["model"] is not self._begun:
            raise swapped(kwargs["model"])
        if self._gate is not None:
            # A run that was cut short before its marked phase: the mark is put in now.
            self._gate.before_step(state, first=0)
        self.mark.finish()
        self.mark.check_ranks(kwargs["model"])
        if self._gate is not None:
            self._gate.finish()
        finished = self._finished_folder(args)
        if finished is not None:
            with self.mark.ranks.together(f"saving {finished}"):
                processor = kwargs.get("processing_class") if self.mark.ranks.is_main else None
                save_finished(finished, kwargs["model"], processor)
        if not self.mark.saved:
            _logger.warning("%s", self._unsaved().message)
        if finished is not None and self._destination is not None:
            # Last: what fails here leaves a finished model on the disk.
            with self.mark.ranks.together(f"delivering to {self._destination}"):
                if self.mark.ranks.is_main:
                    deliver_folder(finished, self._destination, allow_public=self.config.protection.allow_public)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a push of the Trainer's own, which would upload whatever lies in its folder to a public repo."""
        if self._pushes is None:
            raise UnsupportedError(
                "a bare callback cannot guard trainer.push_to_hub()",
                hint="use protect_trainer(trainer, config) instead of trainer.add_callback(...)",
            )

    def _run_folder(self, args: TrainingArguments) -> Path:
        """Return where this run's checkpoints go: of a hyperparameter search, each trial has a folder of its own."""
        if self._trainer is None:
            return Path(str(args.output_dir))
        return Path(self._trainer._get_output_dir(getattr(self._trainer, "_trial", None)))

    def _finished_folder(self, args: TrainingArguments) -> Path | None:
        """Return where the finished model is saved: the destination itself, or from where it is sent there."""
        if self._destination is not None:
            return Path(str(args.output_dir)) / DELIVERY
        destination = self.config.protection.destination
        return Path(destination) if destination is not None else None

    def _unsaved(self) -> UnsavedRunError:
        return UnsavedRunError(
            f"the marked model of {self.config.model_id} is in memory only: this run has not saved it yet",
            hint="call trainer.save_model() after trainer.train(), or set protection.destination",
        )

    def _report_unsaved(self) -> None:
        if not self.mark.saved and not (self._gate is not None and self._gate.is_breached):
            error = self._unsaved()
            print(f"error: {type(error).__name__}: {error.message}\nhint: {error.hint}", file=sys.stderr)


def protect_trainer(trainer: Trainer, config: WatermarkConfig) -> WatermarkCallback:
    """Guard a Trainer: the one line to add, after the Trainer is made and before it is used.

    Args:
        trainer: Any `transformers.Trainer`.
        config: What to embed and how to protect it.
    Returns:
        The callback that was added.
    Raises:
        KeyFormatError, KeyPermissionError, NotFoundError: The owner key or a recipient cannot be read.
        UsageError: The Trainer is guarded already.
        UnsupportedError: A model or mode in which the promises cannot be kept; nothing has been changed.
        ExposureError, StoreError: It pushes to a Hub repo that is public, or that cannot be reached; likewise.
        ConfigError: ``quality`` without data to evaluate on, or with a metric that nobody computes; likewise.
    """
    if any(isinstance(other, WatermarkCallback) for other in trainer.callback_handler.callbacks):
        raise UsageError(
            "this trainer is guarded already", hint="call protect_trainer once, and add no callback beside it"
        )
    callback = WatermarkCallback(config)
    check_model(trainer.model, loaded=not trainer.is_fsdp_enabled)
    check_arguments(trainer.args, attached=True)
    check_parallelism(trainer, config)
    callback.attach(trainer)
    trainer.add_callback(callback)
    return callback
