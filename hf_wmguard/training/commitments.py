"""Find again what a run that is resumed committed to."""

from __future__ import annotations

from pathlib import Path

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import ConfigError, RegistryError
from hf_wmguard.evidence.manifest import Manifest
from hf_wmguard.evidence.registry import Entry, Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import Committed
from hf_wmguard.watermark.record import WatermarkRecord


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


def _newest(registry: Registry, config: WatermarkConfig, step: int) -> Entry:
    entries = [e for e in registry.commitments(config.model_id) if e.body.get("iteration") == config.iteration]
    if not entries:
        raise RegistryError(
            f"resuming at step {step}, but {config.registry} has no commitment of {config.model_id} {config.iteration}",
            hint="use the first run's registry; a run that began without hf-wmguard cannot be marked halfway: "
            "start a new run from its weights",
        )
    return entries[-1]
