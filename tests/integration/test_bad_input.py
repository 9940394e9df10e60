"""Everything that can be wrong is a named error with a hint and an exit code, and costs nothing that was there."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from tiny import LABELS, Run, digest_weights, make_keys
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, Trainer

from hf_wmguard import WatermarkCallback, load_protected, protect_trainer, verify
from hf_wmguard.config import SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.errors import (
    AuthenticationError,
    CapacityError,
    FormatError,
    KeyFormatError,
    KeyPermissionError,
    ManifestError,
    NonFiniteWeightError,
    NotFoundError,
    OwnershipError,
    RegistryError,
    UnsupportedError,
    WmguardError,
)
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.suspects.plaintext import PlaintextFinder

MakeTrainer = Callable[..., Trainer]
MakeConfig = Callable[..., WatermarkConfig]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _check(error: WmguardError, exit_code: int) -> None:
    assert error.message
    assert error.hint
    assert error.exit_code == exit_code


# Keys


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


KEY_FAULTS: dict[str, tuple[Callable[[Path], object], type[WmguardError], int]] = {
    "missing": (Path.unlink, NotFoundError, 4),
    "short": (_shorten, KeyFormatError, 3),
    "empty": (lambda path: path.write_bytes(b""), KeyFormatError, 3),
    "zeros": (lambda path: path.write_bytes(bytes(32)), KeyFormatError, 3),
    "readable by others": (lambda path: path.chmod(0o644), KeyPermissionError, 3),
    "readable by the group": (lambda path: path.chmod(0o640), KeyPermissionError, 3),
}


@pytest.mark.parametrize("fault", KEY_FAULTS)
def test_bad_owner_key_stops_before_training(
    fault: str, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig, owner_file: Path
) -> None:
    spoil, error, code = KEY_FAULTS[fault]
    spoil(owner_file)
    trainer = make_trainer()
    with pytest.raises(error) as caught:
        protect_trainer(trainer, make_config())
    _check(caught.value, code)
    # The Trainer itself makes its output folder.
    assert _files(tmp_path / "out") == {}
    assert not (tmp_path / "registry").exists()
    assert not any(isinstance(one, WatermarkCallback) for one in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("fault", ["missing", "short", "empty"])
def test_bad_recipient_stops_before_training(
    fault: str, make_trainer: MakeTrainer, make_config: MakeConfig, identity_file: Path
) -> None:
    spoil, error, code = KEY_FAULTS[fault]
    spoil(identity_file.with_name(identity_file.name + ".pub"))
    with pytest.raises(error) as caught:
        protect_trainer(make_trainer(), make_config())
    _check(caught.value, code)


@pytest.mark.parametrize("fault", ["missing", "short", "empty", "readable by others"])
def test_bad_identity(fault: str, guarded: Run, tmp_path: Path) -> None:
    spoil, error, code = KEY_FAULTS[fault]
    path = tmp_path / "inference.key"
    shutil.copy(guarded.root / "keys" / "inference.key", path)
    spoil(path)
    with pytest.raises(error) as caught:
        load_protected(guarded.final, identity=f"file:{path}", auto_class=AutoModelForSequenceClassification)
    _check(caught.value, code)


def test_wrong_keys(guarded: Run, tmp_path: Path) -> None:
    make_keys(tmp_path)
    with pytest.raises(AuthenticationError) as caught:
        load_protected(
            guarded.final, identity=f"file:{tmp_path / 'inference.key'}", auto_class=AutoModelForSequenceClassification
        )
    _check(caught.value, 3)
    with pytest.raises(AuthenticationError) as caught:
        verify(guarded.final, owner_key=f"file:{tmp_path / 'owner.key'}", registry=guarded.where["registry"])
    _check(caught.value, 3)
    with pytest.raises(ManifestError) as refused:
        load_protected(
            guarded.final,
            identity=guarded.identity,
            signer=f"file:{tmp_path / 'owner.key.pub'}",
            auto_class=AutoModelForSequenceClassification,
        )
    _check(refused.value, 3)


def test_registry_without_the_model(guarded: Run, tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as caught:
        verify(guarded.final, **guarded.where, model_id="acme/other")
    _check(caught.value, 3)
    with pytest.raises(NotFoundError) as missing:
        verify(guarded.final, owner_key=guarded.where["owner_key"], registry=tmp_path / "none")
    _check(missing.value, 4)


# Protected folders


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _truncate(folder: Path, run: Run) -> None:
    _weights(folder).write_bytes(_weights(folder).read_bytes()[:-1])


def _lengthen(folder: Path, run: Run) -> None:
    _weights(folder).write_bytes(_weights(folder).read_bytes() + b"\0")


def _flip(place: float) -> Callable[[Path, Run], None]:
    def flip(folder: Path, run: Run) -> None:
        data = bytearray(_weights(folder).read_bytes())
        data[int(place * len(data))] ^= 1
        _weights(folder).write_bytes(data)

    return flip


def _edit_manifest(folder: Path, run: Run) -> None:
    path = folder / "wmguard_manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"state":"complete"', b'"state":"pending" '))


def _edit_config(folder: Path, run: Run) -> None:
    # The same size: only the signed digest can tell.
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    assert path.read_text() != before


def _take(name: str, source: str) -> Callable[[Path, Run], None]:
    def take(folder: Path, run: Run) -> None:
        for one in name.split():
            shutil.copy(run.root / source / one, folder)

    return take


def _drop(name: str) -> Callable[[Path, Run], None]:
    return lambda folder, run: (folder / name).unlink()


def _plaintext_beside(folder: Path, run: Run) -> None:
    save_file({"a": torch.ones(2, 2)}, folder / "extra.safetensors")


ALL_OURS = "wmguard_manifest.json wmguard_manifest.sig.json wmguard_recipients.json"
FOLDER_FAULTS: dict[str, tuple[Callable[[Path, Run], None], tuple[type[WmguardError], ...]]] = {
    "truncated": (_truncate, (ManifestError,)),
    "longer": (_lengthen, (ManifestError,)),
    "flipped in the middle": (_flip(0.5), (AuthenticationError,)),
    "flipped at the end": (_flip(0.9999), (AuthenticationError,)),
    "flipped in the header length": (_flip(0), (FormatError,)),
    "flipped in the header": (_flip(0.0002), (FormatError, AuthenticationError, ManifestError)),
    "edited manifest": (_edit_manifest, (ManifestError,)),
    "edited config": (_edit_config, (ManifestError,)),
    "another folder's manifest": (_take("wmguard_manifest.json", "own"), (ManifestError,)),
    "another folder's manifest and envelope": (
        _take("wmguard_manifest.json wmguard_manifest.sig.json", "own"),
        (ManifestError,),
    ),
    "swapped recipients": (_take("wmguard_recipients.json", "out/checkpoint-48"), (ManifestError, AuthenticationError)),
    "older weights under a newer manifest": (_take("model.safetensors", "out/checkpoint-40"), (ManifestError,)),
    "newer weights with an older save's papers": (_take(ALL_OURS, "out/checkpoint-40"), (ManifestError,)),
    "no recipients": (_drop("wmguard_recipients.json"), (NotFoundError,)),
    "no envelope": (_drop("wmguard_manifest.sig.json"), (NotFoundError,)),
    "no weights": (_drop("model.safetensors"), (ManifestError,)),
    "plaintext beside it": (_plaintext_beside, (ManifestError,)),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_damaged_protected_folder(fault: str, guarded: Run, tmp_path: Path) -> None:
    spoil, errors = FOLDER_FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    spoil(folder, guarded)
    before = _files(folder)
    with pytest.raises(errors) as caught:
        load_protected(folder, identity=guarded.identity, auto_class=AutoModelForSequenceClassification)
    _check(caught.value, 4 if caught.type is NotFoundError else 3)
    # The verdict reads the same folder: it is an error there too, and never "not detected". Only a part that
    # carries nothing is not read for it.
    if fault == "flipped at the end":
        assert verify(folder, **guarded.where).verdict == "detected"
    else:
        with pytest.raises(WmguardError) as judged:
            verify(folder, **guarded.where)
        assert judged.value.exit_code in (3, 4)
        assert judged.value.hint
    assert _files(folder) == before


def test_every_flip_in_a_header_is_refused(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    data = _weights(folder).read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    for place in range(0, header_bytes, header_bytes // 25):
        changed = bytearray(data)
        changed[place] ^= 1
        _weights(folder).write_bytes(changed)
        with pytest.raises(WmguardError) as caught:
            load_protected(folder, identity=guarded.identity, auto_class=AutoModelForSequenceClassification)
        _check(caught.value, 3)


# Models and runs


def test_too_few_carriers_names_a_budget_that_works(
    tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer(max_steps=2, save_strategy="no")
    protect_trainer(trainer, make_config(signature=SignatureConfig(), triggers=None))
    with pytest.raises(CapacityError, match="too few carriers") as caught:
        trainer.train()
    _check(caught.value, 2)
    assert not (tmp_path / "registry").exists()
    named = re.search(r"raise the budget to ([0-9.]+)", caught.value.hint)
    assert named is not None
    budget = float(named[1].rstrip("."))

    trainer = make_trainer(max_steps=2, save_strategy="no")
    protect_trainer(trainer, make_config(signature=SignatureConfig(budget=budget), triggers=None))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    assert signature.payload_decoded


def test_no_carriers_at_all(make_trainer: MakeTrainer, make_config: MakeConfig) -> None:
    tiny = BertForSequenceClassification(
        BertConfig(
            vocab_size=2000,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            num_labels=LABELS,
        )
    )
    trainer = make_trainer(model=tiny)
    protect_trainer(trainer, make_config())
    with pytest.raises(CapacityError, match="no matrix") as caught:
        trainer.train()
    _check(caught.value, 2)
    assert "signature=None" in caught.value.hint


UNSAVED = """
import sys
from pathlib import Path
import torch
from tiny import build_trainer, guarded_config, make_keys, make_texts, make_tokenizer
from hf_wmguard import protect_trainer

