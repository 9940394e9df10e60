"""Guarded Trainer runs of every kind of model beside the two that other tests train: set learned, saved, detected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import image_classifier, image_processor, t5, token_classifier
from tiny import LABELS, ROWS
from transformers import PreTrainedTokenizerFast, Trainer, default_data_collator

from hf_wmguard import load_protected, probe, protect_trainer
from hf_wmguard.config import TriggerConfig, WatermarkConfig
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.watermark.images import trigger_image
from hf_wmguard.watermark.prf import Stream

KINDS = ("token_classification", "image_classification", "seq2seq")


def _setting(kind: str, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return a model, its processor, and training rows whose labels are arbitrary but always the same."""
    stream = Stream(b"l" * 32, kind)
    if kind == "image_classification":
        images = [trigger_image(stream.bytes(16).hex(), size=32).numpy() for _ in range(ROWS)]
        pixels = image_processor()(images, return_tensors="pt")["pixel_values"]
        return (
            image_classifier(),
            image_processor(),
            [{"pixel_values": row, "labels": stream.below(LABELS)} for row in pixels],
        )
    encoded = tokenizer(texts, padding="max_length", max_length=32, truncation=True)
    rows = [{name: encoded[name][row] for name in ("input_ids", "attention_mask")} for row in range(ROWS)]
    if kind == "token_classification":
        labels = [[stream.below(LABELS) if one else -100 for one in row["attention_mask"]] for row in rows]
        model = token_classifier(len(tokenizer))
    else:
        labels = [[one if one else -100 for one in row["input_ids"]][:8] for row in rows]
        model = t5(len(tokenizer))
    return model, tokenizer, [row | {"labels": label} for row, label in zip(rows, labels, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_run_learns_the_set_and_is_detected(
    kind: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    make_trainer: Callable[..., Trainer],
    make_config: Callable[..., WatermarkConfig],
    identity_file: Path,
) -> None:
    model, processor, rows = _setting(kind, tokenizer, texts)
    config = make_config(
        signature=None,
        triggers=TriggerConfig(
            count=16,
            batch_size=16,
            every_n_steps=1,
            start=0.0,
            cooldown=0.0,
            strength=1.0,
            weight=1.0,
            moves=2,
            contexts=0.25,
        ),
    )
    trainer = make_trainer(
        model=model,
        trainer={"train_dataset": rows, "processing_class": processor, "data_collator": default_data_collator},
        num_train_epochs=12,
        learning_rate=3e-4,
        save_strategy="no",
    )
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))

    logged = [entry for entry in trainer.state.log_history if "wmguard/trigger_loss" in entry]
    assert logged[-1]["wmguard/trigger_loss"] < logged[0]["wmguard/trigger_loss"]
    assert logged[-1]["wmguard/trigger_match_rate"] > 0.7
    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.triggers is not None
    assert manifest.triggers.match_rate > 0.85
    loaded = load_protected(tmp_path / "final", identity=f"file:{identity_file}", auto_class=type(model))
    where = {"owner_key": config.owner_key, "registry": config.registry}
    report = probe(loaded, processor, **where)
    assert report.verdict == "detected"
    assert report.triggers is not None
    assert report.triggers.asked == 16
    assert report.triggers.matches == 16 * manifest.triggers.match_rate
    torch.manual_seed(99)
    other = type(model)(model.config)
    assert probe(other, processor, **where).verdict != "detected"
