"""DoRA through the Trainer: rows are turned and keep their factor, so that the mark is exact in what merging makes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_lora import LoraRun, adapt, check, guarded_lora, merged
from tiny import Recorder, StopAt, build_trainer, make_model
from transformers import PreTrainedTokenizerFast

from hf_wmguard import protect_trainer, verify
from hf_wmguard.config import SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.loading import decrypt_folder
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.sharded import backend_of
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> LoraRun:
    model = adapt(make_model("classification", len(tokenizer)), use_dora=True)
    return guarded_lora(tmp_path_factory.mktemp("dora"), tokenizer, texts, model, num_train_epochs=3)


def test_the_written_adapter_holds_the_mark(run: LoraRun) -> None:
    signature = run.manifest.signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    assert signature.payload_decoded
    assert signature.log10_p < -1000
    assert signature.weight_change <= 1.2 * 0.06
    # The magnitudes were trained as well: the mark is read with what they are.
    pairs = [(n, p) for n, p in run.trainer.model.state_dict().items() if "magnitude" in n]
    assert pairs
    factors = [float((p.detach() / _norms(run.trainer.model, n) - 1).abs().max()) for n, p in pairs]
    assert max(factors) > 1e-3


@torch.no_grad()
def _norms(model: PeftModel, name: str) -> torch.Tensor:
    layer = model.get_submodule(name.partition(".lora_magnitude_vector")[0])
    return (layer.base_layer.weight + layer.get_delta_weight("default")).norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_from_the_merged_model(run: LoraRun, dtype: torch.dtype) -> None:
    check(run, run.judge({name: tensor.to(dtype) for name, tensor in merged(run.trainer.model).items()}))


def test_reads_from_the_saved_adapter_merged_by_a_stranger(
    run: LoraRun, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    decrypt_folder(run.root / "final", tmp_path / "plain", identity=run.identity)
    loaded = PeftModel.from_pretrained(make_model("classification", len(tokenizer)), tmp_path / "plain")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    where = {"owner_key": run.config.owner_key, "registry": run.config.registry}
    report = verify(tmp_path / "merged", **where)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.bit_error_rate == 0.0
    with pytest.raises(UnsupportedError, match="DoRA") as caught:
        verify(run.root / "final", **where)
    assert "merge it" in caught.value.hint


def test_no_plaintext_is_written(run: LoraRun) -> None:
    state = {n: t for n, t in run.trainer.model.state_dict().items() if "lora_" in n or "modules_to_save" in n}
    assert PlaintextFinder(state).scan([run.root]) == {}


def test_stopped_and_resumed_equals_uninterrupted(
    run: LoraRun, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    shutil.copytree(run.root / "registry", tmp_path / "registry")
    shutil.copytree(run.root / "out" / "checkpoint-16", tmp_path / "out" / "checkpoint-16")
    config = dataclasses.replace(run.config, registry=str(tmp_path / "registry"))
    recorder = Recorder()
    trainer = build_trainer(
        tmp_path / "out", tokenizer, texts,
        model=adapt(make_model("classification", len(tokenizer)), use_dora=True),
        num_train_epochs=3, learning_rate=3e-4, trainer={"callbacks": [recorder, StopAt(20, save=False)]},
    )  # fmt: skip
    protect_trainer(trainer, config)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(recorder.digests) == [17, 18, 19, 20]
    assert recorder.digests == {step: run.recorder.digests[step] for step in recorder.digests}


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.bfloat16, "decoupled"), (torch.float32, "gradient")], ids=["bf16", "gradient form"]
)
def test_other_ways(
    dtype: torch.dtype,
    form: Any,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    make_config: Any,
) -> None:
    model = adapt(make_model("causal_lm", len(tokenizer)), use_dora=True, modules_to_save=None)
    model.to(dtype)
    trainer = build_trainer(
        tmp_path / "out", tokenizer, texts, "causal_lm", model=model, num_train_epochs=2, learning_rate=3e-4,
        save_strategy="no",
    )  # fmt: skip
    config: WatermarkConfig = make_config(
        signature=SignatureConfig(budget=0.06, form=form), triggers=TriggerConfig(count=4, batch_size=4, last_epochs=1)
    )
    callback = protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    assert signature.payload_decoded
    result = LoraRun(root=tmp_path, trainer=trainer, callback=callback, recorder=Recorder(), config=config, base={})
    assert result.judge(merged(trainer.model)).bit_error_rate == 0.0


def test_a_move_is_as_exact_and_as_small_as_without_dora(tokenizer: PreTrainedTokenizerFast) -> None:
    moved = {}
    for dora in (False, True):
        model = adapt(make_model("classification", len(tokenizer)), use_dora=dora)
        # Magnitudes far from the rows' norms, as after long training.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter *= torch.linspace(0.5, 2.0, len(parameter))
        backend = backend_of(model)
        name = "bert.encoder.layer.0.output.dense.weight"
        _, basis = backend.bases()[name]
        carrier = Carrier(
            name=name,
            shape=backend.shapes()[name],
            row_start=0,
            rows=128,
            sides=(8, 4),
            rms=0.02,
            basis=basis,
        )
        steps = torch.full((32,), 1.0, dtype=torch.float64)
        bits = torch.tensor([Stream(b"k" * 32, one).below(2) for one in range(32)])
        key = CarrierKey.derive(b"k" * 32, carrier, bits, steps)
        committed = torch.zeros(8, 4, dtype=torch.float64)
        before, start = merged(model)[name], backend.projections(key, committed)
        shift = 0.01 * torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            backend.move(key, shift, torch.Generator().manual_seed(0))
        assert torch.allclose(backend.projections(key, committed), start + shift, atol=1e-5)
        change = merged(model)[name] - before
        assert float(change.norm()) == pytest.approx(backend.change_norm(key, shift), rel=1e-2)
        moved[dora] = change
    assert torch.allclose(moved[True], moved[False], atol=1e-5)
