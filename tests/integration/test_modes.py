"""Training modes that are supported: each ends with a mark that reads back from the save without an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Recorder, make_rows
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast, Trainer

from hf_wmguard import load_protected, protect_trainer, verify
from hf_wmguard.config import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.evidence.manifest import read_manifest

MODES: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "num_train_epochs": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "warmup and decay": {"lr_scheduler_type": "linear", "warmup_steps": 4, "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "max steps inside an epoch": {"max_steps": 13},
    "no logging": {"logging_strategy": "no"},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("mode", MODES)
def test_mark_reads_back(
    mode: str,
    task: str,
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],
    make_config: Callable[..., WatermarkConfig],
) -> None:
    config = make_config(
        signature=SignatureConfig(budget=0.06),
        triggers=TriggerConfig(count=4, batch_size=4, last_epochs=1, every_n_steps=4),
    )
    trainer = make_trainer(task, **{"num_train_epochs": 2, "save_strategy": "no", **MODES[mode]})
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.state == "complete"
    assert manifest.step == trainer.state.global_step
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    report = verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry)
    assert report.verdict == "detected"


class _Endless(IterableDataset[dict[str, Any]]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        while True:
            yield from self._rows


def test_data_without_a_length(
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],
    make_config: Callable[..., WatermarkConfig],
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
) -> None:
    recorder = Recorder()
    rows = make_rows("classification", tokenizer, texts)
    trainer = make_trainer(
        max_steps=12, save_steps=6, save_strategy="steps", logging_steps=1,
        trainer={"train_dataset": _Endless(rows), "callbacks": [recorder]},
    )  # fmt: skip
    protect_trainer(trainer, make_config(signature=SignatureConfig(budget=0.06, last_epochs=0.5), triggers=None))
    trainer.train()
    # Half of the steps, because there is no epoch to count by.
    marked = [entry["step"] for entry in trainer.state.log_history if "wmguard/log10_p" in entry]
    assert marked == [7, 8, 9, 10, 11, 12]
    manifest, _ = read_manifest(tmp_path / "out" / "checkpoint-12")
    assert manifest.signature is not None
    assert manifest.signature.payload_decoded


def test_destination_gets_the_finished_model(
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],
    make_config: Callable[..., WatermarkConfig],
    identity_file: Path,
) -> None:
    destination = tmp_path / "delivered"
    protection = ProtectionConfig(recipients=(f"file:{identity_file}.pub",), destination=str(destination))
    trainer = make_trainer(num_train_epochs=1, save_strategy="no")
    callback = protect_trainer(
        trainer, make_config(signature=SignatureConfig(budget=0.06), triggers=None, protection=protection)
    )
    trainer.train()
    assert callback.mark.saved
    assert read_manifest(destination)[0].state == "complete"
    loaded = load_protected(destination, identity=f"file:{identity_file}", auto_class=type(trainer.model))
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert type(trainer.processing_class).from_pretrained(destination).vocab_size == trainer.processing_class.vocab_size


def test_training_twice_keeps_the_commitment_and_marks_again(
    tmp_path: Path, make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig]
) -> None:
    trainer = make_trainer(num_train_epochs=1, save_strategy="no")
    callback = protect_trainer(trainer, make_config(signature=SignatureConfig(budget=0.06), triggers=None))
    commitments = []
    for number in (1, 2):
        trainer.train()
        assert not callback.mark.saved
        trainer.save_model(str(tmp_path / f"final-{number}"))
        manifest, _ = read_manifest(tmp_path / f"final-{number}")
        assert manifest.signature is not None
        assert manifest.signature.bit_error_rate == 0.0
        commitments.append(manifest.commitment)
    assert commitments[0] == commitments[1]
