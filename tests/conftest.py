"""Small real models and tokenizers, made on the spot: no download, seconds on a CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before transformers is imported: nothing in the tests may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from drawing import SEED, fixed_draws
from hypothesis import settings

from hf_wmguard.config import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.keys import OwnerKey, write_key_pair

if TYPE_CHECKING:
    from hub import Hub
    from tiny import Run
    from transformers import PreTrainedTokenizerFast

# Threads cost tiny matrices more than they give, and far more where something else wants the cores too.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes many minutes, unless it is asked for; the summary says so."""
    for item in items:
        if item.get_closest_marker("slow") and not os.environ.get("WMGUARD_SLOW"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes: set WMGUARD_SLOW=1"))


# The examples that a property is tried on are fixed too; another seed tries others.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed" if SEED == "0" else "default")


@pytest.fixture(autouse=True)
def _fixed_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with fixed_draws(request.node.nodeid):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Generator[None]:
    """Let what is made once for several tests not depend on which of them comes first."""
    if fixturedef.scope == "function":
        return (yield)
    torch.manual_seed(0)
    with fixed_draws(f"{request.node.nodeid}::{fixturedef.argname}[{getattr(request, 'param', '')}]"):
        return (yield)


# Imported in the fixtures: transformers takes seconds to import, and the unit tests do without it.


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Ordinary training texts."""
    from tiny import make_texts

    return make_texts()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the test texts' words."""
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Run:
    """One guarded run of a tiny classifier. Tests that change a file of it work on a copy."""
    from tiny import run_guarded

    root = tmp_path_factory.mktemp("guarded")
    (root / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root / "tmp"))
        patch.setattr(tempfile, "tempdir", None)
        return run_guarded(root, tokenizer, texts)


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
            "triggers": TriggerConfig(
                count=16,
                batch_size=16,
                every_n_steps=1,
                last_epochs=12,
                cooldown=0.0,
                strength=1.0,
                weight=1.0,
                moves=4,
                contexts=0.0,
            ),
            "protection": ProtectionConfig(recipients=(f"file:{identity_file}.pub",)),
        }
        return WatermarkConfig(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def hub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hub]:
    """A Hugging Face Hub on this machine, empty, to which all clients go while the test runs.

    Clients in this process (`huggingface_hub`, also through transformers) and in those it starts use it as ``acme``,
    with a cache of their own, by LFS; ``@pytest.mark.parametrize("hub", ["xet"], indirect=True)`` lets them use Xet.
    LFS contents above 1 MiB go in parts. An `HfApi` made outside the test goes elsewhere: make one in the test.
    For another start, or as another user, see `hub.clients.point_clients`.
    """
    from hub import Hub
    from hub.clients import forget_connections, point_clients

    with Hub(tmp_path / "hub-server", part_bytes=1 << 20) as server:
        with pytest.MonkeyPatch.context() as patch:
            point_clients(patch, server, tmp_path / "hub-home", xet=getattr(request, "param", "lfs") == "xet")
            yield server
        forget_connections()
