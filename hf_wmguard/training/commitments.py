"""What a run commits to: planned before the first step, found again when it is resumed."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import ConfigError, RegistryError
from hf_wmguard.evidence.manifest import Manifest
from hf_wmguard.evidence.registry import Entry, Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import Committed, new_record
from hf_wmguard.training.backends import ParameterBackend
from hf_wmguard.training.saving import Model, inner_model
from hf_wmguard.training.trigger_set import has_rows, make_triggers
from hf_wmguard.watermark.record import WatermarkRecord, trigger_key


def plan_record(
    owner: OwnerKey,
    config: WatermarkConfig,
    model: Model,
    backend: ParameterBackend | None,
    tokenizer: Any,
    dataset: Any,
    salt: bytes,
) -> WatermarkRecord:
    """Return what a new marking would commit to.

    Args:
        owner: The owner's key.
        config: What to embed.
        model: The model before training.
        backend: What can carry its signature; None where the config asks for none.
        tokenizer: The model's tokenizer or image processor; needed for triggers.
        dataset: What it is trained on, for triggers that are made from its rows.
        salt: Of the marking.
    Raises:
        CapacityError, ConfigError, NonFiniteWeightError, UnsupportedError: The model cannot carry this watermark.
    """
    plan = partial(new_record, owner, config, salt=salt)
    record = (
        plan(shapes={}) if backend is None else plan(shapes=backend.shapes(), read=backend.read, bases=backend.bases())
    )
    if config.triggers is None:
        return record
    if config.triggers.replay and not has_rows(dataset):
        raise ConfigError(
            f"triggers.replay is {config.triggers.replay}, and the training data has no rows to ask for by number",
            hint="set triggers.replay to 0, or train on data that has a length",
        )
    # After the weights were read: asking the model can rearrange quantized ones.
    key = trigger_key(owner, config.model_id, config.iteration, salt)
    triggers = make_triggers(key, config.triggers, inner_model(model), tokenizer, dataset=dataset)
    return dataclasses.replace(record, triggers=triggers)


def find_committed(
    owner: OwnerKey, config: WatermarkConfig, planned: WatermarkRecord, *, step: int, resumed_from: Manifest | None
) -> Committed:
    """Return what a run committed to before it was interrupted.

    Args:
        owner: The owner's key.
        config: The run's config.
        planned: What would be committed to now: the same scheme, or the config has changed.
        step: Steps already done.
        resumed_from: Manifest of the checkpoint, None where its weights were read by somebody else.
    Raises:
        RegistryError: The registry has no such commitment.
        ConfigError: It is another scheme's.
    """
    registry = Registry(Path(config.registry), owner)
    entry = (
        registry.find(resumed_from.commitment)
        if resumed_from is not None and resumed_from.commitment is not None
        else _newest(registry, config, step)
    )
    committed = Committed.from_entry(entry)
    if not committed.record.same_scheme(planned):
        raise ConfigError(
            f"resuming with another model, signature or trigger setting than committed to in {entry.hash}",
            hint="restore the first run's config, or start a new run with another iteration",
        )
    return committed


def check_same_run(committed: Committed, manifest: Manifest, folder: Path) -> None:
    """Refuse a checkpoint of another run in the place of this one's.

    Raises:
        ConfigError: Its mark was committed to by another run.
    """
    if manifest.commitment != committed.entry.hash:
        raise ConfigError(
            f"{folder} belongs to another run: its mark was committed to in {manifest.commitment}, "
            f"this run's in {committed.entry.hash}",
            hint="resume in a new process, or from a checkpoint of this run",
        )


def _newest(registry: Registry, config: WatermarkConfig, step: int) -> Entry:
    entries = [e for e in registry.commitments(config.model_id) if e.body.get("iteration") == config.iteration]
    if not entries:
        raise RegistryError(
            f"resuming at step {step}, but {config.registry} has no commitment of {config.model_id} {config.iteration}",
            hint="use the first run's registry; a run that began without hf-wmguard cannot be marked halfway: "
            "start a new run from its weights",
        )
    return entries[-1]
