"""The vLLM plugin, against a stand-in of vLLM's own loader interface: vLLM itself does not run on the test machines."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_keys, make_model, save_protected
from torch import Tensor

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import AuthenticationError, ConfigError, ManifestError, NotFoundError
from hf_wmguard.loading.vllm import register


@dataclasses.dataclass
class LoadConfig:
    """What vLLM's `LoadConfig` has of it."""

    load_format: str = "wmguard"
    model_loader_extra_config: dict[str, Any] = dataclasses.field(default_factory=dict)


class Receiver:
    """What vLLM's models have of it."""

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.loaded = dict(weights)
        return set(self.loaded)


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """vLLM's table of loaders, after the plugin was called."""
    known: dict[str, Any] = {}

    class BaseModelLoader:
        def __init__(self, load_config: LoadConfig) -> None:
            self.load_config = load_config

    def register_model_loader(load_format: str) -> Callable[[type], type]:
        def add(loader: type) -> type:
            assert issubclass(loader, BaseModelLoader)
            known[load_format] = loader
            return loader

        return add

    package: Any = types.ModuleType("vllm.model_executor.model_loader")
    package.register_model_loader = register_model_loader
    base: Any = types.ModuleType("vllm.model_executor.model_loader.base_loader")
    base.BaseModelLoader = BaseModelLoader
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    register()
    return known


def test_weights_reach_the_model_or_nothing_does(
    loaders: dict[str, Any],
    tmp_path: Path,
    make_config: Callable[..., WatermarkConfig],
    identity_file: Path,
    owner_file: Path,
) -> None:
    model = make_model("causal_lm", 400)
    save_protected(model, tmp_path / "model", make_config(), max_shard_size="100KB")
    config = types.SimpleNamespace(model=str(tmp_path / "model"))
    options = {"identity": f"file:{identity_file}", "check_digests": True}
    loader, receiver = loaders["wmguard"](LoadConfig(model_loader_extra_config=options)), Receiver()
    loader.download_model(config)
    loader.load_weights(receiver, config)
    saved = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert receiver.loaded.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in receiver.loaded.items())

    with pytest.raises(NotFoundError):
        loader.download_model(types.SimpleNamespace(model="acme/model"))
    make_keys(tmp_path / "others")
    for changed, error in (
        ({"identity": f"file:{tmp_path / 'others' / 'inference.key'}"}, AuthenticationError),
        ({"signer": f"file:{tmp_path / 'others' / 'owner.key.pub'}"}, ManifestError),
    ):
        loader, receiver = loaders["wmguard"](LoadConfig(model_loader_extra_config=options | changed)), Receiver()
        with pytest.raises(error):
            loader.load_weights(receiver, config)
        assert receiver.loaded == {}


def test_options_come_from_the_environment_or_are_known(
    loaders: dict[str, Any], identity_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WMGUARD_IDENTITY", raising=False)
    with pytest.raises(ConfigError, match="no identity"):
        loaders["wmguard"](LoadConfig())
    monkeypatch.setenv("WMGUARD_IDENTITY", f"file:{identity_file}")
    loaders["wmguard"](LoadConfig())
    with pytest.raises(ConfigError, match="identty"):
        loaders["wmguard"](LoadConfig(model_loader_extra_config={"identty": "file:x"}))


def test_the_entry_point_is_declared() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nwmguard = "hf_wmguard.loading.vllm:register"\n' in text
    assert importlib.metadata.EntryPoint("wmguard", "hf_wmguard.loading.vllm:register", "x").load() is register
