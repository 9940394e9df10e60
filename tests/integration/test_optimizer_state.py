"""A checkpoint holds the optimizer's state as ciphertext for the owner, and a resumed run reads it back or stops."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EPOCHS, Recorder, Run, excerpts, files_holding
from torch import Tensor
from transformers import Trainer

from hf_wmguard import WatermarkCallback, protect_trainer
from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.files import ProtectedFile, inspect_file
from hf_wmguard.container.recipients import load_identity
from hf_wmguard.errors import AuthenticationError, ManifestError, NotFoundError, UnsupportedError, WmguardError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.loading import decrypt_folder
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.suspects.protected import open_dek

MakeTrainer = Callable[..., Trainer]
MakeConfig = Callable[..., WatermarkConfig]


def moments(trainer: Trainer) -> dict[str, Tensor]:
    """Return all tensors of an optimizer's state."""
    return {
        f"{index}/{name}": value.detach().clone()
        for index, state in enumerate(trainer.optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def test_moments_are_nowhere_in_plaintext(guarded: Run, plain: Run) -> None:
    # Both runs end with a checkpoint, so that what is in memory now is what was written last.
    assert files_holding(guarded.root, excerpts(moments(guarded.trainer))) == []
    found = files_holding(plain.root, excerpts(moments(plain.trainer)))
    assert [path.name for path in found] == ["optimizer.pt"]
    for folder in guarded.out.glob("checkpoint-*"):
        assert (folder / "optimizer.wmguard").stat().st_size > 100_000
        assert (folder / "optimizer.pt").stat().st_size < 2_000
        assert list(torch.load(folder / "optimizer.pt", weights_only=True)) == ["hf-wmguard"]


def test_recipients_cannot_open_it(guarded: Run) -> None:
    folder = guarded.out / "checkpoint-48"
    manifest, _ = read_manifest(folder)
    dek = open_dek(folder, manifest, (load_identity(guarded.identity),))
    with pytest.raises(AuthenticationError):
        ProtectedFile(folder / "optimizer.wmguard", dek=dek)


def _flip(folder: Path, run: Run) -> None:
    data = bytearray((folder / "optimizer.wmguard").read_bytes())
    data[-100] ^= 1
    (folder / "optimizer.wmguard").write_bytes(data)


def _older(folder: Path, run: Run) -> None:
    shutil.copy(run.out / "checkpoint-8" / "optimizer.wmguard", folder)


def _plaintext(folder: Path, run: Run) -> None:
    torch.save(run.trainer.optimizer.state_dict(), folder / "optimizer.pt")


def _missing(folder: Path, run: Run) -> None:
    (folder / "optimizer.wmguard").unlink()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_flip, AuthenticationError),
        (_older, WmguardError),
        (_plaintext, ManifestError),
        (_missing, NotFoundError),
    ],
)
def test_another_state_is_refused(
    spoil: Callable[[Path, Run], None],
    error: type[WmguardError],
    guarded: Run,
    tmp_path: Path,
    make_trainer: MakeTrainer,
) -> None:
    assert guarded.config is not None
    shutil.copytree(guarded.config.registry, tmp_path / "registry")
    folder = tmp_path / "out" / "checkpoint-40"
    shutil.copytree(guarded.out / "checkpoint-40", folder)
    spoil(folder, guarded)
    recorder = Recorder()
    trainer = make_trainer(num_train_epochs=EPOCHS, trainer={"callbacks": [recorder]})
    protect_trainer(trainer, dataclasses.replace(guarded.config, registry=str(tmp_path / "registry")))
    with pytest.raises(error) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert caught.value.hint
    assert recorder.digests == {}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_bare_callback_encrypts_it_too(
    optim: str, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer(num_train_epochs=1, optim=optim)
    trainer.add_callback(WatermarkCallback(make_config(signature=None)))
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-8" / "optimizer.wmguard").is_file()
    assert files_holding(tmp_path / "out", excerpts(moments(trainer))) == []
    # Whoever asks for the state outside of a checkpoint gets it.
    assert trainer.optimizer.state_dict().keys() == {"state", "param_groups"}


@pytest.mark.parametrize("hide_names", [False, True])
def test_hidden_names_hide_its_tensors_too(
    hide_names: bool, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    config = make_config(signature=None)
    protection = dataclasses.replace(config.protection, hide_names=hide_names)
    trainer = make_trainer(num_train_epochs=1)
    protect_trainer(trainer, dataclasses.replace(config, protection=protection))
    trainer.train()
    tensors = inspect_file(tmp_path / "out" / "checkpoint-8" / "optimizer.wmguard")["tensors"]
    assert (tensors == {}) == hide_names


def test_weights_in_the_optimizer_are_ciphertext(
    tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer(num_train_epochs=1)
    trainer.optimizer = torch.optim.ASGD(trainer.model.parameters(), lr=1e-3)
    protect_trainer(trainer, make_config(signature=None))
    trainer.train()
    averages = moments(trainer)
    assert any(name.endswith("/ax") for name in averages)
    assert PlaintextFinder(averages | dict(trainer.model.state_dict())).scan([tmp_path / "out"]) == {}


def test_save_only_model_writes_no_state(tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig) -> None:
    trainer = make_trainer(num_train_epochs=1, save_only_model=True)
    protect_trainer(trainer, make_config(signature=None))
    trainer.train()
    assert not list((tmp_path / "out" / "checkpoint-8").glob("optimizer*"))
    assert trainer.optimizer.state_dict().keys() == {"state", "param_groups"}


def test_a_trainer_that_goes_past_the_guard_is_stopped(
    tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer = make_trainer(num_train_epochs=1)

    def save(output_dir: str) -> None:
        inner: Any = trainer.optimizer.optimizer
        torch.save(inner.state_dict(), Path(output_dir) / "optimizer.pt")

    trainer._save_optimizer_and_scheduler = save  # type: ignore[method-assign]
    protect_trainer(trainer, make_config(signature=None))
    with pytest.raises(UnsupportedError, match="deleted") as caught:
        trainer.train()
    assert "save_only_model" in caught.value.hint
    assert files_holding(tmp_path / "out", excerpts(moments(trainer))) == []


def test_a_decrypted_checkpoint_leaves_it_out(guarded: Run, tmp_path: Path) -> None:
    decrypt_folder(guarded.out / "checkpoint-48", tmp_path / "plain", identity=guarded.identity)
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"model.safetensors", "config.json", "scheduler.pt"} <= names
    assert not any(name.startswith("optimizer") for name in names)
