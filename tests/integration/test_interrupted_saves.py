"""A save that fails in the middle: the old one stays, or the folder fails closed; never plaintext."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny import Run, excerpts, files_holding, largest_file
from transformers import BertForSequenceClassification, PreTrainedModel

from hf_wmguard import load_protected, verify
from hf_wmguard.errors import EnvironmentFault, NonFiniteWeightError, OwnershipError, WmguardError
from hf_wmguard.evidence.manifest import STAGING_PREFIX
from hf_wmguard.suspects.plaintext import PlaintextFinder

KILLS = 6


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _staging(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".wmguard-")]


def _loads(run: Run, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = load_protected(folder, identity=run.identity, auto_class=BertForSequenceClassification)
    return model


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
@pytest.mark.parametrize("fault", ["nan", "full disk"])
def test_old_save_survives_a_failed_one(guarded: Run, tmp_path: Path, fault: str, shard_size: str) -> None:
    folder = tmp_path / "model"
    guarded.trainer.model.save_pretrained(folder, max_shard_size=shard_size)
    before = _bytes(folder)
    twin = copy.deepcopy(guarded.trainer.model)
    with torch.no_grad():
        twin.bert.encoder.layer[0].output.dense.weight.mul_(2)
        if fault == "nan":
            # In the last file of several, so that others have been written before.
            twin.classifier.bias[0] = float("nan")
    if fault == "nan":
        with pytest.raises(NonFiniteWeightError, match=r"classifier\.bias") as caught:
            twin.save_pretrained(folder, max_shard_size=shard_size)
        assert caught.value.hint
    else:
        with largest_file(64 * 1024), pytest.raises(EnvironmentFault, match="cannot write"):
            twin.save_pretrained(folder, max_shard_size=shard_size)
    assert _bytes(folder) == before
    assert _staging(folder) == []
    assert torch.equal(_loads(guarded, folder).classifier.bias, guarded.trainer.model.classifier.bias)
    assert PlaintextFinder(dict(twin.state_dict()) | guarded.weights()).scan([tmp_path]) == {}


def test_first_save_on_a_full_disk_leaves_nothing_that_loads(guarded: Run, tmp_path: Path) -> None:
    with largest_file(64 * 1024), pytest.raises(EnvironmentFault) as caught:
        guarded.trainer.model.save_pretrained(tmp_path / "model")
    assert "free space" in caught.value.hint
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert _staging(tmp_path) == []
    with pytest.raises(WmguardError):
        verify(tmp_path / "model", **guarded.where)


def test_stale_staging_of_a_killed_save_is_cleared_by_the_next(guarded: Run, tmp_path: Path) -> None:
    shutil.copytree(guarded.final, tmp_path / "model")
    stale = tmp_path / "model" / f"{STAGING_PREFIX}x7"
    stale.mkdir()
    shutil.copy(guarded.final / "model.safetensors", stale)
    _loads(guarded, tmp_path / "model")
    guarded.trainer.model.save_pretrained(tmp_path / "model")
    assert _staging(tmp_path) == []


# One process imports everything once; its forks do one thing without end, one after the other, until they are killed.
_UNTIL_KILLED = """
import dataclasses, os, random, shutil, signal, sys, threading, time
from pathlib import Path
import torch, tqdm
from tiny import EPOCHS, Recorder, StopAt, build_trainer, guarded_config, make_keys, make_texts, make_tokenizer
from transformers import BertForSequenceClassification
from hf_wmguard import load_protected, protect_trainer

torch.set_num_threads(1)
# tqdm's own lock is shared by forks: one that is killed while it holds it would stop all the others for good.
tqdm.tqdm.set_lock(threading.RLock())
tqdm.tqdm.monitor_interval = 0
root, kind, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder, tokenizer, texts = root / "model", make_tokenizer(), make_texts()
make_keys(root / "keys")
config, identity = guarded_config(root), f"file:{root / 'keys' / 'inference.key'}"
kept = {}

def make_trainer(out, number, callbacks):
    # The steps until it stops are before the mark, and the same in every run.
    trainer = build_trainer(out, tokenizer, texts, num_train_epochs=EPOCHS, save_strategy="steps", save_steps=1,
                            trainer={"callbacks": [*callbacks, StopAt(6, save=True)]})
    registry = root / "registries" / str(number)
    registry.mkdir(parents=True, exist_ok=True)
    protect_trainer(trainer, dataclasses.replace(config, registry=str(registry), triggers=None))
    return trainer

def train(number):
    make_trainer(root / "killed" / str(number), number, []).train()

def save(number):
    for size in ("1GB", "300KB"):
        trainer.model.save_pretrained(folder, max_shard_size=size)

def load(number):
    load_protected(folder, identity=identity, auto_class=BertForSequenceClassification)

class Keeper(Recorder):
    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        for index, one in enumerate(kwargs["optimizer"].state.values()):
            kept[f"moments/{state.global_step}/{index}"] = one["exp_avg"].clone()

