"""A save that fails in the middle: the old one stays, or the folder fails closed; never plaintext."""

from __future__ import annotations

import copy
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import Run
from transformers import BertForSequenceClassification, PreTrainedModel

from hf_wmguard import load_protected, verify
from hf_wmguard.errors import EnvironmentFault, NonFiniteWeightError, OwnershipError, WmguardError
from hf_wmguard.evidence.manifest import STAGING_PREFIX
from hf_wmguard.suspects.plaintext import PlaintextFinder

KILLS = 6


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let the system refuse to write more than this into one file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


# One process imports everything once; its forks save without end, one after the other, until they are killed.
_SAVE_UNTIL_KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from tiny import build_trainer, guarded_config, make_keys, make_texts, make_tokenizer
from hf_wmguard import protect_trainer
from hf_wmguard.errors import OwnershipError

torch.set_num_threads(1)
root, kills = Path(sys.argv[1]), int(sys.argv[2])
folder = root / "model"
make_keys(root / "keys")
trainer = build_trainer(root / "out", make_tokenizer(), make_texts())
protect_trainer(trainer, guarded_config(root))
model = trainer.model
torch.save(model.state_dict(), root / "keys" / "weights.pt")

def save_both():
    for size in ("1GB", "300KB"):
        model.save_pretrained(folder, max_shard_size=size)

start = time.perf_counter()
save_both()
both_s = time.perf_counter() - start
random.seed(5)
for number in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            save_both()
    time.sleep(both_s * random.uniform(0.2, 2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.copytree(folder, root / "killed" / str(number))
    try:
        save_both()
    except OwnershipError as error:
        # Killed between the manifest and its signature: the hint says to delete the rest of the interrupted save.
        assert "delete it first" in error.hint
        shutil.rmtree(folder)
        save_both()
    shutil.copytree(folder, root / "next" / str(number))
"""


def test_killed_saves_fail_closed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_UNTIL_KILLED, str(tmp_path), str(KILLS)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "keys" / "weights.pt", weights_only=True)
    (tmp_path / "keys" / "weights.pt").unlink()
    assert PlaintextFinder(weights).scan([tmp_path]) == {}
    identity = f"file:{tmp_path / 'keys' / 'inference.key'}"
    closed: list[WmguardError] = []
    for number in range(KILLS):
        try:
            killed = load_protected(
                tmp_path / "killed" / str(number), identity=identity, auto_class=BertForSequenceClassification
            )
        except WmguardError as error:
            closed.append(error)
        else:
            assert all(torch.equal(weights[name], tensor) for name, tensor in killed.state_dict().items())
        assert _staging(tmp_path / "next" / str(number)) == []
        whole = load_protected(
            tmp_path / "next" / str(number), identity=identity, auto_class=BertForSequenceClassification
        )
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.state_dict().items())
    assert all(error.hint for error in closed)


def test_first_save_killed_between_manifest_and_signature(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    (folder / "wmguard_manifest.sig.json").unlink()
    with pytest.raises(WmguardError):
        _loads(guarded, folder)
    with pytest.raises(OwnershipError) as caught:
        guarded.trainer.model.save_pretrained(folder)
    assert "interrupted save" in caught.value.hint


def test_later_save_killed_between_manifest_and_signature(guarded: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(guarded.final, folder)
    shutil.copy(guarded.root / "own" / "wmguard_manifest.json", folder)
    with pytest.raises(WmguardError):
        _loads(guarded, folder)
    guarded.trainer.model.save_pretrained(folder)
    _loads(guarded, folder)
