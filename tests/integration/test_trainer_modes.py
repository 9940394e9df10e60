"""More of what a Trainer can be told: fp16 and skipped steps, compiled models, strategies, models made anew."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import t5
from scaling import Overflow, scaled
from tiny import Recorder, build_trainer, digest_weights, largest_file, make_keys, make_model, make_rows
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from hf_wmguard import protect_trainer, verify
from hf_wmguard.config import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.errors import EnvironmentFault, UnsupportedError
from hf_wmguard.evidence.manifest import SignatureSummary, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.plaintext import PlaintextFinder

Make = Callable[..., Any]
SIGNATURE = SignatureConfig(budget=0.06, last_epochs=1.0)
TRIGGERS = TriggerConfig(count=4, batch_size=4, last_epochs=1, every_n_steps=2)


def _exact(folder: Path) -> SignatureSummary:
    manifest, _ = read_manifest(folder)
    assert manifest.state == "complete"
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert manifest.signature.payload_decoded
    return manifest.signature


@pytest.mark.parametrize(
    ("form", "optimizer"),
    [("decoupled", "adamw_torch"), ("gradient", "adamw_torch"), ("decoupled", "adamw_torch_fused")],
)
def test_fp16_scales_and_skips(
    form: str, optimizer: str, tmp_path: Path, make_trainer: Make, make_config: Make
) -> None:
    # A step before the mark, one in the ramp, and the one that would end it.
    overflow, recorder = Overflow(3, 11, 14), Recorder()
    trainer = scaled(
        make_trainer(
            num_train_epochs=2, logging_steps=1, trainer={"callbacks": [overflow, recorder]}, optim=optimizer,
            save_strategy="steps", save_steps=2,
        ),
        init_scale=2.0**10,
    )  # fmt: skip
    config = make_config(
        signature=SignatureConfig(budget=0.06, last_epochs=1.0, form=form, strength=0.5),
        triggers=TriggerConfig(
            count=8, batch_size=8, last_epochs=1, every_n_steps=1, form=form, moves=4, strength=1.0, weight=20.0
        ),
    )
    protect_trainer(trainer, config)
    trainer.train()
    assert recorder.digests[3] == recorder.digests[2]
    assert trainer.accelerator.scaler.get_scale() == 2.0**7
    # A fused optimizer skips inside its step, which accelerate does not notice; the mark goes on by itself.
    noticed = optimizer == "adamw_torch"
    assert overflow.skipped == ([3, 11, 14] if noticed else [])
    assert (recorder.digests[11] == recorder.digests[10]) == noticed
    logged = [entry["wmguard/trigger_loss"] for entry in trainer.state.log_history if "wmguard/trigger_loss" in entry]
    assert logged[-1] < logged[0]
    trainer.save_model(str(tmp_path / "final"))
    _exact(tmp_path / "final")
    if form == "decoupled":
        # The end of the ramp does not wait: what says that it is complete is.
        _exact(tmp_path / "out" / "checkpoint-14")
    report = verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry)
    assert report.verdict == "detected"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16=True needs a GPU")
def test_fp16_on_a_gpu(tmp_path: Path, make_trainer: Make, make_config: Make) -> None:
    trainer = make_trainer(num_train_epochs=2, save_strategy="no", use_cpu=False, fp16=True)
    protect_trainer(trainer, make_config(signature=SIGNATURE, triggers=TRIGGERS))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    _exact(tmp_path / "final")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model(tmp_path: Path, make_trainer: Make, make_config: Make) -> None:
    trainer = make_trainer(num_train_epochs=2, save_strategy="epoch", torch_compile=True, torch_compile_backend="eager")
    protect_trainer(trainer, make_config(signature=SIGNATURE, triggers=TRIGGERS))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    _exact(tmp_path / "final")
    assert PlaintextFinder(dict(trainer.model.state_dict())).scan([tmp_path]) == {}


@pytest.mark.parametrize(
    "strategies",
    [
        {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 4},
        {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
        {"save_strategy": "steps", "save_steps": 8, "save_only_model": True, "eval_on_start": True},
        {"save_strategy": "epoch", "save_total_limit": 1, "eval_strategy": "epoch", "load_best_model_at_end": True},
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_strategies(
    strategies: dict[str, Any],
    tmp_path: Path,
    make_trainer: Make,
    make_config: Make,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
) -> None:
    recorder = Recorder()
    rows = make_rows("classification", tokenizer, texts[:8])
    trainer = make_trainer(num_train_epochs=2, trainer={"eval_dataset": rows, "callbacks": [recorder]}, **strategies)
    config = make_config(signature=SIGNATURE, triggers=None)
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    _exact(tmp_path / "final")
    left = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert left
    assert len(left) <= strategies.get("save_total_limit", 100)
    for folder in left:
        step = int(folder.name.rpartition("-")[2])
        # Rows 3 of 4 of the marked epoch bring the mark in.
        expected = "pending" if step <= 8 else "ramping" if step < 14 else "complete"
        assert read_manifest(folder)[0].state == expected
    saved = {f"{step}/{name}": t for step, one in recorder.saved.items() for name, t in one.items()}
    assert PlaintextFinder(saved | dict(trainer.model.state_dict())).scan([tmp_path]) == {}
    assert verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry).verdict == "detected"


def test_early_stopping_before_the_mark_starts(
    tmp_path: Path,
    make_trainer: Make,
    make_config: Make,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = iter((0.9, 0.8, 0.7, 0.6))
    trainer = make_trainer(
        num_train_epochs=6, eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="score",
        trainer={
            "eval_dataset": make_rows("classification", tokenizer, texts[:8]),
            "compute_metrics": lambda prediction: {"score": next(scores)},
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)],
        },
    )  # fmt: skip
    protect_trainer(trainer, make_config(signature=SIGNATURE, triggers=None))
    trainer.train()
    assert trainer.state.global_step == 16
    assert "training ended before the ramp did" in caplog.text
    trainer.save_model(str(tmp_path / "final"))
    assert read_manifest(tmp_path / "final")[0].step == 16
    assert _exact(tmp_path / "final").weight_change < 1.2 * 0.06


def test_a_model_that_is_made_anew_is_guarded_and_committed_anew(
    tmp_path: Path, make_trainer: Make, make_config: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As a hyperparameter search does: every trial trains a model of its own."""
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(make_model("classification", len(tokenizer)))
        return made[-1]

    trainer = make_trainer(num_train_epochs=1, save_strategy="epoch", trainer={"model": None, "model_init": model_init})
    config = make_config(signature=SIGNATURE, triggers=TRIGGERS)
    protect_trainer(trainer, config)
    commitments = []
    for trial in ("a", "b"):
        trainer.train()
        trainer.save_model(str(tmp_path / trial))
        _exact(tmp_path / trial)
        commitments.append(read_manifest(tmp_path / trial)[0].commitment)
        report = verify(tmp_path / trial, owner_key=config.owner_key, registry=config.registry)
        assert report.verdict == "detected"
        assert report.commitment["entry"] == commitments[-1]
        assert PlaintextFinder(dict(trainer.model.state_dict())).scan([tmp_path]) == {}
    assert trainer.model is made[2]
    assert commitments[0] != commitments[1]
    assert len(Registry(Path(config.registry), OwnerKey.load(config.owner_key)).commitments()) == 2
    # In place of the model that is gone: its checkpoint goes on under its own commitment.
    shutil.copytree(tmp_path / "a", tmp_path / "again")
    assert read_manifest(tmp_path / "again")[0].commitment == commitments[0]


