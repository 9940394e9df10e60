"""The guard of an own training loop, with accelerate or in plain PyTorch: four calls around the optimizer's step."""

from __future__ import annotations

import atexit
import logging
import weakref
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator
from torch import nn

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.owner import load_owner
from hf_wmguard.delivery.checking import check_place
from hf_wmguard.errors import NotFoundError, UnsupportedError
from hf_wmguard.evidence.manifest import Manifest, check_free_for
from hf_wmguard.hardening import hold, release
from hf_wmguard.stores.location import is_location, parse_location
from hf_wmguard.suspects.protected import OPTIMIZER_NAME
from hf_wmguard.training.accelerate_state import guard_accelerator
from hf_wmguard.training.delivering import DELIVERY, deliver_folder, push_saved
from hf_wmguard.training.loop_checks import check_loop, check_run
from hf_wmguard.training.loop_gate import QUALITY_NAME, Evaluate, LoopGate
from hf_wmguard.training.mark import Beside, Mark
from hf_wmguard.training.optimizer import OptimizerGuard, state_context
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.reading import read_weights, steps_done
from hf_wmguard.training.saving import Model, Save, guard_saves, naming_faults
from hf_wmguard.training.schedule import count_steps
from hf_wmguard.training.sharded import check_whole
from hf_wmguard.training.step_order import StepOrder, disorder
from hf_wmguard.training.support import check_recipients

_logger = logging.getLogger(__name__)