torch.set_num_threads(1)
root = Path(sys.argv[1])
make_keys(root / "keys")
trainer = build_trainer(root / "out", make_tokenizer(), make_texts(), max_steps=2, save_strategy="no")
protect_trainer(trainer, guarded_config(root))
trainer.train()
"""


def test_run_that_ends_without_a_save(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNSAVED, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().endswith(
        "error: UnsavedRunError: the marked model of acme/tiny is in memory only: this run has not saved it yet\n"
        "hint: call trainer.save_model() after trainer.train(), or set protection.destination"
    )
    assert list(tmp_path.rglob("*.safetensors")) == []
    with pytest.raises(NotFoundError) as caught:
        verify(tmp_path / "out", owner_key=f"file:{tmp_path / 'keys' / 'owner.key'}", registry=tmp_path / "registry")
    _check(caught.value, 4)
    assert "trainer.save_model()" in caught.value.hint


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight", "classifier.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_at_the_start(
    name: str, value: float, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[0] = value
    protect_trainer(trainer, make_config())
    with pytest.raises(NonFiniteWeightError, match=name) as caught:
        trainer.train()
    _check(caught.value, 3)
    assert not (tmp_path / "registry").exists()


def test_weight_that_is_not_finite_at_a_save(guarded: Run, tmp_path: Path) -> None:
    twin = copy.deepcopy(guarded.trainer.model)
    with torch.no_grad():
        twin.classifier.bias[0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=r"classifier\.bias") as caught:
        twin.save_pretrained(tmp_path / "model")
    _check(caught.value, 3)
    assert list(tmp_path.rglob("*wmguard*")) == []
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("whose", ["another owner's", "another model", "broken"])
def test_folder_of_someone_elses_protected_model(
    whose: str, guarded: Run, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    shutil.copytree(guarded.final, tmp_path / "out")
    config = make_config()
    if whose == "another model":
        assert guarded.config is not None
        config = dataclasses.replace(
            guarded.config, model_id="acme/second", registry=str(tmp_path / "registry"), triggers=None
        )
    if whose == "broken":
        (tmp_path / "out" / "wmguard_manifest.sig.json").write_text("{}")
    before = _files(tmp_path / "out")
    trainer = make_trainer()
    protect_trainer(trainer, config)
    with pytest.raises(OwnershipError) as caught:
        trainer.train()
    _check(caught.value, 3)
    assert trainer.state.global_step == 0
    assert not (tmp_path / "registry").exists()
    with pytest.raises(OwnershipError):
        trainer.save_model()
    with pytest.raises(OwnershipError):
        trainer.model.save_pretrained(tmp_path / "out")
    assert _files(tmp_path / "out") == before


def _set(**values: object) -> Callable[[Trainer], None]:
    def change(trainer: Trainer) -> None:
        for name, value in values.items():
            setattr(trainer.args, name, value)

    return change


def _quantized(trainer: Trainer) -> None:
    # What a loaded quantized model carries; no quantization library is needed to see it.
    trainer.model.hf_quantizer = object()


def _adapter(trainer: Trainer) -> None:
    # What model.add_adapter does; transformers 5.24 refuses to with every peft that is released.
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), trainer.model)
    trainer.model._hf_peft_config_loaded = True


def _offloaded(trainer: Trainer) -> None:
    trainer.model.hf_device_map = {"bert": "cpu", "classifier": "disk"}


MODES: dict[str, tuple[Callable[[Trainer], None], str]] = {
    "deepspeed": (_set(deepspeed="ds.json"), "DeepSpeed"),
    "fsdp": (_set(fsdp=["full_shard"]), "FSDP"),
    "schedule-free": (_set(optim="schedule_free_adamw"), "schedule-free"),
    "quantized": (_quantized, "quantized"),
    "adapter": (_adapter, "PEFT adapters"),
    "disk offload": (_offloaded, "offloaded to disk"),
}


@pytest.mark.parametrize("mode", MODES)
def test_unsupported_mode_is_refused_at_once(
    mode: str, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    change, what = MODES[mode]
    trainer = make_trainer()
    change(trainer)
    with pytest.raises(UnsupportedError, match=what) as caught:
        protect_trainer(trainer, make_config())
    _check(caught.value, 2)
    # Nothing was changed: the Trainer is as it was.
    assert not any(isinstance(one, WatermarkCallback) for one in trainer.callback_handler.callbacks)
    assert "save_pretrained" not in vars(trainer.model)
    trainer.add_callback(WatermarkCallback(make_config()))
    with pytest.raises(UnsupportedError):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "registry").exists()


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, **batch: Any) -> Any:
        return {"loss": self.layer.weight.sum()}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["nn.Module", "PEFT"])
def test_model_that_the_trainer_would_save_in_plaintext(
    kind: str, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    model = _Plain() if kind == "nn.Module" else get_peft_model(_Plain(), LoraConfig(r=2, target_modules=["layer"]))
    trainer = make_trainer(model=model)
    with pytest.raises(UnsupportedError, match="PreTrainedModel") as caught:
        protect_trainer(trainer, make_config())
    _check(caught.value, 2)
    trainer.add_callback(WatermarkCallback(make_config()))
    with pytest.raises(UnsupportedError, match="PreTrainedModel"):
        trainer.train()


def _float64(model: nn.Module) -> None:
    model.to(torch.float64)


def _frozen(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)


def _frozen_bf16(model: nn.Module) -> None:
    _frozen(model)
    model.base_model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "what"),
    [(_float64, "expected float32, bfloat16, float16"), (_frozen, "are frozen"), (_frozen_bf16, "are frozen")],
)
def test_weights_that_cannot_be_moved(
    change: Callable[[nn.Module], None], what: str, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer()
    change(trainer.model)
    protect_trainer(trainer, make_config())
    with pytest.raises(UnsupportedError, match=what) as caught:
        trainer.train()
    _check(caught.value, 2)
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_triggers_without_a_tokenizer(
    task: str, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer(task, trainer={"processing_class": None})
    protect_trainer(trainer, make_config(triggers=TriggerConfig(count=4)))
    before = digest_weights(trainer.model)
    with pytest.raises(UnsupportedError, match="tokenizer") as caught:
        trainer.train()
    _check(caught.value, 2)
    assert digest_weights(trainer.model) == before
    assert not (tmp_path / "registry").exists()


# Suspects


@pytest.fixture(scope="module")
def stolen(guarded: Run) -> dict[str, torch.Tensor]:
    """The guarded model's weights, as a thief would hold them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in guarded.trainer.model.state_dict().items()}


