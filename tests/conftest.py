"""Small real models and tokenizers, made on the spot: no download, seconds on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: nothing in the tests may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from hf_wmguard.config import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.keys import OwnerKey, write_key_pair


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def owner_file(tmp_path: Path) -> Path:
    """An owner key on disk."""
    path = tmp_path / "owner.key"
    OwnerKey.generate().write(path)
    return path


@pytest.fixture
def identity_file(tmp_path: Path) -> Path:
    """A recipient's private key on disk, its public half beside it."""
    path = tmp_path / "inference.key"
    identity = generate_identity()
    write_key_pair(path, identity.to_text().encode(), identity.recipient().to_text().encode())
    return path


@pytest.fixture
def make_config(tmp_path: Path, owner_file: Path, identity_file: Path) -> Callable[..., WatermarkConfig]:
    """A config whose budget suits models of a few hundred thousand weights."""

    def make(**changes: object) -> WatermarkConfig:
        values: dict[str, object] = {
            "model_id": "acme/tiny",
            "owner_key": f"file:{owner_file}",
            "registry": str(tmp_path / "registry"),
            "signature": SignatureConfig(budget=0.06),
            "triggers": TriggerConfig(count=16, batch_size=16, every_n_steps=1, last_epochs=12),
            "protection": ProtectionConfig(recipients=(f"file:{identity_file}.pub",)),
        }
        return WatermarkConfig(**{**values, **changes})  # type: ignore[arg-type]

    return make
