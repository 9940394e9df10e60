"""LoRA adapters saved by PEFT, read as the change that PEFT itself merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_wmguard.errors import FormatError, NotFoundError, UnsupportedError, WmguardError
from hf_wmguard.suspects.reader import open_suspect, tile_reader
from hf_wmguard.watermark.carriers import Carrier

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def base(kind: str = "llama") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "vocab_size": 8}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=24, n_head=4, n_layer=1, vocab_size=8, n_positions=8))
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, intermediate_size=40, **sizes))


def save(folder: Path, kind: str = "llama", **fields: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors; return the change of every matrix that merging it makes."""
    before = {name: tensor.clone() for name, tensor in base(kind).state_dict().items()}
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **fields})
    model = get_peft_model(base(kind), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    after = model.merge_and_unload().state_dict()
    changes = {name: after[name] - tensor for name, tensor in before.items()}
    return {name: change for name, change in changes.items() if change.abs().max() > 0}


def check(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    assert changes
    with open_suspect(folder) as suspect:
        assert suspect.is_delta
        tile_of = tile_reader(suspect)
        for name, change in changes.items():
            rows, columns = change.shape
            for start, count in [(0, rows), (3, 7)]:
                carrier = Carrier(name=name, shape=(rows, columns), row_start=start, rows=count, sides=(1, 1), rms=1.0)
                tile = tile_of(carrier)
                assert tile is not None
                assert tile.dtype == torch.float32
                torch.testing.assert_close(tile, change[start : start + count], rtol=1e-4, atol=1e-5)
        # Everything else is not there, above all not as zeros.
        assert len(suspect.shapes()) == len(changes)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 3}},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 50}},
        {"rank_pattern": {"^model.layers.1.mlp.down_proj": 2}, "alpha_pattern": {"down_proj": 1.5}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_a_tile_is_what_merging_adds(fields: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, save(tmp_path, **fields))


def test_layers_that_store_their_input_first(tmp_path: Path) -> None:
    check(tmp_path, save(tmp_path, "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))


def test_other_files_and_names(tmp_path: Path) -> None:
    changes = save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    torch.save(named, tmp_path / "adapter_model.bin")
    check(tmp_path, changes)
    check(tmp_path / "adapter_model.bin", changes)


def test_a_model_is_no_change(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    with open_suspect(tmp_path) as suspect:
        assert not suspect.is_delta


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_what_an_adapter_alone_does_not_give_is_refused(fields: dict[str, Any], what: str, tmp_path: Path) -> None:
    save(tmp_path, **fields)
    with pytest.raises(UnsupportedError, match=what) as caught, open_suspect(tmp_path):
        pass
    assert "merge" in caught.value.hint


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    get_peft_model(base(), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=str(config.peft_type.value)), open_suspect(tmp_path):
        pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder)
    return folder


def changed(saved: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 5},
        {"r": 3},
        {"r": 0},
        {"r": -4},
        {"r": 4.0},
        {"r": "4"},
        {"r": True},
        {"r": None},
        {"r": 1 << 70},
        {"rank_pattern": {"q_proj": 5}},
        {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": [4]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": "q_proj"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": "6"},
        {"lora_alpha": True},
    ],
)
def test_a_config_that_lies(fields: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught, open_suspect(changed(saved, tmp_path, **fields)):
        pass
    assert caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": None},
        {"peft_type": ["LORA"]},
        {"init_lora_weights": {"a": 1}},
        # Run on a long name, this never ends.
        {"rank_pattern": {"(.*.*)*x": 4}},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 1]]},
        {"lora_bias": True},
    ],
)
def test_a_config_of_something_else(fields: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError), open_suspect(changed(saved, tmp_path, **fields)):
        pass


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"{", b"\xff", b"[" * 100_000, b" " * (1 << 21)])
def test_a_config_that_cannot_be_read(data: bytes, saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path)
    (folder / "adapter_config.json").write_bytes(data)
    with pytest.raises(FormatError), open_suspect(folder):
        pass


def test_a_missing_config_is_named(saved: Path, tmp_path: Path) -> None:
    (changed(saved, tmp_path) / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"adapter_config\.json"), open_suspect(tmp_path):
        pass


def test_factors_that_do_not_fit(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))

    def raises(error: type[WmguardError], changes: dict[str, torch.Tensor]) -> None:
        save_file({**tensors, **changes}, path)
        with pytest.raises(error), open_suspect(tmp_path):
            pass

    raises(FormatError, {name: torch.ones(9, 24)})
    raises(FormatError, {"base_model.model.x.lora_A.weight": torch.ones(4, 24)})
    raises(UnsupportedError, {name.replace(".weight", ".other.weight"): tensors[name].clone()})
    raises(UnsupportedError, {"base_model.model.x.lora_magnitude_vector": torch.ones(4)})
    save_file({"x": torch.ones(2, 2)}, path)
    with pytest.raises(FormatError, match="no pairs"), open_suspect(tmp_path):
        pass
