"""Marking without training: in memory, and folder to folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_wmguard import SignatureConfig, WatermarkConfig, embed, embed_folder, verify
from hf_wmguard.embedding import STAGING_PREFIX
from hf_wmguard.errors import (
    CapacityError,
    ConfigError,
    EnvironmentFault,
    FormatError,
    NonFiniteWeightError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from hf_wmguard.evidence.manifest import digest_file
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.reader import digest
from hf_wmguard.watermark.carriers import is_carrier

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MakeConfig = Callable[..., WatermarkConfig]


def judge(suspect: object, config: WatermarkConfig):  # type: ignore[no-untyped-def]
    return verify(suspect, owner_key=config.owner_key, registry=config.registry)  # type: ignore[arg-type]


def entries(config: WatermarkConfig) -> list[str]:
    if not Path(config.registry).exists():
        return []
    return [one.kind for one in Registry(Path(config.registry), OwnerKey.load(config.owner_key)).entries()]


def relative_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    carrying = [name for name, one in before.items() if is_carrier(name, tuple(one.shape))]
    change = sum(float((after[name].double() - before[name].double()).square().sum()) for name in carrying)
    return math.sqrt(change / sum(float(before[name].double().square().sum()) for name in carrying))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A sharded bf16 causal model with tied weights, its tokenizer and a subfolder."""
    path = tmp_path / "model"
    model = make_model("causal-lm", len(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="200KB")
    tokenizer.save_pretrained(path)
    (path / "training_args.bin").write_bytes(b"the Trainer's own")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


# In memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_marks_in_place(dtype: torch.dtype, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("classification", len(tokenizer)).to(dtype).requires_grad_(False)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    config = make_config()
    done = embed(model, config)
    after = model.state_dict()
    assert done.bit_error_rate == 0
    assert done.weight_change == pytest.approx(relative_change(before, after), rel=1e-3)
    assert 0.01 < done.weight_change <= 0.06
    assert all(after[name].dtype == one.dtype for name, one in before.items())
    changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed
    assert all(is_carrier(name, tuple(before[name].shape)) for name in changed)
    report = judge(model, config)
    assert report.verdict == "detected"
    assert report.commitment["entry"] == done.commitment
    assert report.signature is not None
    assert report.signature.payload_decoded
    assert (report.signature.bit_error_rate, report.signature.projections) == (0, done.projections)
    assert judge(before, config).verdict == "not_detected"


def test_the_commitment_comes_first_and_leaves_triggers_out(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("classification", len(tokenizer))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    config = make_config()
    assert config.triggers is not None

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_wmguard.embedding._mark", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(model, config)
    assert entries(config) == ["commitment"]
    entry = Registry(Path(config.registry), OwnerKey.load(config.owner_key)).entries()[0]
    assert entry.body["record"]["triggers"] is None
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_change_far_below_the_last_place_is_kept(make_config: MakeConfig) -> None:
    # Shifts of a fifth of half a unit in the last place: rounding to nearest would give them all back.
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16) for _ in range(6)))
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(1 + 0.001 * torch.randn(one.shape))
    config = make_config(signature=SignatureConfig(budget=0.001, step=0.1))
    done = embed(model, config)
    assert done.bit_error_rate == 0
    report = judge(model, config)
    assert report.signature is not None
    assert report.signature.payload_decoded


def test_weights_too_coarse_for_the_mark_are_refused(make_config: MakeConfig) -> None:
    # float16 has three values here: no rounding can hold a shift of a tenth of that.
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False, dtype=torch.float16) for _ in range(4)))
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(5e-8 * torch.randn(one.shape).clamp(-1, 1))
    with pytest.raises(UnsupportedError, match="does not read back"):
        embed(model, make_config(signature=SignatureConfig(budget=0.1, step=0.2)))


def test_embed_without_a_signature_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError):
        embed(nn.Linear(8, 8), make_config(signature=None))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own use of it