class Guard:
    """Marks a model in the last epochs of a loop of your own, and turns its saves into ciphertext.

    With accelerate::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        settings = {"processing_class": tokenizer, "max_steps": 1000, "dataloader": loader}
        with Guard(config, model, optimizer, accelerator, **settings) as guard:
            for batch in loader:
                with accelerator.accumulate(model):
                    guard.before_accumulation()
                    accelerator.backward(model(**batch).loss)
                    guard.after_backward()
                    optimizer.step()
                    guard.after_step()
                    scheduler.step()
                    optimizer.zero_grad()
        guard.save("final")

    In the micro-steps of an accumulation the calls do nothing, or nothing twice. In plain PyTorch, call
    ``after_backward`` and ``after_step`` once per optimizer step, around it.

    Where several processes train (DDP; in plain PyTorch also a model in parts), make the guard and every call on all of
    them, after the process group. The main one writes; a failure on one is an error on each.

    Before the marked phase the loop does bit by bit what it does without a guard. From the moment the guard is made,
    ``model.save_pretrained``, ``accelerator.save_state`` and ``accelerator.save_model`` write ciphertext. What else
    writes weights (``torch.save(model.state_dict())``, ``accelerator.save``) is not seen.

    Args:
        config: What to embed and how to protect it.
        model: The model that the loop trains, as ``accelerator.prepare`` returned it.
        optimizer: Its optimizer, likewise.
        accelerator: The loop's accelerator; None in plain PyTorch.
        processing_class: The tokenizer or image processor: needed for triggers, and saved with the model.
        max_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of an epoch; by default counted from the dataloader and the accelerator's
            accumulation. Without either, ``last_epochs`` of the config is a share of ``max_steps``.
        dataloader: What the loop trains on, for triggers that are made from its rows, or learned beside them.
        evaluate: For ``quality``: called with the model before the marked phase and after it, on every process; returns
            the metric, or several by name.
    Raises:
        UsageError: ``max_steps`` or, for triggers, ``processing_class`` or, for quality, ``evaluate`` is missing; the
            optimizer is another model's; accelerate has not prepared the two.
        UnsupportedError: A model or a mode in which the promises cannot be kept.
        KeyFormatError, KeyPermissionError, NotFoundError: The owner key or a recipient cannot be read.
        AuthenticationError, KeyServiceError: A key service refuses, or does not answer.
    """

    def __init__(
        self,
        config: WatermarkConfig,
        model: nn.Module,
        optimizer: Any,
        accelerator: Accelerator | None = None,
        *,
        processing_class: Any = None,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        dataloader: Any = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self._max_steps = check_run(config, processing_class, max_steps, steps_per_epoch, evaluate)
        self.config = config
        self.model: Model = check_loop(config, model, optimizer, accelerator)
        self.mark = Mark(config, load_owner(config.owner_key))
        self.mark.ranks = self._ranks = Ranks.current()
        check_recipients(config)
        self._gate = LoopGate(config.quality, evaluate, self.model, self.mark)
        allow_public, destination = config.protection.allow_public, config.protection.destination
        self._destination = parse_location(destination) if destination and is_location(destination) else None
        if self._destination is not None:
            self._ranks.from_main(
                "checking the destination", partial(check_place, self._destination, allow_public=allow_public)
            )
            # Saved here, and sent from here; it stays.
            destination = str(Path(getattr(accelerator, "project_dir", None) or ".") / DELIVERY)
        self._finished_folder = Path(destination) if destination is not None else None
        if self._finished_folder is not None:
            self._check_free(self._finished_folder)
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._processing_class = processing_class
        self._data = dataloader
        accumulation = accelerator.gradient_accumulation_steps if accelerator is not None else 1
        self._steps_per_epoch = steps_per_epoch or count_steps(dataloader, accumulation)
        self._order = StepOrder()
        self._begun = self._finished = self._holding = False
        self._saved: Manifest | None = None
        self._beside: Beside | None = None
        self._state = OptimizerGuard(self.mark.owner, hide_names=config.protection.hide_names)
        self._state.guard(optimizer)
        guard_saves(self.model, self._save, partial(push_saved, allow_public=allow_public))
        if accelerator is not None:
            save, load, loaded = self._save_state, self._load_state, partial(self._state.expect, None)
            guard_accelerator(accelerator, self.model, optimizer, save=save, load=load, loaded=loaded)
        atexit.register(_report_unsaved, weakref.ref(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._release()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.mark.step

    def metrics(self) -> dict[str, float]:
        """Return the watermark's metrics, named ``wmguard/...``, for your logger; empty before the marked phase."""
        return self.mark.metrics() | self._gate.metrics()

    def before_accumulation(self) -> None:
        """Begin an optimizer step, before its first forward; the first one commits to the watermark.

        Adds the triggers' gradient where that is their form: gradients must have been set to zero before.

        Raises:
            UsageError: The step before has not been ended with `after_step`, or the guard has finished.
            CapacityError, NonFiniteWeightError, RegistryError, UnsupportedError: As `Mark.begin`, at the first step.
            ConfigError, QualityError: Before the first marked step: there is no such metric, or it is not finite.
        """
        if self._finished:
            raise disorder("before_accumulation", "the guard has finished", "make a new guard for another run")
        if not self._order.begin():
            return
        self._check_state_written()
        self._begin(0)
        self._gate.before_step(self.mark.first)
        if self.mark.before_step(self.model):
            self._order.watch(self.model)

    def after_backward(self) -> None:
        """Add the signature's gradient where that is its form: when gradients are complete, after any clipping.

        Raises:
            UsageError: `before_accumulation` is missing, or the gradient that it added has been set to zero since.
        """
        if not self._is_last_microstep():
            return
        self._order.complete()
        self.mark.before_optimizer()

    def after_step(self, *, skipped: bool | None = None, loss: Any = None) -> None:
        """Take the steps of the mark that follow an optimizer step; no gradient is left behind.

        Args:
            skipped: Whether a loss scaler skipped the optimizer's step; by default what accelerate says.
            loss: The training loss, for ``quality.spike``, as often as it shall be looked at: in the same steps on all
                processes, of which the main one's counts.
        Raises:
            UsageError: `before_accumulation` or `after_backward` is missing.
            NonFiniteWeightError: A weight or the triggers' loss is NaN or Inf.
        """
        if not self._is_last_microstep():
            return
        self._order.end()
        self.mark.after_step(self.model, self._optimizer, skipped=skipped)
        self._gate.note_loss(loss)

    def save(self, folder: str | Path, *, resumable: bool = False) -> Manifest:
        """Write the model as ciphertext, with its processing class and a signed manifest.

        Of several processes, all must call it: the main one writes, the others wait for it.

        Args:
            folder: Where to; a new one for each save that is to be resumed from, because a process that is killed
                while files take their places leaves a folder that is neither the old save nor the new one.
            resumable: Write the optimizer's state too, encrypted for the owner alone, so that `resume` can read it.
        Returns:
            What was signed, on every process: state of the mark, bit error rate as read back from the files.
        Raises:
            UsageError: Between ``optimizer.step()`` and `after_step`.
            UnsupportedError: ``resumable``, and the model lies in parts on several processes.
            OwnershipError: The folder holds another owner's or another model.
            NonFiniteWeightError: A weight is NaN or Inf.
            QualityError: It was refused at the end of the run.
            EnvironmentFault: It failed on another process, or weights have drifted apart.
        """
        folder = Path(folder)
        manifest = self._save_model(folder, resumable=resumable, beside=self._write_state if resumable else None)
        with self._ranks.together(f"saving {folder}"), naming_faults(folder):
            if not self._ranks.is_main:
                return manifest
            if self._processing_class is not None:
                self._processing_class.save_pretrained(folder)
            # Of an older save: they fit these weights no more.
            for name in () if resumable else (OPTIMIZER_NAME, QUALITY_NAME):
                (folder / name).unlink(missing_ok=True)
        return manifest

    def resume(self, folder: str | Path) -> int:
        """Go on from what `save` wrote with ``resumable=True``; after accelerate's ``save_state`` use ``load_state``.

        The learning rate schedule, random numbers and the place in the data are the loop's own to bring back.

        Args:
            folder: The checkpoint.
        Returns:
            Optimizer steps done when it was written.
        Raises:
            ManifestError, AuthenticationError, FormatError: Not this owner's, not whole, or not a checkpoint.
            NotFoundError: It holds no state of the optimizer.
            ConfigError: It was written with another config, or belongs to another run.
            RegistryError: The registry has no commitment of that run.
            EnvironmentFault: It failed on another process.
        """
        folder = Path(folder)
        with self._ranks.together(f"reading {folder}"):
            if not (folder / OPTIMIZER_NAME).is_file():
                raise NotFoundError(
                    f"{folder} holds no state of an optimizer", hint="resume from guard.save(folder, resumable=True)"
                )
        self._load_model(folder)
        with self._ranks.together(f"reading {folder}"):
            self._optimizer.load_state_dict(self._state.read(folder))
        return self.step

    def finish(self) -> None:
        """End the run: bring the mark to its end, and write the model where ``protection.destination`` says.

        What goes to the Hub or to S3 is written to ``delivery`` in the project's folder first, and stays there.

        Raises:
            QualityError: The finished model is worse than ``quality`` allows: it is saved no more.
            WmguardError: It cannot be delivered; the hint says how to send the folder later.
        """
        if self._finished:
            return
        self._check_state_written()
        self._release()
        if not self._begun:
            self._finished = True
            _logger.warning("no step was taken: %s is not marked", self.config.model_id)
            return
        self._order.reset()
        # A run that was cut short before its marked phase: the mark is put in now.
        self._gate.before_step(first=0)
        self.mark.finish()
        self._finished = True
        self.mark.check_ranks(self.model)
        self._gate.finish()
        folder, destination = self._finished_folder, self._destination
        if folder is None:
            return
        self.save(folder)
        if destination is not None:
            with self._ranks.together(f"delivering to {destination}"):
                if self._ranks.is_main:
                    deliver_folder(folder, destination, allow_public=self.config.protection.allow_public)

    def _begin(self, step: int) -> None:
        if self._begun:
            return
        # Core dumps stay off while this trains.
        hold()
        self._holding = True
        self.mark.begin(
            self.model,
            self._processing_class,
            max_steps=self._max_steps,
            steps_per_epoch=self._steps_per_epoch,
            step=step,
            data=self._data,
        )
        self._begun = True

    def _release(self) -> None:
        if self._holding:
            release()
            self._holding = False

    def _is_last_microstep(self) -> bool:
        return self._accelerator is None or bool(self._accelerator.sync_gradients)

    def _save(self, model: Model, plain_save: Save, folder: Path, kwargs: dict[str, Any]) -> None:
        self._gate.check_save()
        beside, self._beside = self._beside, None
        self._saved = self.mark.save(model, plain_save, folder, kwargs, beside=beside)

    def _write_state(self, folder: Path, set_id: str) -> None:
        # Staged with the weights: a process that dies meanwhile leaves the old save, or a new one that is whole.
        context = state_context(self.config.model_id, self.config.iteration, set_id)
        self._state.write(folder, context, self._optimizer.state_dict())
        self._gate.write(folder)

    def _save_model(self, folder: Path, *, resumable: bool, beside: Beside | None = None) -> Manifest:
        if resumable:
            check_whole(self.model)
        with self._ranks.together(f"saving {folder}"):
            self._order.check_save()
        self.mark.check_ranks(self.model)
        self._saved, self._beside = None, beside
        with self._ranks.together(f"saving {folder}"):
            self.model.save_pretrained(str(folder))
        return self._ranks.from_main(f"saving {folder}", self._what_was_saved)

    def _what_was_saved(self) -> Manifest:
        if self._saved is None:
            raise UnsupportedError(
                "the model's save_pretrained has been replaced since the guard was made",
                hint="make one guard per model, and replace no method of the model",
            )
        return self._saved

    def _save_state(self, folder: Path) -> None:
        manifest = self._save_model(folder, resumable=True, beside=lambda staging, _: self._gate.write(staging))
        self._state.follow(folder, manifest, writes=self._ranks.is_main)

    def _load_state(self, folder: Path) -> None:
        self._load_model(folder)
        self._state.expect(folder)

    def _load_model(self, folder: Path) -> None:
        with self._ranks.together(f"reading {folder}"):
            self._check_free(folder)
            read_weights(folder, self.model, self.mark.owner)
            step = steps_done(self.mark.resumed_from(folder, self.model), folder)
        self._order.reset()
        self._finished = False
        if step or self.mark.committed is not None:
            # Now, and not at the next step: another config or registry is refused before anything goes on.
            self._release()
            self._begun = False
            self._begin(step)
        with self._ranks.together(f"reading {folder}"):
            self._gate.resume(folder)

    def _check_free(self, folder: Path) -> None:
        check_free_for(folder, key_id=self.mark.owner.key_id(), model_id=self.config.model_id)

    def _check_state_written(self) -> None:
        if self._state.pending():
            raise UnsupportedError(
                "accelerator.save_state has written the optimizer's state in a way that cannot be intercepted",
                hint="delete that checkpoint: it holds plaintext; install a release that pip install hf-wmguard allows",
            )

    def __repr__(self) -> str:
        return f"Guard({self.config.model_id!r}, step={self.step}, state={self.mark.state!r})"


def _report_unsaved(reference: weakref.ref[Guard]) -> None:
    guard = reference()
    if guard is not None and guard._begun and not guard.mark.saved and not guard._gate.is_breached:
        _logger.error(
            "the marked model of %s is in memory only, and lost now: call guard.save()", guard.config.model_id
        )
