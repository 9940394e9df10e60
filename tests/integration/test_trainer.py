"""The whole path with a real Trainer: train, save, verify, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from hf_wmguard import load_protected, probe, protect_trainer, verify
from hf_wmguard.config import WatermarkConfig
from hf_wmguard.evidence.manifest import read_manifest

AUTO = {"classification": AutoModelForSequenceClassification, "causal_lm": AutoModelForCausalLM}


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_from_trainer_to_verdict(
    task: str,
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],
    make_config: Callable[..., WatermarkConfig],
    identity_file: Path,
) -> None:
    trainer, config = make_trainer(task, num_train_epochs=14), make_config()
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(tmp_path / "final")

    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.state == "complete"
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert manifest.signature.payload_decoded
    assert manifest.signature.weight_change <= config.signature.budget * 1.2

    where = {"owner_key": config.owner_key, "registry": config.registry}
    report = verify(tmp_path / "final", **where)
    assert report.verdict == "detected"
    assert report.signature.bit_error_rate == 0.0
    assert report.signature.payload_decoded
    assert report.commitment["entry"] == manifest.commitment
    json.dumps(report.to_json())

    model = load_protected(tmp_path / "final", identity=f"file:{identity_file}", auto_class=AUTO[task])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name

    answered = probe(model, trainer.processing_class, **where)
    assert answered.triggers.matches >= 15
    assert answered.verdict == "detected"
