"""Ways to break a promise that a reviewer found, each closed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Run
from torch import nn
from transformers import BertForSequenceClassification, Trainer

from hf_wmguard import WatermarkConfig, load_protected, probe, protect_trainer, verify
from hf_wmguard.errors import (
    ConfigError,
    FormatError,
    NonFiniteWeightError,
    OwnershipError,
    RegistryError,
    UnsupportedError,
    UsageError,
)
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker
from hf_wmguard.protect import Committed, commit, new_record, new_salt
from hf_wmguard.suspects.reader import open_suspect, tile_reader
from hf_wmguard.training.backends import WholeParameters
from hf_wmguard.watermark.answers import Prompt
from hf_wmguard.watermark.candidates import keyed_candidates, label_candidates
from hf_wmguard.watermark.record import WatermarkRecord, trigger_key
from hf_wmguard.watermark.signature import read_signature
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses, derive_texts

NAMES = {"model_id": "acme/forged", "iteration": "1"}


def _where(config: WatermarkConfig) -> dict[str, str]:
    return {"owner_key": config.owner_key, "registry": config.registry}


def _triggers(key: bytes, task: str = "classification") -> TriggerSet:
    texts = derive_texts(key, count=16, style="natural", task=task)
    candidates = keyed_candidates(key, 16, width=8) if task == "causal_lm" else label_candidates(16, num_labels=8)
    responses = derive_responses(key, texts, candidates)
    return TriggerSet(task=task, style="natural", texts=texts, candidates=candidates, responses=responses)


def test_a_payload_read_off_a_victim_is_no_commitment(plain: Run, make_config: Callable[..., WatermarkConfig]) -> None:
    config = make_config()
    owner = OwnerKey.load(config.owner_key)
    victim = plain.trainer.model
    weights = WholeParameters(victim)
    honest = new_record(
        owner,
        replace(config, **NAMES),
        salt=new_salt(),
        shapes=weights.shapes(),
        read=weights.read,
    )
    with open_suspect(victim) as suspect:
        reading = read_signature(honest.carrier_keys(owner), tile_reader(suspect))
    forged = replace(honest, payload=honest.decode_payload(owner, reading.soft))
    commit(forged, Path(config.registry), owner)
    with pytest.raises(FormatError, match="payload that its key does not derive"):
        verify(victim, **_where(config))


def test_responses_read_off_a_victim_are_no_commitment(plain: Run, make_config: Callable[..., WatermarkConfig]) -> None:
    config = make_config()
    owner, salt = OwnerKey.load(config.owner_key), new_salt()
    honest = _triggers(trigger_key(owner, **NAMES, salt=salt))
    asker = LocalAsker(plain.trainer.model, plain.trainer.processing_class)
    answers = asker.ask([Prompt(text=text) for text in honest.texts], Sampling())
    stolen = tuple(answer.label for answer in answers)
    forged = WatermarkRecord.create(owner, **NAMES, salt=salt, triggers=replace(honest, responses=stolen))
    commit(forged, Path(config.registry), owner)
    with pytest.raises(FormatError, match="responses that its key does not derive"):
        probe(plain.trainer.model, plain.trainer.processing_class, **_where(config))


def test_trigger_sets_of_another_task_are_passed_over(plain: Run, make_config: Callable[..., WatermarkConfig]) -> None:
    config = make_config()
    owner, salt = OwnerKey.load(config.owner_key), new_salt()
    other = _triggers(trigger_key(owner, **NAMES, salt=salt), task="causal_lm")
    record = WatermarkRecord.create(owner, **NAMES, salt=salt, triggers=other)
    commit(record, Path(config.registry), owner)
    with pytest.raises(RegistryError, match="no trigger set for classification"):
        probe(plain.trainer.model, plain.trainer.processing_class, **_where(config))


@pytest.mark.parametrize("alpha", [0.0, 1.0, float("nan"), float("-inf")])
def test_a_level_that_means_nothing_is_refused(guarded: Run, alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha_log10"):
        verify(guarded.final, **guarded.where, alpha_log10=alpha)


def test_a_save_that_fails_leaves_shards_and_config_of_the_old_one(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = guarded.trainer.model
    model.save_pretrained(folder, max_shard_size="100KB")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    label, bias = model.config.id2label[0], model.classifier.bias[0].item()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    model.config.id2label[0] = "renamed"
    try:
        with pytest.raises(NonFiniteWeightError):
            model.save_pretrained(folder)
    finally:
        model.config.id2label[0] = label
        with torch.no_grad():
            model.classifier.bias[0] = bias
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    load_protected(folder, identity=guarded.identity, auto_class=BertForSequenceClassification)


def test_a_strangers_checkpoint_is_noticed_before_training(
    guarded: Run, tmp_path: Path, make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig]
) -> None:
    shutil.copytree(guarded.out / "checkpoint-40", tmp_path / "out" / "checkpoint-8")
    trainer, config = make_trainer(num_train_epochs=1), make_config()
    protect_trainer(trainer, config)
    with pytest.raises(OwnershipError):
        trainer.train()
    assert not Path(config.registry).exists()


def test_a_trainer_is_guarded_once(
    make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig]
) -> None:
    trainer, config = make_trainer(), make_config()
    protect_trainer(trainer, config)
    with pytest.raises(UsageError, match="already"):
        protect_trainer(trainer, config)


def test_a_part_of_a_guarded_model_is_not_pickled(guarded: Run, tmp_path: Path) -> None:
    part: nn.Module = guarded.trainer.model.bert
    with pytest.raises(UnsupportedError, match="plaintext"):
        torch.save(part, tmp_path / "part.pt")


def test_a_set_that_was_not_learned_is_said_loudly(
    make_trainer: Callable[..., Trainer],
    make_config: Callable[..., WatermarkConfig],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(num_train_epochs=1, save_strategy="no", learning_rate=1e-6)
    protect_trainer(trainer, make_config())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert "triggers match: they were not learned" in caplog.text


def test_weights_out_of_all_proportion_are_not_read(guarded: Run) -> None:
    registry = Registry(Path(guarded.where["registry"]), OwnerKey.load(guarded.where["owner_key"]))
    carriers = Committed.from_entry(registry.commitments()[0]).record.carriers
    huge = {carrier.name: torch.full(carrier.shape, 1e30) for carrier in carriers}
    report = verify(huge, **guarded.where)
    assert report.verdict == "inconclusive"
    assert report.signature.carriers_missing == len(carriers)