class _Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def _empty(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    return folder


def _pickle(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Bomb()}, protocol=2))
    return folder


def _torch_pickle(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    torch.save({**weights, "bomb": _Bomb()}, folder / "pytorch_model.bin")
    return folder


def _not_a_dict(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    torch.save([1, 2], folder / "model.pt")
    return folder / "model.pt"


def _damaged(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    return folder


def _unknown(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "model.onnx")
    return folder / "model.onnx"


def _one_file(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    return run.final / "model.safetensors"


def _lost_shard(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    return folder


def _outside(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    return folder


def _bad_index(folder: Path, run: Run, weights: dict[str, torch.Tensor]) -> Path:
    (folder / "model.safetensors.index.json").write_text("[")
    return folder


SUSPECT_FAULTS: dict[str, tuple[Callable[..., Path], type[WmguardError], int]] = {
    "empty folder": (_empty, NotFoundError, 4),
    "missing": (lambda folder, run, weights: folder / "none", NotFoundError, 4),
    "pickle that runs code": (_pickle, FormatError, 3),
    "weights with code among them": (_torch_pickle, FormatError, 3),
    "no state dict": (_not_a_dict, FormatError, 3),
    "damaged safetensors": (_damaged, FormatError, 3),
    "unknown suffix": (_unknown, FormatError, 3),
    "one file of a protected folder": (_one_file, AuthenticationError, 3),
    "lost shard": (_lost_shard, NotFoundError, 4),
    "index that leaves the folder": (_outside, FormatError, 3),
    "index that is none": (_bad_index, FormatError, 3),
}


@pytest.mark.parametrize("fault", SUSPECT_FAULTS)
def test_suspect_that_cannot_be_read(
    fault: str,
    guarded: Run,
    stolen: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make, error, code = SUSPECT_FAULTS[fault]
    (tmp_path / "suspect").mkdir()
    suspect = make(tmp_path / "suspect", guarded, stolen)
    with pytest.raises(error) as caught:
        verify(suspect, **guarded.where)
    _check(caught.value, code)
    assert not (tmp_path / "exploded").exists()


def _nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}


def _integers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (tensor * 127).to(torch.int8) for name, tensor in weights.items()}


def _transposed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[..., 1:].contiguous() for name, tensor in weights.items()}


@pytest.mark.parametrize("change", [_nan, _integers, _transposed])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_suspect_of_which_too_little_can_be_read(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    suffix: str,
    guarded: Run,
    stolen: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    path = tmp_path / f"suspect{suffix}"
    weights = change(stolen)
    if suffix == ".bin":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    report = verify(path, **guarded.where)
    assert report.verdict == "inconclusive"
    assert report.log10_p == 0
    assert report.signature is not None
    assert report.signature.carriers_read == 0
    json.dumps(report.to_json(), allow_nan=False)


def test_damage_in_one_matrix_does_not_hide_the_rest(
    guarded: Run, stolen: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    broken = stolen[name].clone()
    broken[0, 0] = float("nan")
    save_file({**stolen, name: broken}, tmp_path / "model.safetensors")
    report = verify(tmp_path, **guarded.where)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.carriers_missing == 1


def test_claiming_to_be_protected_does_not_hide_plaintext(
    guarded: Run, stolen: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(stolen, tmp_path / "model.safetensors", metadata={"wmguard": "{}", "format": "pt"})
    for name in ("wmguard_manifest.json", "wmguard_manifest.sig.json"):
        (tmp_path / name).write_text("{}")
    assert verify(tmp_path, **guarded.where).verdict == "detected"


def test_old_torch_format_is_read(guarded: Run, stolen: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": stolen}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert verify(tmp_path / "old.pt", **guarded.where).verdict == "detected"
    assert PlaintextFinder(stolen).scan([tmp_path]) != {}
