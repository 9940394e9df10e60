"""What goes wrong in training: refused before the first step, or at the save, and each time it says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from key_servers import Transit, serving
from loops import Loop, weights_of
from test_interrupted_saves import largest_file
from tiny import StopAt, digest_weights, make_model, make_rows
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from hf_wmguard import (
    Guard,
    ProtectionConfig,
    SignatureConfig,
    TriggerConfig,
    WatermarkCallback,
    WatermarkConfig,
    protect_trainer,
)
from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    EnvironmentFault,
    ManifestError,
    NonFiniteWeightError,
    UnsupportedError,
    UsageError,
)
from hf_wmguard.evidence.manifest import check_files, read_manifest
from hf_wmguard.suspects.plaintext import PlaintextFinder

MakeConfig = Callable[..., WatermarkConfig]
MakeTrainer = Callable[..., Trainer]
MakeLoop = Callable[..., Loop]
SIGNATURE = SignatureConfig(budget=0.06, last_epochs=1)


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def config(make_config: MakeConfig) -> WatermarkConfig:
    """A signature alone, in the last epoch."""
    return make_config(signature=SIGNATURE, triggers=None)


@pytest.fixture
def make_loop(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> MakeLoop:
    """A loop of one's own on a tiny classifier."""

    def make(**changes: Any) -> Loop:
        model, rows = make_model("classification", len(tokenizer)), make_rows("classification", tokenizer, texts)
        return Loop(model, tokenizer, rows, **{"epochs": 2, "accelerated": False, **changes})

    return make


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one_to_resume_from(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop, folder = make_loop(), tmp_path / "checkpoint"
    guard = loop.protect(config)
    loop.run(until=2)
    guard.save(folder, resumable=True)
    at_two = digest_weights(loop.model)
    loop.run(until=4)
    # The weights fit, the optimizer's two moments of each do not.
    size_bytes = (folder / "model.safetensors").stat().st_size + 64 * 1024
    with largest_file(size_bytes), pytest.raises(EnvironmentFault, match="cannot write"):
        guard.save(folder, resumable=True)
    again = make_loop()
    assert again.protect(config).resume(folder) == 2
    assert digest_weights(again.model) == at_two
    check_files(folder, read_manifest(folder)[0])
    assert PlaintextFinder(weights_of(loop.model) | weights_of(again.model)).scan([tmp_path]) == {}


def test_a_key_service_that_fails_at_a_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_loop: MakeLoop, make_config: MakeConfig
) -> None:
    folder, server = tmp_path / "model", Transit()
    with serving(server) as port:
        monkeypatch.setenv("VAULT_ADDR", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("VAULT_TOKEN", server.token)
        protection = ProtectionConfig(recipients=("vault:transit/models",))
        loop = make_loop()
        guard = loop.protect(make_config(signature=SIGNATURE, triggers=None, protection=protection))
        guard.save(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        loop.run(until=1)
        server.mood = "denied"
        with pytest.raises(AuthenticationError) as caught:
            guard.save(folder)
    assert caught.value.hint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_is_no_folder_is_named(
    place: str, tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    guard = make_loop().protect(config)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="file") as caught:
        guard.save(tmp_path / place)
    assert "permissions" in caught.value.hint


def test_a_run_that_cannot_be_finished_is_not_taken_for_marked(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop()
    guard = loop.protect(config)
    loop.run(until=2)
    before = weights_of(loop.model)
    loop.model.bert.encoder.layer[0].output.dense.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteWeightError):
        guard.finish()
    assert guard.mark.state == "pending"
    loop.model.load_state_dict(before)
    guard.finish()
    manifest = guard.save(tmp_path / "final")
    assert manifest.state == "complete"
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0


def test_a_state_that_could_not_be_loaded_leaves_the_optimizer_as_it_was(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop(accelerated=True)
    loop.protect(config)
    loop.run(until=2)
    assert loop.accelerator is not None
    loop.accelerator.save_state(str(tmp_path / "state"))
    (tmp_path / "state" / "optimizer.bin").unlink()
    with pytest.raises(FileNotFoundError):
        loop.accelerator.load_state(str(tmp_path / "state"))
    # One of the loop's own, in memory: no checkpoint is expected any more.
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())


def test_arguments_of_a_save_may_come_without_their_names(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop()
    loop.protect(config)
    loop.model.save_pretrained(tmp_path / "elsewhere", False)
    assert not (tmp_path / "elsewhere").exists()
    loop.model.save_pretrained(tmp_path / "here", True, loop.model.state_dict())
    check_files(tmp_path / "here", read_manifest(tmp_path / "here")[0])


def test_no_optimizer_is_no_loop(make_loop: MakeLoop, config: WatermarkConfig) -> None:
    with pytest.raises(UsageError, match="optimizer") as caught:
        Guard(config, make_loop().model, None, max_steps=2)
    assert caught.value.hint


@pytest.mark.parametrize(
    "settings", [{"max_steps": "10"}, {"max_steps": 2.5}, {"steps_per_epoch": 0}, {"steps_per_epoch": -1}]
)
def test_lengths_that_make_no_sense(settings: dict[str, Any], make_loop: MakeLoop, config: WatermarkConfig) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))) as caught:
        make_loop(guarding=settings).protect(config)
    assert caught.value.hint