keeper = Keeper()
trainer = make_trainer(root / "reference", "reference", [keeper])
if kind == "train":
    start = time.perf_counter()
    trainer.train()
    for step, weights in keeper.saved.items():
        kept.update({f"{step}/{name}": tensor for name, tensor in weights.items()})
else:
    kept.update(trainer.model.state_dict())
    save(-1)
    start = time.perf_counter()
    {"save": save, "load": load}[kind](-1)
once_s = time.perf_counter() - start
torch.save(kept, root / "keys" / "weights.pt")
random.seed(5)
for number in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            {"save": save, "load": load, "train": train}[kind](number)
    time.sleep(once_s * random.uniform(0.2, 2 if kind != "train" else 1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if kind == "save":
        shutil.copytree(folder, root / "killed" / str(number))
        save(number)
        shutil.copytree(folder, root / "next" / str(number))
"""


def _kill(root: Path, kind: str, kills: int) -> dict[str, torch.Tensor]:
    """Kill so many processes that do one thing, and return the weights, of which no byte is found anywhere."""
    for name in ("tmp", "hf"):
        (root / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _UNTIL_KILLED, str(root), kind, str(kills)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "TMPDIR": str(root / "tmp"), "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"},
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    weights: dict[str, torch.Tensor] = torch.load(root / "keys" / "weights.pt", weights_only=True)
    (root / "keys" / "weights.pt").unlink()
    moments = {name: weights.pop(name) for name in list(weights) if name.startswith("moments/")}
    # Biases of the first steps are so small that their bytes are found in any pickle: only matrices say something.
    assert PlaintextFinder({name: tensor for name, tensor in weights.items() if tensor.ndim > 1}).scan([root]) == {}
    assert files_holding(root, excerpts(moments, count=64)) == []
    return weights


def _whole_or_closed(root: Path, folder: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a folder loads as exactly these weights; otherwise it is refused with a hint."""
    identity, closed = f"file:{root / 'keys' / 'inference.key'}", []
    try:
        loaded = load_protected(folder, identity=identity, auto_class=BertForSequenceClassification)
    except WmguardError as error:
        closed.append(error)
    if closed:
        assert closed[0].hint
        return False
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    return True


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("kills", [KILLS, pytest.param(60, marks=SLOW)])
def test_killed_saves_fail_closed(tmp_path: Path, kills: int) -> None:
    weights = _kill(tmp_path, "save", kills)
    for number in range(kills):
        _whole_or_closed(tmp_path, tmp_path / "killed" / str(number), weights)
        # The next save needs no help: nobody has to delete what was left.
        assert _staging(tmp_path / "next" / str(number)) == []
        assert _whole_or_closed(tmp_path, tmp_path / "next" / str(number), weights)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_loads_leave_nothing(tmp_path: Path) -> None:
    weights = _kill(tmp_path, "load", 20)
    assert _whole_or_closed(tmp_path, tmp_path / "model", weights)
    assert [path.name for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_training_leaves_whole_checkpoints_or_closed_ones(tmp_path: Path) -> None:
    weights = _kill(tmp_path, "train", 20)
    folders = list((tmp_path / "killed").glob("*/checkpoint-*"))
    whole = [
        _whole_or_closed(
            tmp_path,
            folder,
            {
                name.partition("/")[2]: tensor
                for name, tensor in weights.items()
                if name.startswith(folder.name.removeprefix("checkpoint-") + "/")
            },
        )
        for folder in folders
    ]
    assert sum(whole) >= len(whole) - 20
    assert any(whole)


def test_the_next_save_clears_what_a_kill_between_two_names_leaves(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    (folder / ".wmguard-0123456789abcdef.tmp").write_bytes(b"ciphertext")
    (folder / ".wmguard-folder.tmp").mkdir()
    guarded.trainer.model.save_pretrained(folder)
    assert [path.name for path in _staging(folder)] == [".wmguard-folder.tmp"]
    _loads(guarded, folder)


def test_first_save_killed_between_signature_and_manifest(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    (folder / "wmguard_manifest.json").unlink()
    with pytest.raises(WmguardError) as caught:
        _loads(guarded, folder)
    assert caught.value.hint
    # The envelope says that it is the same owner's same model: the next save mends it.
    guarded.trainer.model.save_pretrained(folder)
    _loads(guarded, folder)


def test_manifest_without_a_signature_is_nobodys(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    (folder / "wmguard_manifest.sig.json").unlink()
    with pytest.raises(WmguardError):
        _loads(guarded, folder)
    with pytest.raises(OwnershipError) as caught:
        guarded.trainer.model.save_pretrained(folder)
    assert "interrupted save" in caught.value.hint


def test_later_save_killed_between_signature_and_manifest(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    shutil.copy(guarded.root / "own" / "wmguard_manifest.sig.json", folder)
    with pytest.raises(WmguardError):
        _loads(guarded, folder)
    guarded.trainer.model.save_pretrained(folder)
    _loads(guarded, folder)