def test_seq2seq_trainer(
    tmp_path: Path, make_config: Make, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    encoded = tokenizer(texts, padding="max_length", max_length=32, truncation=True)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": [one if one else -100 for one in ids][:8]}
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    trainer = Seq2SeqTrainer(
        model=t5(len(tokenizer)),
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=8, eval_strategy="epoch",
            predict_with_generate=True, generation_max_length=8, save_strategy="no", use_cpu=True, report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        eval_dataset=rows[:8],
        processing_class=tokenizer,
    )  # fmt: skip
    config = make_config(signature=SIGNATURE, triggers=TRIGGERS)
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    _exact(tmp_path / "final")
    assert verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry).verdict == "detected"


def test_two_guarded_trainers_in_one_process(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    """Both are made before either trains, one trains inside the other's run: each keeps to its own key and folder."""
    configs, trainers = {}, {}
    for name in ("a", "b"):
        make_keys(tmp_path / name)
        configs[name] = WatermarkConfig(
            model_id=f"acme/{name}",
            owner_key=f"file:{tmp_path / name / 'owner.key'}",
            registry=str(tmp_path / f"registry-{name}"),
            signature=SIGNATURE,
            triggers=None,
            protection=ProtectionConfig(recipients=(f"file:{tmp_path / name / 'inference.key.pub'}",)),
        )
        trainers[name] = build_trainer(tmp_path / f"out-{name}", tokenizer, texts, num_train_epochs=2)
        protect_trainer(trainers[name], configs[name])

    class Inside(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 12:
                trainers["b"].train()

    trainers["a"].add_callback(Inside())
    trainers["a"].train()
    for name, other in (("a", "b"), ("b", "a")):
        trainers[name].save_model(str(tmp_path / f"final-{name}"))
        _exact(tmp_path / f"final-{name}")
        own = {"owner_key": configs[name].owner_key, "registry": configs[name].registry}
        assert verify(tmp_path / f"final-{name}", **own).verdict == "detected"
        weights = tmp_path / f"{name}.safetensors"
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in trainers[name].model.state_dict().items()}, weights)
        foreign = {"owner_key": configs[other].owner_key, "registry": configs[other].registry}
        assert verify(weights, **foreign).verdict == "not_detected"
        assert verify(weights, **own).verdict == "detected"