@pytest.mark.parametrize("kind", ["adapter", "meta", "integer", "quantizer"])
def test_models_that_cannot_be_marked(kind: str, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    model: nn.Module = make_model("causal-lm", len(tokenizer))
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj"]))
    elif kind == "meta":
        model = model.to("meta")
    elif kind == "quantizer":
        model.hf_quantizer = object()  # what transformers sets, whatever the library
    else:
        weight = model.get_submodule("model.layers.0.mlp.up_proj")
        weight.weight = nn.Parameter(torch.zeros(weight.weight.shape, dtype=torch.int8), requires_grad=False)
    config = make_config()
    with pytest.raises(UnsupportedError):
        embed(model, config)
    assert entries(config) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite(value: float, make_config: MakeConfig) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    with torch.no_grad():
        model[3].weight[7, 9] = value
    config = make_config()
    with pytest.raises(NonFiniteWeightError, match=r"3\.weight"):
        embed(model, config)
    assert entries(config) == []


# Folder to folder


def test_embed_folder_changes_the_carriers_and_nothing_else(
    folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    config, out = make_config(), tmp_path / "out"
    done = embed_folder(folder, out, config)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == names
    before, after = {}, {}
    for name in sorted(names):
        old, new = (folder / name).read_bytes(), (out / name).read_bytes()
        assert len(old) == len(new)
        if not name.endswith(".safetensors"):
            assert old == new
            continue
        # Header, metadata and all other tensors are the same, byte for byte.
        start = 8 + int.from_bytes(old[:8], "little")
        assert old[:start] == new[:start]
        before |= load_file(folder / name)
        after |= load_file(out / name)
        with safe_open(folder / name, "pt") as one, safe_open(out / name, "pt") as other:
            assert one.metadata() == other.metadata()
    changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed == {name for name, one in before.items() if is_carrier(name, tuple(one.shape))}
    assert done.weight_change == pytest.approx(relative_change(before, after), rel=1e-3)
    report = judge(out, config)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.payload_decoded
    assert report.signature.bit_error_rate == done.bit_error_rate == 0
    assert judge(folder, config).verdict == "not_detected"
    loaded = LlamaForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(STAGING_PREFIX)]


def test_the_registry_says_what_was_written(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config()
    done = embed_folder(folder, tmp_path / "out", config)
    commitment, save = Registry(Path(config.registry), OwnerKey.load(config.owner_key)).entries()
    assert (commitment.kind, save.kind) == ("commitment", "save")
    assert save.body["commitment"] == commitment.hash == done.commitment
    assert save.body["files"] == {
        path.name: digest_file(path).sha256 for path in (tmp_path / "out").glob("*.safetensors")
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_folder_of_a_single_file(
    dtype: torch.dtype, tmp_path: Path, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_model("classification", len(tokenizer)).to(dtype).save_pretrained(tmp_path / "model")
    config = make_config()
    embed_folder(tmp_path / "model", tmp_path / "out", config)
    report = judge(tmp_path / "out", config)
    assert report.signature is not None
    assert (report.verdict, report.signature.bit_error_rate) == ("detected", 0)


def test_every_byte_is_reported(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    seen: dict[str, int] = {}
    embed_folder(
        folder,
        tmp_path / "out",
        make_config(),
        progress=lambda name, count: seen.__setitem__(name, seen.get(name, 0) + count),
    )
    for path in folder.rglob("*.safetensors"):
        assert seen[path.name] == 2 * path.stat().st_size


def test_links_become_files_of_their_own(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    # A snapshot in the Hub's cache is a folder of links into a store of blobs.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o444)
            (snapshot / path.name).symlink_to(path)
    before = digest(folder)
    embed_folder(snapshot, tmp_path / "out", make_config())
    assert digest(folder) == before
    assert all(stat.S_ISREG(path.lstat().st_mode) for path in (tmp_path / "out").iterdir())


def test_an_empty_output_folder_is_filled(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "out").mkdir()
    embed_folder(folder, tmp_path / "out", make_config())
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("moment", ["_copy", "_mark", "_judge", "_digests"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["killed", "full"])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(
    moment: str,
    error: BaseException,
    folder: Path,
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    config, out = make_config(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(f"hf_wmguard.embedding.{moment}", fail)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else EnvironmentFault):
            embed_folder(folder, out, config)
    assert not out.exists()
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))
    assert entries(config) == ["commitment"]
    embed_folder(folder, out, config)
    assert judge(out, config).verdict == "detected"


def test_what_a_killed_run_left_is_cleared_away(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    stale = tmp_path / f"{STAGING_PREFIX}out"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_bytes(b"half")
    embed_folder(folder, tmp_path / "out", make_config())
    assert not stale.exists()
    assert not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()


def test_where_the_kernel_cannot_copy(
    folder: Path, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    config = make_config()
    embed_folder(folder, tmp_path / "out", config)
    assert judge(tmp_path / "out", config).verdict == "detected"


# Bad input


def one_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_name_in_two_shards(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(FormatError, match="lies in both"):
        embed_folder(folder, tmp_path / "out", make_config())


@pytest.mark.parametrize("lie", ["elsewhere", "nowhere"])
def test_an_index_that_lies(lie: str, folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    names = value["weight_map"]
    first = sorted(names)[0]
    names[first if lie == "elsewhere" else "ghost"] = next(file for file in names.values() if file != names[first])
    index.write_text(json.dumps(value))
    config = make_config()
    with pytest.raises(FormatError, match="does not hold it"):
        embed_folder(folder, tmp_path / "out", config)
    assert entries(config) == []
    assert not (tmp_path / "out").exists()


def test_a_shard_that_was_cut(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    shard = one_file(folder)
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(FormatError, match=shard.name):
        embed_folder(folder, tmp_path / "out", make_config())


def test_a_shard_that_is_missing(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    one_file(folder).unlink()
    with pytest.raises(NotFoundError, match="lacks"):
        embed_folder(folder, tmp_path / "out", make_config())


@pytest.mark.parametrize("name", ["owner.key", "inference.pem"])
def test_a_key_in_the_folder_is_not_handed_on(name: str, folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(signature=SignatureConfig(budget=0.06))
    (folder / name).write_bytes(b"secret")
    with pytest.raises(UnsupportedError, match="is not handed on"):
        embed_folder(folder, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    assert entries(config) == []


def test_hidden_files_stay_behind(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    (folder / ".env").write_text("HF_TOKEN=secret")
    embed_folder(folder, tmp_path / "out", make_config(signature=SignatureConfig(budget=0.06)))
    assert not (tmp_path / "out" / ".env").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "original/consolidated.00.pth", "m.gguf"])
def test_other_weights_would_be_handed_on_unmarked(
    name: str, folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"the same model again")
    with pytest.raises(UnsupportedError, match="unmarked"):
        embed_folder(folder, tmp_path / "out", make_config())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_of_other_types(dtype: torch.dtype, tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "model").mkdir()
    save_file({"layers.0.up.weight": torch.ones(64, 64).to(dtype)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.up\.weight is"):
        embed_folder(tmp_path / "model", tmp_path / "out", make_config())


def test_an_adapter(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "model").mkdir()
    save_file({"layers.0.lora_A.weight": torch.ones(16, 64)}, tmp_path / "model" / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="adapter"):
        embed_folder(tmp_path / "model", tmp_path / "out", make_config())


@pytest.mark.parametrize("inside", [False, True])
def test_the_output_may_not_be_in_the_input(inside: bool, folder: Path, make_config: MakeConfig) -> None:
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(UsageError):
        embed_folder(folder, folder / "marked" if inside else folder, make_config())


def test_the_output_needs_a_parent(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(NotFoundError):
        embed_folder(folder, tmp_path / "none" / "out", config)
    assert entries(config) == []


def test_a_model_that_is_too_small(folder: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(signature=SignatureConfig(budget=0.001))
    with pytest.raises(CapacityError) as refused:
        embed_folder(folder, tmp_path / "out", config)
    assert "raise the budget to" in refused.value.hint
    assert entries(config) == []