def test_a_trainer_does_not_go_on_from_another_runs_checkpoint(
    tmp_path: Path, make_trainer: MakeTrainer, config: WatermarkConfig
) -> None:
    first = make_trainer(num_train_epochs=2, output_dir=tmp_path / "first")
    protect_trainer(first, config)
    first.train()
    other = make_trainer(
        num_train_epochs=2, output_dir=tmp_path / "other", trainer={"callbacks": [StopAt(12, save=True)]}
    )
    protect_trainer(other, config)
    other.train()
    with pytest.raises(ConfigError, match="another run") as caught:
        first.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-12"))
    assert "new process" in caught.value.hint
    # In a Trainer that has not trained yet it is the run that is resumed.
    again = make_trainer(num_train_epochs=2, output_dir=tmp_path / "other", save_strategy="no")
    protect_trainer(again, config)
    again.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-12"))


def test_a_checkpoint_without_the_trainers_state_is_named(
    tmp_path: Path, make_trainer: MakeTrainer, config: WatermarkConfig
) -> None:
    trainer = make_trainer(num_train_epochs=2)
    protect_trainer(trainer, config)
    trainer.train()
    # As after a kill: the Trainer writes it last.
    (tmp_path / "out" / "checkpoint-16" / "trainer_state.json").unlink()
    again = make_trainer(num_train_epochs=2)
    protect_trainer(again, config)
    with pytest.raises(ManifestError, match=r"checkpoint-16 has no trainer_state\.json") as caught:
        again.train(resume_from_checkpoint=True)
    assert "checkpoint before" in caught.value.hint


def test_a_frozen_model_is_refused_with_triggers_alone(make_trainer: MakeTrainer, make_config: MakeConfig) -> None:
    trainer = make_trainer(num_train_epochs=1)
    trainer.model.requires_grad_(False)
    protect_trainer(trainer, make_config(signature=None))
    with pytest.raises(UnsupportedError, match="frozen") as caught:
        trainer.train()
    assert "train some" in caught.value.hint


def test_a_callback_beside_a_guarded_trainer_is_refused(make_trainer: MakeTrainer, config: WatermarkConfig) -> None:
    trainer = make_trainer(num_train_epochs=1, save_strategy="no")
    protect_trainer(trainer, config)
    second = WatermarkCallback(config)
    trainer.add_callback(second)
    with pytest.raises(UsageError, match="two watermark callbacks") as caught:
        trainer.train()
    assert "no callback beside" in caught.value.hint
    trainer.remove_callback(second)
    trainer.train()


@pytest.mark.parametrize("name", ["save_state", "save_model"])
def test_what_accelerate_would_write_is_refused(
    name: str, tmp_path: Path, make_trainer: MakeTrainer, config: WatermarkConfig
) -> None:
    class Saving(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with pytest.raises(UnsupportedError, match="plaintext"):
                getattr(trainer.accelerator, name)(str(tmp_path / "state"))

    trainer = make_trainer(max_steps=2, save_strategy="no", trainer={"callbacks": [Saving()]})
    protect_trainer(trainer, config)
    trainer.train()
    assert not (tmp_path / "state").exists()


def test_a_compiled_model_is_compiled_by_the_trainer(
    make_trainer: MakeTrainer, config: WatermarkConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = torch.compile(make_model("classification", len(tokenizer)), backend="eager")
    with pytest.raises(UnsupportedError, match="OptimizedModule") as caught:
        protect_trainer(make_trainer(model=model), config)
    assert "torch_compile=True" in caught.value.hint


class _ScheduleFree(torch.optim.AdamW):
    """Named as those of the package are, which need not be installed."""


_ScheduleFree.__name__ = "AdamWScheduleFree"


def test_a_schedule_free_optimizer_is_refused_that_the_trainer_was_handed(
    make_trainer: MakeTrainer, config: WatermarkConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("classification", len(tokenizer))
    optimizer = _ScheduleFree(model.parameters(), lr=1e-3)
    trainer = make_trainer(model=model, trainer={"optimizers": (optimizer, None)}, save_strategy="no")
    protect_trainer(trainer, config)
    with pytest.raises(UnsupportedError, match="schedule-free") as caught:
        trainer.train()
    assert caught.value.hint


class _Stream(IterableDataset[dict[str, Any]]):
    """Rows one after the other; torch gives it a ``__getitem__`` all the same, which raises."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@pytest.mark.parametrize("settings", [{"replay": 2}, {"source": "dataset"}])
def test_rows_of_data_that_only_streams_are_not_asked_for(
    settings: dict[str, Any],
    make_trainer: MakeTrainer,
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
) -> None:
    stream = _Stream(make_rows("classification", tokenizer, texts))
    trainer = make_trainer(max_steps=4, trainer={"train_dataset": stream}, save_strategy="no")
    config = make_config(triggers=TriggerConfig(count=8, batch_size=8, **settings))
    protect_trainer(trainer, config)
    with pytest.raises(ConfigError, match=next(iter(settings))) as caught:
        trainer.train()
    assert "set triggers." in caught.value.hint
    assert not Path(config.registry).exists()
