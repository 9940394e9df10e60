"""One marking of one model, from the commitment to the last save. Knows steps and folders, nothing of the Trainer."""

from __future__ import annotations

import dataclasses
import logging
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_wmguard.canonical import decode_base64, encode_base64
from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import ConfigError, RegistryError
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
    new_record,
    new_salt,
    registry_body,
)
from hf_wmguard.training.backends import ParameterBackend, backend_of
from hf_wmguard.training.loss_scale import scale_of, was_skipped
from hf_wmguard.training.saving import Model, Save, inner_model, weights_go_to
from hf_wmguard.training.schedule import Phase
from hf_wmguard.training.signature_step import SignatureStep
from hf_wmguard.training.support import check_finite
from hf_wmguard.training.trigger_set import make_triggers
from hf_wmguard.training.trigger_step import TriggerStep
from hf_wmguard.watermark.pvalues import log10_binomial_tail
from hf_wmguard.watermark.record import WatermarkRecord, trigger_key

_logger = logging.getLogger(__name__)
_STATE_LABEL = "training-state"


class SignatureLostWarning(UserWarning):
    """A save of a marked model from which the signature does not read back."""


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
        """
        self._tokenizer, self._step = tokenizer, step
        self._saved_step, self._finished = None, False
        self._signature, self._triggers, self.paused = None, None, False
        check_finite(dict(model.named_parameters()))
        backend = backend_of(model) if self.config.signature is not None else None
        if self._model is not None and self._model() is not model:
            # Made anew (model_init): what was committed to before is another model's.
            self.committed = None
        if not step:
            self._resumed_from = None
        self._model = weakref.ref(model)
        if self.committed is None:
            planned = self._plan(model, backend, getattr(data, "dataset", None))
            self.committed = self._find(planned) if step else self._commit(planned)
        record = self.committed.record
        device = next(model.parameters()).device
        if self.config.signature is not None and backend is not None:
            phase = _last("signature", self.config.signature.last_epochs, max_steps, steps_per_epoch)
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
            self._restore_state(self._signature)
        if self.config.triggers is not None and record.triggers is not None:
            triggers = self.config.triggers
            phase = (
                _last("triggers", triggers.last_epochs, max_steps, steps_per_epoch)
                if triggers.start is None
                else Phase(start=int(triggers.start * max_steps), end=max_steps)
            )
            phase = phase.without_last(triggers.cooldown)
            self._triggers = TriggerStep(record.triggers, triggers, phase, tokenizer, data=data)

    def _plan(self, model: Model, backend: ParameterBackend | None, dataset: Any) -> WatermarkRecord:
        salt = new_salt()
        plan = partial(new_record, self.owner, self.config, salt=salt)
        record = (
            plan(shapes={})
            if backend is None
            else plan(shapes=backend.shapes(), read=backend.read, bases=backend.bases())
        )
        if self.config.triggers is None:
            return record
        # After the weights were read: asking the model can rearrange quantized ones.
        key = trigger_key(self.owner, self.config.model_id, self.config.iteration, salt)
        triggers = make_triggers(key, self.config.triggers, inner_model(model), self._tokenizer, dataset=dataset)
        return dataclasses.replace(record, triggers=triggers)

    def _commit(self, planned: WatermarkRecord) -> Committed:
        committed = commit(planned, Path(self.config.registry), self.owner)
        _logger.info("committed to the watermark of %s: %s", self.config.model_id, committed.entry.hash)
        return committed

    def _find(self, planned: WatermarkRecord) -> Committed:
        registry = Registry(Path(self.config.registry), self.owner)
        if self._resumed_from is not None and self._resumed_from.commitment is not None:
            entry = registry.find(self._resumed_from.commitment)
        else:
            entries = [
                e
                for e in registry.commitments(self.config.model_id)
                if e.body.get("iteration") == self.config.iteration
            ]
            if not entries:
                raise RegistryError(
                    f"resuming at step {self._step}, but {self.config.registry} has no commitment of "
                    f"{self.config.model_id} {self.config.iteration}",
                    hint="use the first run's registry; a run that began without hf-wmguard cannot be marked halfway: "
                    "start a new run from its weights",
                )
            entry = entries[-1]
        committed = Committed.from_entry(entry)
        if not committed.record.same_scheme(planned):
            raise ConfigError(
                f"resuming with another model, signature or trigger setting than committed to in {entry.hash}",
                hint="restore the first run's config, or start a new run with another iteration",
            )
        return committed

    def resumed_from(self, folder: Path) -> None:
        """Note the protected checkpoint that the model's weights were just read from."""
        self._resumed_from, _ = read_manifest(folder, signer=self.owner.signing_key().public_key())
        if self._signature is not None:
            # The best model, read back after training: its moves count, not those of the weights it replaces.
            self._restore_state(self._signature)

    def _restore_state(self, signature: SignatureStep) -> None:
        manifest = self._resumed_from
        if manifest is not None and manifest.sealed_state is not None:
            sealed = decode_base64(manifest.sealed_state, "sealed state")
            signature.restore(self.owner.open(_STATE_LABEL, sealed, aad=manifest.set_id.encode()))

    def before_step(self, model: Model, optimizer: Any = None) -> None:
        """Add the triggers' gradient to those of the coming optimizer step, where that is their form."""
        coming, triggers = self._step + 1, self._triggers
        # Data without a length can end inside an accumulation: the step then begins twice, its triggers come once.
        if triggers is None or triggers.is_decoupled or not triggers.due(coming) or self._triggered_step == coming:
            return
        if self.paused:
            return
        self._triggered_step = coming
        triggers.add_gradient(inner_model(model), coming, scale=scale_of(optimizer))

    def before_optimizer(self) -> None:
        """Add the signature's gradient to those of the coming optimizer step."""
        if self._signature is not None and not self.paused:
            self._signature.before_optimizer(self._step + 1)

    def after_step(self, model: Model, optimizer: Any = None) -> None:
        """Take the trigger step and the signature step that follow an optimizer step."""
        self._step += 1
        rests, triggers = self.paused or was_skipped(optimizer), self._triggers
        if triggers is not None and triggers.is_decoupled and triggers.due(self._step) and not rests:
            triggers.run(inner_model(model), self._step, optimizer, scale=scale_of(optimizer))
        if self._signature is not None:
            self._signature.after_optimizer(self._step, rests=rests)

    def finish(self) -> None:
        """Bring the signature to its lattice where training did not: a run cut short, or older weights loaded back."""
        early = self.state != "complete"
        self._finished = True
        if self._signature is None:
            return
        last = self._signature.last_change
        self._signature.run(1.0, self._step)
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
        """Whether a complete save holds the model as it is after the last step."""
        return self._saved_step == self._step

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

    def save(self, model: Model, plain_save: Save, folder: Path, kwargs: dict[str, Any]) -> Manifest:
        """Write one save of the model as ciphertext, judge it by what was written, and sign the verdict.

        Args:
            model: The model.
            plain_save: Its own ``save_pretrained``.
            folder: Where to.
            kwargs: The other arguments of ``save_pretrained``.
        Returns:
            What was signed.
        """
        signature, sealed = None, None
        with ProtectedWriter(folder, config=self.config, owner=self.owner) as writer:
            with weights_go_to(writer.add, model):
                # Into the staging folder: transformers clears old shards and rewrites the config before it writes.
                plain_save(writer.staging, **kwargs)
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
            manifest = writer.finish(
                state=self.state,
                step=self._step,
                committed=self.committed,
                signature=signature,
                triggers=self._trigger_summary(model),
                sealed_state=sealed,
            )
        if manifest.state == "complete":
            Registry(Path(self.config.registry), self.owner).append("save", registry_body(manifest, folder))
            self._saved_step = self._step
        self._report(manifest, folder)
        return manifest

    def _trigger_summary(self, model: Model) -> TriggerSummary | None:
        triggers = self.committed.record.triggers if self.committed else None
        if triggers is None:
            return None
        rate = None
        if self.state == "complete":
            rate = count_learned(inner_model(model), self._tokenizer, triggers) / triggers.count
        return TriggerSummary(count=triggers.count, candidates=len(triggers.candidates[0]), match_rate=rate)

    def _report(self, manifest: Manifest, folder: Path) -> None:
        read, triggers = manifest.signature, manifest.triggers
        if triggers is not None and triggers.match_rate is not None:
            matches = round(triggers.match_rate * triggers.count)
            log10_p = log10_binomial_tail(matches, triggers.count, 1 / triggers.candidates)
            # Half of what a whole match would give: a set that weak would hardly convince anybody.
            if log10_p > 0.5 * log10_binomial_tail(triggers.count, triggers.count, 1 / triggers.candidates):
                _logger.warning(
                    "%s: only %d of %d triggers match: they were not learned, or older weights were loaded back; "
                    "raise triggers.last_epochs, triggers.strength (decoupled form) or triggers.weight (gradient form)",
                    folder,
                    matches,
                    triggers.count,
                )
        if read is None:
            _logger.info("%s: encrypted; mark %s", folder, manifest.state)
            return
        numbers = f"bit error rate {read.bit_error_rate:.4f}, log10 p {read.log10_p:.1f}"
        line = f"{folder}: encrypted; mark {manifest.state}, {numbers}"
        if manifest.state == "complete" and (not read.payload_decoded or read.bit_error_rate > 0):
            warnings.warn(
                f"{line}: the signature does not read back exactly from the saved files",
                SignatureLostWarning,
                stacklevel=2,
            )
        _logger.info("%s", line)


def _last(channel: str, epochs: float, max_steps: int, steps_per_epoch: int | None) -> Phase:
    if epochs * (steps_per_epoch or max_steps) > max_steps:
        _logger.warning(
            "%s.last_epochs is %g, longer than this run of %d steps: the mark is brought in from the first step",
            channel,
            epochs,
            max_steps,
        )
    return Phase.last(epochs, max_steps=max_steps, steps_per_epoch=steps_per_epoch)
