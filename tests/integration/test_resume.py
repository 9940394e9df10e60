"""A run that was stopped goes on from its encrypted checkpoint as if nothing had happened, or not at all."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EPOCHS, FIRST_SIGNATURE_STEP, STEPS, Recorder, Run, StopAt, digest_weights, make_keys, make_rows
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Trainer

from hf_wmguard import load_protected, protect_trainer, verify
from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.errors import ConfigError, ManifestError, NotFoundError, OwnershipError, RegistryError, WmguardError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey

MakeTrainer = Callable[..., Trainer]


def _config(guarded: Run, folder: Path, **changes: Any) -> WatermarkConfig:
    """The guarded run's config with a copy of its registry."""
    assert guarded.config is not None
    shutil.copytree(guarded.config.registry, folder / "registry")
    return dataclasses.replace(guarded.config, registry=str(folder / "registry"), **changes)


def _last(trainer: Trainer, name: str) -> float:
    return float([entry[name] for entry in trainer.state.log_history if name in entry][-1])


def test_stopped_and_resumed_twice_equals_uninterrupted(
    guarded: Run, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    config = _config(guarded, tmp_path)
    # From before any mark (the first checkpoint) into the ramp, where somebody stops it; then, anew, to the end.
    shutil.copytree(guarded.out / "checkpoint-8", tmp_path / "out" / "checkpoint-8")
    stop = FIRST_SIGNATURE_STEP + 5
    recorders = [Recorder(), Recorder()]
    first = make_trainer(num_train_epochs=EPOCHS, trainer={"callbacks": [recorders[0], StopAt(stop, save=True)]})
    protect_trainer(first, config)
    first.train(resume_from_checkpoint=True)
    assert first.state.global_step == stop
    # Whoever saves a run that was cut short gets the whole mark, embedded at once.
    first.save_model(str(tmp_path / "stopped"))
    cut_short = read_manifest(tmp_path / "stopped")[0]
    assert cut_short.state == "complete"
    assert cut_short.signature is not None
    assert cut_short.signature.bit_error_rate == 0.0
    second = make_trainer(num_train_epochs=EPOCHS, trainer={"callbacks": [recorders[1]]})
    protect_trainer(second, config)
    second.train(resume_from_checkpoint=True)
    second.save_model(str(tmp_path / "final"))

    digests = recorders[0].digests | recorders[1].digests
    assert digests == {step: guarded.recorder.digests[step] for step in range(9, STEPS + 1)}
    assert digest_weights(second.model) == digest_weights(guarded.trainer.model)
    assert _last(second, "wmguard/weight_change") == pytest.approx(
        _last(guarded.trainer, "wmguard/weight_change"), abs=1e-6
    )

    manifests = [read_manifest(folder)[0] for folder in (tmp_path / "out" / f"checkpoint-{stop}", tmp_path / "final")]
    assert [manifest.state for manifest in manifests] == ["ramping", "complete"]
    assert {manifest.commitment for manifest in manifests} == {read_manifest(guarded.final)[0].commitment}
    signature = read_manifest(guarded.final)[0].signature
    assert signature is not None
    assert manifests[1].signature is not None
    assert manifests[1].signature.weight_change == pytest.approx(signature.weight_change, abs=1e-6)
    registry = Registry(Path(config.registry), OwnerKey.load(config.owner_key))
    assert len(registry.commitments()) == 1


def test_hidden_names_in_every_save(guarded: Run, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    assert guarded.config is not None
    protection = dataclasses.replace(guarded.config.protection, hide_names=True)
    config = _config(guarded, tmp_path, protection=protection)
    shutil.copytree(guarded.out / "checkpoint-8", tmp_path / "out" / "checkpoint-8")
    stop = FIRST_SIGNATURE_STEP + 5
    first = make_trainer(num_train_epochs=EPOCHS, trainer={"callbacks": [StopAt(stop, save=True)]})
    protect_trainer(first, config)
    first.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    second = make_trainer(num_train_epochs=EPOCHS)
    protect_trainer(second, config)
    second.train(resume_from_checkpoint=True)
    assert digest_weights(second.model) == digest_weights(guarded.trainer.model)
    # An index from a save that hid nothing goes too: it would list what is hidden now.
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors.index.json").write_text("{}")
    second.model.save_pretrained(str(tmp_path / "final"), max_shard_size="200KB")
    folders = [tmp_path / "final", *(tmp_path / "out").glob("checkpoint-*")]
    assert len(list(folders[0].glob("*.safetensors"))) > 1
    names = [name.encode() for name in second.model.state_dict()]
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if path.suffix not in {".pt", ".pth", ".bin"}:
            assert not any(name in path.read_bytes() for name in names), path
    assert not (folders[0] / "model.safetensors.index.json").exists()
    report = verify(folders[0], **guarded.where)
    assert report.verdict == "detected"
    loaded = load_protected(
        folders[0], identity=guarded.identity, auto_class=AutoModelForSequenceClassification
    ).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in second.model.state_dict().items())


def _other_key(guarded: Run, tmp_path: Path) -> WatermarkConfig:
    make_keys(tmp_path / "other")
    return _config(guarded, tmp_path, owner_key=f"file:{tmp_path / 'other' / 'owner.key'}")


def _no_registry(guarded: Run, tmp_path: Path) -> WatermarkConfig:
    return dataclasses.replace(_config(guarded, tmp_path), registry=str(tmp_path / "elsewhere"))


def _another_registry(guarded: Run, tmp_path: Path) -> WatermarkConfig:
    config = _no_registry(guarded, tmp_path)
    Registry(tmp_path / "elsewhere", OwnerKey.load(config.owner_key)).append("commitment", {"model_id": "acme/tiny"})
    return config


REFUSED: dict[str, tuple[Callable[[Run, Path], WatermarkConfig], type[WmguardError]]] = {
    "budget": (lambda run, tmp: _config(run, tmp, signature=SignatureConfig(budget=0.08)), ConfigError),
    "no triggers": (lambda run, tmp: _config(run, tmp, triggers=None), ConfigError),
    "no signature": (lambda run, tmp: _config(run, tmp, signature=None), ConfigError),
    "model id": (lambda run, tmp: _config(run, tmp, model_id="acme/other"), OwnershipError),
    "iteration": (lambda run, tmp: _config(run, tmp, iteration="2"), ConfigError),
    "owner key": (_other_key, ManifestError),
    "missing registry": (_no_registry, NotFoundError),
    "another registry": (_another_registry, RegistryError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_resuming_with_something_else_is_refused(
    what: str, guarded: Run, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    make, error = REFUSED[what]
    config = make(guarded, tmp_path)
    shutil.copytree(guarded.out / "checkpoint-40", tmp_path / "out" / "checkpoint-40")
    trainer = make_trainer(num_train_epochs=EPOCHS)
    protect_trainer(trainer, config)
    log = Path(config.registry) / "log.jsonl"
    before = log.read_bytes() if log.exists() else b""
    recorder = Recorder()
    trainer.add_callback(recorder)
    with pytest.raises(error) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert caught.value.hint
    assert recorder.digests == {}
    assert (log.read_bytes() if log.exists() else b"") == before


def test_a_plaintext_checkpoint_is_refused(guarded: Run, plain: Run, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    shutil.copytree(plain.out / "checkpoint-8", tmp_path / "out" / "checkpoint-8")
    trainer = make_trainer(num_train_epochs=EPOCHS)
    protect_trainer(trainer, _config(guarded, tmp_path))
    with pytest.raises(ManifestError, match="not protected") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "start a new run" in caught.value.hint


def test_an_interrupted_checkpoint_is_named(guarded: Run, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    config = _config(guarded, tmp_path)
    broken = tmp_path / "out" / "checkpoint-40"
    shutil.copytree(guarded.out / "checkpoint-40", broken)
    for name in ("wmguard_manifest.json", "wmguard_manifest.sig.json"):
        (broken / name).unlink()
    trainer = make_trainer(num_train_epochs=EPOCHS)
    protect_trainer(trainer, config)
    with pytest.raises(ManifestError, match="interrupted") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "encrypted checkpoint" in caught.value.hint


def test_load_best_model_at_end_marks_the_best_model(
    tmp_path: Path,
    make_trainer: MakeTrainer,
    make_config: Callable[..., WatermarkConfig],
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
) -> None:
    evaluations = iter((1.0, 0.5, 0.25))
    trainer = make_trainer(
        num_train_epochs=3,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        trainer={
            "callbacks": [recorder := Recorder()],
            "compute_metrics": lambda prediction: {"rank": next(evaluations)},
            "eval_dataset": make_rows("classification", tokenizer, texts[:8]),
        },
    )
    config = make_config(signature=SignatureConfig(budget=0.06, last_epochs=1), triggers=None)
    callback = protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))

    # The best checkpoint is from before the mark: the weights are its, and the mark is put into them at the end.
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-8")
    assert read_manifest(tmp_path / "out" / "checkpoint-8")[0].state == "pending"
    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.state == "complete"
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert manifest.signature.payload_decoded
    report = verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry)
    assert report.verdict == "detected"

    assert callback.mark.committed is not None
    carriers = {carrier.name: carrier for carrier in callback.mark.committed.record.carriers}
    best, final = recorder.saved[8], trainer.model.state_dict()
    assert all(torch.equal(best[name], final[name]) for name in best.keys() - carriers.keys())
    moved = math.sqrt(sum(float((final[name] - best[name]).double().square().sum()) for name in carriers))
    norm = math.sqrt(sum(one.rms**2 * one.shape[0] * one.shape[1] for one in carriers.values()))
    assert manifest.signature.weight_change == pytest.approx(moved / norm, rel=1e-4)
