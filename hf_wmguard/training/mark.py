"""One marking of one model, from the commitment to the last save. Knows steps and folders, nothing of the Trainer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.distributed.tensor import DTensor

from hf_wmguard.canonical import decode_base64, encode_base64
from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import ConfigError
from hf_wmguard.evidence.manifest import Manifest, SignatureSummary, TriggerSummary, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.local import count_learned
from hf_wmguard.protect import (
    Committed,
    ProtectedWriter,
    SavedAdapter,
    State,
    commit,
    new_salt,
    registry_body,
)
from hf_wmguard.training.backends import ParameterBackend
from hf_wmguard.training.commitments import check_same_run, find_committed, plan_record
from hf_wmguard.training.loss_scale import scale_of, was_skipped
from hf_wmguard.training.outcome import report_save
from hf_wmguard.training.ranks import Ranks, check_equal
from hf_wmguard.training.saving import Model, Save, inner_model, naming_faults, put_together, send_parts, weights_go_to
from hf_wmguard.training.schedule import Phase, last_epochs
from hf_wmguard.training.sharded import backend_of, is_sharded
from hf_wmguard.training.signature_step import SignatureStep
from hf_wmguard.training.support import check_finite
from hf_wmguard.training.trigger_step import TriggerStep
from hf_wmguard.watermark.record import WatermarkRecord

_logger = logging.getLogger(__name__)
_STATE_LABEL = "training-state"
Beside = Callable[[Path, str], None]


class Mark:
    """The watermark of one training run.

    Args:
        config: What to embed.
        owner: The owner's key.
    """

    def __init__(self, config: WatermarkConfig, owner: OwnerKey) -> None:
        self.config = config
        self.owner = owner
        self.committed: Committed | None = None
        self._saved_step: int | None = None
        self._triggered_step = 0
        self._finished = False
        self._signature: SignatureStep | None = None
        self._adapters: Mapping[str, SavedAdapter] = {}
        self._triggers: TriggerStep | None = None
        self._tokenizer: Any = None
        self._step = 0
        self._resumed_from: Manifest | None = None
        self.ranks = Ranks()
        self._model: weakref.ref[Model] | None = None
        self.paused = False
        """While set, nothing moves before the ramp's end."""

    def begin(
        self,
        model: Model,
        tokenizer: Any,
        *,
        max_steps: int,
        steps_per_epoch: int | None,
        step: int,
        data: Any = None,
    ) -> None:
        """Commit to the watermark, or, when resuming, go on with the one committed to before.

        Args:
            model: The model about to be trained.
            tokenizer: Its tokenizer; needed for triggers.
            max_steps: Optimizer steps of the whole run.
            steps_per_epoch: Optimizer steps of an epoch, None for data without a length.
            step: Steps already done.
            data: The dataloader: triggers are made from its rows, and some are replayed.
        Raises:
            CapacityError, NonFiniteWeightError, UnsupportedError: The model cannot carry this watermark.
            RegistryError: Resuming a run that this registry has no commitment of.
            ConfigError: Resuming with another config than the one committed to.
            UsageError, EnvironmentFault: Of several processes, one has another key or config, or has failed.
        """
        self.ranks = Ranks.current()
        self._tokenizer, self._step = tokenizer, step
        self._saved_step, self._triggered_step, self._finished = None, 0, False
        self._signature, self._triggers, self.paused = None, None, False
        with self.ranks.together("checking the model"):
            check_finite(dict(model.named_parameters()))
            backend = backend_of(model) if self.config.signature is not None else None
        if self._model is not None and self._model() is not model:
            # Made anew (model_init): what was committed to before is another model's.
            self.committed = None
        if not step:
            self._resumed_from = None
        self._model = weakref.ref(model)
        if self.committed is None:
            self.committed = self._agree(model, backend, getattr(data, "dataset", None))
        record = self.committed.record
        device = next(model.parameters()).device
        if self.config.signature is not None and backend is not None:
            phase = last_epochs("signature", self.config.signature.last_epochs, max_steps, steps_per_epoch)
            keys = tuple(key.to(device) for key in record.carrier_keys(self.owner))
            before = [baseline.projections_of(key) for key, baseline in zip(keys, record.baselines, strict=True)]
            rounding_key = self.owner.derive(
                "rounding",
                model_id=record.model_id,
                iteration=record.iteration,
                slot=record.slot,
                salt=bytes.fromhex(record.salt),
            )
            self._signature = SignatureStep(keys, before, backend, self.config.signature, phase, rounding_key)
            self._adapters = backend.saved()
            self._restore_state(self._signature, self._resumed_from)
        if self.config.triggers is not None and record.triggers is not None:
            triggers = self.config.triggers
            phase = (
                last_epochs("triggers", triggers.last_epochs, max_steps, steps_per_epoch)
                if triggers.start is None
                else Phase(start=int(triggers.start * max_steps), end=max_steps)
            )
            phase = phase.without_last(triggers.cooldown)
            self._triggers = TriggerStep(record.triggers, triggers, phase, tokenizer, data=data, ranks=self.ranks)

    def _agree(self, model: Model, backend: ParameterBackend | None, dataset: Any) -> Committed:
        """Return what one process committed to, or found, for all of them."""
        outline = f"{self.owner.key_id()} {self.config.model_id} {self.config.iteration}"
        same = "start every process with the same config and the same owner key"
        self.ranks.check_same("the owner key or the model's name", outline, hint=same)
        self.ranks.check_same("the config", repr((self.config.signature, self.config.triggers)), hint=same)
        salt = self.ranks.from_main("planning the watermark", new_salt)
        with self.ranks.together("planning the watermark"):
            planned = plan_record(self.owner, self.config, model, backend, self._tokenizer, dataset, salt)
        if self.ranks.size == 1:
            return self._fix(planned)
        # The entry and not the record, so that every rank checks for itself that the one commits to the other.
        committed = Committed.from_entry(self.ranks.from_main("the commitment", lambda: self._fix(planned).entry))
        with self.ranks.together("the commitment"):
            if not committed.record.same_scheme(planned):
                raise ConfigError(
                    "this process has another model than the one that the main process committed to", hint=same
                )
        return committed

    def _fix(self, planned: WatermarkRecord) -> Committed:
        if self._step:
            return find_committed(self.owner, self.config, planned, step=self._step, resumed_from=self._resumed_from)
        return self._commit(planned)

    def _commit(self, planned: WatermarkRecord) -> Committed:
        committed = commit(planned, Path(self.config.registry), self.owner)
        _logger.info("committed to the watermark of %s: %s", self.config.model_id, committed.entry.hash)
        return committed

    def resumed_from(self, folder: Path, model: Model) -> Manifest:
        """Note the protected checkpoint that a model's weights were just read from, and return its manifest.

        Raises:
            ConfigError: What this model bears was committed to by another run.
        """
        manifest, _ = read_manifest(folder, signer=self.owner.signing_key().public_key())
        if self.committed is not None and self._model is not None and self._model() is model:
            check_same_run(self.committed, manifest, folder)
            if self._signature is not None:
                # The best model, read back after training: its moves count, not those of the weights it replaces.
                self._restore_state(self._signature, manifest)
        self._resumed_from = manifest
        return manifest

    def _restore_state(self, signature: SignatureStep, manifest: Manifest | None) -> None:
        if manifest is not None and manifest.sealed_state is not None:
            sealed = decode_base64(manifest.sealed_state, "sealed state")
            signature.restore(self.owner.open(_STATE_LABEL, sealed, aad=manifest.set_id.encode()))

    def before_step(self, model: Model, optimizer: Any = None) -> bool:
        """Add the triggers' gradient to those of the coming optimizer step, where that is their form.

        Returns:
            Whether one was added.
        """
        coming, triggers = self._step + 1, self._triggers
        # Data without a length can end inside an accumulation: the step then begins twice, its triggers come once.
        if triggers is None or triggers.is_decoupled or not triggers.due(coming) or self._triggered_step == coming:
            return False
        if self.paused:
            return False
        self._triggered_step = coming
        triggers.add_gradient(inner_model(model), coming, scale=scale_of(optimizer))
        return True

    def before_optimizer(self) -> None:
        """Add the signature's gradient to those of the coming optimizer step."""
        if self._signature is not None and not self.paused:
            self._signature.before_optimizer(self._step + 1)

    def after_step(self, model: Model, optimizer: Any = None, *, skipped: bool | None = None) -> None:
        """Take the trigger step and the signature step that follow an optimizer step.

        Args:
            model: The model.
            optimizer: Its optimizer.
            skipped: Whether a loss scaler skipped the step; by default what the optimizer says. Nothing moves then but
                what ends the ramp; the steps after it make up for it.
        """
        self._step += 1
        rests = self.paused or (was_skipped(optimizer) if skipped is None else skipped)
        triggers = self._triggers
        if triggers is not None and triggers.is_decoupled and triggers.due(self._step) and not rests:
            triggers.run(inner_model(model), self._step, optimizer, scale=scale_of(optimizer))
        if self._signature is not None:
            self._signature.after_optimizer(self._step, rests=rests)

    def finish(self) -> None:
        """Bring the signature to its lattice where training did not: a run cut short, or older weights loaded back."""
        early = self.state != "complete"
        if self._signature is None:
            self._finished = True
            return
        last = self._signature.last_change
        self._signature.run(1.0, self._step)
        self._finished = True
        rest = self._signature.last_change
        _logger.info("last step to the lattice: relative weight change %.2g, at the end of training %.2g", last, rest)
        if early:
            _logger.warning(
                "training ended before the ramp did: the rest of the mark was embedded at once (weight change %.2g)",
                rest,
            )

    @property
    def first(self) -> int:
        """Optimizer steps before the marked phase; once `begin` has run."""
        phases = [self._signature.ramp.phase] if self._signature is not None else []
        phases += [self._triggers.phase] if self._triggers is not None else []
        return min(phase.start for phase in phases)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def saved(self) -> bool:
        """Whether a complete save holds the model as it is after the last step; the main process alone can tell."""
        return not self.ranks.is_main or self._saved_step == self._step

    @property
    def state(self) -> State:
        """What a save now would hold: ``pending``, ``ramping`` or ``complete``."""
        if self.committed is None:
            return "pending"
        if self._finished:
            return "complete"
        if self._signature is not None:
            return self._signature.ramp.state(self._step)
        return "complete" if self._triggers is not None and self._step >= self._triggers.phase.end else "pending"

    def metrics(self) -> dict[str, float]:
        """Return the watermark's metrics, named ``wmguard/...``; empty before the marked phase."""
        values: dict[str, float] = {}
        if self._signature is not None:
            values |= self._signature.metrics()
        # In the cooldown the last micro-batch says nothing of the step.
        if self._triggers is not None and self._triggers.phase.contains(self._step):
            values |= self._triggers.metrics
        return values

    def check_ranks(self, model: Model) -> None:
        """Check that every process has the same weights, where each has all of them.

        Raises:
            EnvironmentFault: One has drifted; on all of them.
        """
        parameters = {
            name: one for name, one in model.named_parameters() if not isinstance(one, DTensor) and one.numel()
        }
        check_equal(self.ranks, list(parameters), list(parameters.values()))

    def save(
        self,
        model: Model,
        plain_save: Save,
        folder: Path,
        kwargs: dict[str, Any],
        *,
        beside: Beside | None = None,
    ) -> Manifest | None:
        """Write one save of the model as ciphertext, judge it by what was written, and sign the verdict.

        Args:
            model: The model.
            plain_save: Its own ``save_pretrained``.
            folder: Where to.
            kwargs: The other arguments of ``save_pretrained``.
            beside: Writes what belongs to this save alone: called with the folder where it is staged and its set id.
        Returns:
            What was signed; None on a process that does not write.
        Raises:
            EnvironmentFault: It cannot be written; the old save is as it was.
        """
        ranks = Ranks.current() if is_sharded(model) else Ranks()
        if not ranks.is_main:
            self._take_part(ranks, model, plain_save, kwargs)
            return None
        if not Ranks.current().is_main:
            return None
        # Step by step: no other process may wait in the next one's collectives for this one, when it has failed.
        together = partial(ranks.together, f"saving {folder}")
        with naming_faults(folder), ExitStack() as stack:
            with together():
                writer = stack.enter_context(ProtectedWriter(folder, config=self.config, owner=self.owner))
            with together(), weights_go_to(writer.add, model):
                # Into the staging folder: transformers clears old shards and rewrites the config before it writes.
                plain_save(writer.staging, **put_together(model, kwargs))
            with together():
                triggers = self._trigger_summary(model)
            with together():
                if beside is not None:
                    beside(writer.staging, writer.set_id)
                manifest = self._finish_save(model, writer, triggers)
                if manifest.state == "complete":
                    Registry(Path(self.config.registry), self.owner).append("save", registry_body(manifest, folder))
                    self._note_saved()
        report_save(manifest, folder)
        return manifest

    def _take_part(self, ranks: Ranks, model: Model, plain_save: Save, kwargs: dict[str, Any]) -> None:
        """Hand this process's parts over for a save, and take part in what the model is asked; as `save`, in step."""
        together = partial(ranks.together, "saving the model")
        with together():
            pass
        with together():
            send_parts(model, plain_save, kwargs)
        with together():
            self._trigger_summary(model)
        with together():
            self._note_saved()

    def _note_saved(self) -> None:
        if self.state == "complete":
            self._saved_step = self._step

    def _finish_save(self, model: Model, writer: ProtectedWriter, triggers: TriggerSummary | None) -> Manifest:
        """Judge what was written, and sign the verdict."""
        signature, sealed = None, None
        if self._signature is not None and self.committed is not None:
            reading = writer.read_back(
                self._signature.keys,
                # A merged one is written as whole matrices.
                adapters=self._adapters if isinstance(model, PeftModel) else None,
                baselines=self.committed.record.baselines,
            )
            payload = self.committed.record.decode_payload(self.owner, reading.soft)
            signature = SignatureSummary(
                bit_error_rate=reading.bit_error_rate,
                log10_p=reading.log10_p,
                projections=max(1, reading.projections),
                payload_decoded=payload == self.committed.record.payload,
                weight_change=self._signature.weight_change,
            )
            state = self.owner.seal(_STATE_LABEL, self._signature.state(), aad=writer.set_id.encode())
            sealed = encode_base64(state)
        return writer.finish(
            state=self.state,
            step=self._step,
            committed=self.committed,
            signature=signature,
            triggers=triggers,
            sealed_state=sealed,
        )

    def _trigger_summary(self, model: Model) -> TriggerSummary | None:
        triggers = self.committed.record.triggers if self.committed else None
        if triggers is None:
            return None
        rate = None
        if self.state == "complete":
            rate = count_learned(inner_model(model), self._tokenizer, triggers) / triggers.count
        return TriggerSummary(count=triggers.count, candidates=len(triggers.candidates[0]), match_rate=rate)
