"""A hyperparameter search of a guarded Trainer: every trial is a marked run of its own, and none leaves plaintext."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from tiny import Recorder, Run, make_model, make_rows
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from hf_wmguard import protect_trainer, verify
from hf_wmguard.config import ProtectionConfig, QualityConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.errors import OwnershipError, QualityError, UnsupportedError
from hf_wmguard.evidence.manifest import check_files, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.optimizer import TRAINER_NAME

Make = Callable[..., Any]
SIGNATURE = SignatureConfig(budget=0.06, last_epochs=1.0)
TRIGGERS = TriggerConfig(count=4, batch_size=4, last_epochs=1, every_n_steps=2)
LAST = 8


def _space(trial: optuna.Trial) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)}


def _search(trainer: Trainer, trials: int = 2, **settings: Any) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = {"sampler": optuna.samplers.RandomSampler(seed=3), "direction": "minimize", **settings}
    return trainer.hyperparameter_search(hp_space=_space, backend="optuna", n_trials=trials, **settings)


@pytest.fixture
def make_search(make_trainer: Make, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Make:
    """A guarded Trainer that makes its model anew for every trial: one epoch, evaluated and saved at its end."""

    def make(
        config: WatermarkConfig,
        made: list[Any] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
        **changes: Any,
    ) -> Trainer:
        def model_init() -> nn.Module:
            model = make_model("classification", len(tokenizer))
            if made is not None:
                made.append(weakref.ref(model))
            return model

        settings = {"num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "epoch", **changes}
        rows = make_rows("classification", tokenizer, texts[:8])
        values = {"model": None, "model_init": model_init, "eval_dataset": rows, "callbacks": list(callbacks)}
        trainer = make_trainer(trainer=values, **settings)
        protect_trainer(trainer, config)
        return trainer

    return make


def _where(config: WatermarkConfig) -> dict[str, str]:
    return {"owner_key": config.owner_key, "registry": config.registry}


def _commitments(config: WatermarkConfig) -> list[str]:
    return [entry.hash for entry in Registry(Path(config.registry), OwnerKey.load(config.owner_key)).commitments()]


def _check(folder: Path, config: WatermarkConfig, commitment: str) -> None:
    manifest, _ = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest.state == "complete"
    assert manifest.commitment == commitment
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    report = verify(folder, **_where(config))
    assert report.verdict == "detected"
    assert report.commitment["entry"] == commitment


def test_every_trial_is_a_marked_run_and_so_is_the_best_one_trained_again(
    tmp_path: Path, make_search: Make, make_config: Make
) -> None:
    config, seen = make_config(signature=SIGNATURE, triggers=TRIGGERS), {}

    class Everything(Recorder):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            super().on_save(*args, **kwargs)
            seen.update({f"{len(seen)}/{name}": tensor for name, tensor in self.saved[LAST].items()})

    made: list[Any] = []
    trainer = make_search(config, made, callbacks=(Everything(),))
    best = _search(trainer)
    commitments = _commitments(config)
    assert len(set(commitments)) == 2
    for trial, commitment in enumerate(commitments):
        folder = tmp_path / "out" / f"run-{trial}" / f"checkpoint-{LAST}"
        _check(folder, config, commitment)
        assert (folder / "optimizer.wmguard").is_file()
    assert len(seen) > 0

    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    _check(tmp_path / "final", config, _commitments(config)[2])
    seen.update({f"final/{name}": tensor for name, tensor in trainer.model.state_dict().items()})
    assert PlaintextFinder(seen).scan([tmp_path]) == {}
    # One was made by the Trainer itself; the trials' own are not kept.
    assert len(made) == 4
    gc.collect()
    assert [one() is None for one in made] == [True, True, True, False]


def test_a_trial_that_is_cut_short_or_gets_worse_leaves_the_others_as_they_are(
    tmp_path: Path, make_search: Make, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer._trial.number == 0 and state.global_step == LAST:
                kwargs["model"].classifier.weight.data *= 64.0

    class Second(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 1

    config = make_config(signature=SIGNATURE, triggers=None, quality=QualityConfig(tolerance=0.5))
    trainer = make_search(config, callbacks=(Spoil(),), eval_strategy="steps", eval_steps=4)
    storage = optuna.storages.InMemoryStorage()
    _search(trainer, 3, pruner=Second(), catch=(QualityError,), storage=storage)
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "PRUNED", "COMPLETE"]
    assert not (tmp_path / "out" / "run-1").exists()
    commitments = _commitments(config)
    assert len(set(commitments)) == 3
    _check(tmp_path / "out" / "run-2" / f"checkpoint-{LAST}", config, commitments[2])


def test_what_cannot_be_searched_is_refused_before_the_first_step(
    tmp_path: Path, make_search: Make, make_config: Make, identity_file: Path, guarded: Run
) -> None:
    recipients = (f"file:{identity_file}.pub",)
    protection = ProtectionConfig(recipients=recipients, destination=str(tmp_path / "delivered"))
    config = make_config(signature=SIGNATURE, triggers=None, protection=protection)
    with pytest.raises(UnsupportedError, match="each trial would take the place"):
        _search(make_search(config))
    shutil.copytree(guarded.final, tmp_path / "out" / "run-0" / f"checkpoint-{LAST}")
    config = make_config(signature=SIGNATURE, triggers=None)
    with pytest.raises(OwnershipError, match="run-0"):
        _search(make_search(config))
    assert not Path(config.registry).exists()


def test_a_state_that_goes_past_the_guard_is_deleted_in_a_trials_folder_too(
    tmp_path: Path, make_search: Make, make_config: Make
) -> None:
    trainer = make_search(make_config(signature=SIGNATURE, triggers=None))

    def save_plainly(output_dir: str) -> None:
        torch.save(torch.optim.AdamW.state_dict(trainer.optimizer.optimizer), Path(output_dir) / TRAINER_NAME)

    trainer._save_optimizer_and_scheduler = save_plainly
    with pytest.raises(UnsupportedError, match=r"run-0.* was deleted"):
        _search(trainer, 1)
    assert list(tmp_path.rglob(TRAINER_NAME)) == []