class _Swap(TrainerCallback):
    """Puts another model into the Trainer."""

    def __init__(self, event: str) -> None:
        self._event = event
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 5:
            self.trainer.model = type(self.trainer.model)(self.trainer.model.config)
            if self._event == "everywhere":
                self.trainer.callback_handler.model = self.trainer.model


@pytest.mark.parametrize("where", ["the trainer", "everywhere"])
@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_another_callback_that_swaps_the_model(
    where: str, strategy: str, tmp_path: Path, make_trainer: Make, make_config: Make
) -> None:
    swap = _Swap(where)
    trainer = make_trainer(num_train_epochs=2, save_strategy=strategy, trainer={"callbacks": [swap]})
    swap.trainer = trainer
    protect_trainer(trainer, make_config(signature=SIGNATURE, triggers=None))
    with pytest.raises(UnsupportedError, match="was replaced during training") as caught:  # noqa: PT012
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    assert "load_state_dict" in caught.value.hint
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert list(tmp_path.rglob("pytorch_model.bin")) == []


def test_last_epochs_longer_than_the_run(
    tmp_path: Path, make_trainer: Make, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="hf_wmguard")
    trainer = make_trainer(num_train_epochs=1, save_strategy="no", logging_steps=1)
    signature = SignatureConfig(budget=0.06, last_epochs=3.0)
    protect_trainer(trainer, make_config(signature=signature, triggers=None))
    trainer.train()
    assert "signature.last_epochs is 3, longer than this run of 8 steps" in caplog.text
    marked = [entry["step"] for entry in trainer.state.log_history if "wmguard/log10_p" in entry]
    assert marked == list(range(1, 9))
    trainer.save_model(str(tmp_path / "final"))
    _exact(tmp_path / "final")
    assert digest_weights(trainer.model)


@pytest.mark.parametrize("size_bytes", [64, 200_000], ids=["the config does not fit", "the weights do not fit"])
def test_a_full_disk_at_a_save(size_bytes: int, tmp_path: Path, make_trainer: Make, make_config: Make) -> None:
    trainer = make_trainer(num_train_epochs=1, save_strategy="no")
    config = make_config(signature=SIGNATURE, triggers=None)
    callback = protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    old = {path: path.read_bytes() for path in (tmp_path / "final").rglob("*")}
    trainer.train()
    with largest_file(size_bytes), pytest.raises(EnvironmentFault, match="too large") as caught:
        trainer.model.save_pretrained(tmp_path / "final")
    assert "free space" in caught.value.hint
    assert caught.value.exit_code == 4
    assert not callback.mark.saved
    assert {path: path.read_bytes() for path in (tmp_path / "final").rglob("*")} == old
    _exact(tmp_path / "final")
    report = verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry)
    assert report.verdict == "detected"
    trainer.save_model(str(tmp_path / "final"))
    assert callback.mark.saved
