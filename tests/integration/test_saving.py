"""What a save of a guarded model is to those who know of it, and to those who do not."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from tiny import Run
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_wmguard import load_protected, verify
from hf_wmguard.container.recipients import load_identity
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.evidence.manifest import STAGING_PREFIX, check_files, read_manifest
from hf_wmguard.folders import locked
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading import read_state_dict
from hf_wmguard.protect import ProtectedWriter
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training import SignatureLostWarning


def _load(guarded: Run, folder: Path) -> nn.Module:
    model: nn.Module = load_protected(folder, identity=guarded.identity, auto_class=AutoModelForSequenceClassification)
    return model


def _same(left: nn.Module, right: nn.Module) -> bool:
    other = right.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in left.state_dict().items())


@pytest.mark.parametrize("folder", ["final", "own", "out/checkpoint-48"])
def test_every_save_loads_and_verifies(guarded: Run, folder: str) -> None:
    path = guarded.root / folder
    manifest, _ = read_manifest(path)
    check_files(path, manifest)
    loaded, saved = _load(guarded, path).state_dict(), guarded.trainer.model.state_dict()
    if folder.startswith("out/"):
        saved = guarded.recorder.saved[48]
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())
    report = verify(path, **guarded.where)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.bit_error_rate == 0.0
    assert report.signature.carriers_missing == 0


def test_shards_and_single_file_replace_each_other(guarded: Run, tmp_path: Path) -> None:
    model = guarded.trainer.model
    for shard_size, files in (("200KB", 9), ("1GB", 1), ("500KB", 5), ("200KB", 9)):
        model.save_pretrained(tmp_path / "model", max_shard_size=shard_size)
        names = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
        manifest, _ = read_manifest(tmp_path / "model")
        assert names == {entry.name for entry in manifest.files if entry.name.endswith(".safetensors")}
        assert (len(names) == 1) == (files == 1)
        assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (files > 1)
        assert _same(_load(guarded, tmp_path / "model"), model)
        assert verify(tmp_path / "model", **guarded.where).verdict == "detected"


def test_a_file_of_someone_else_in_the_folder_is_not_deleted(guarded: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    guarded.trainer.model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.safetensors").read_bytes() == b"mine"


def test_two_saves_at_once_do_not_clear_each_other_away(guarded: Run, tmp_path: Path) -> None:
    assert guarded.config is not None
    owner = OwnerKey.load(guarded.config.owner_key)
    with ProtectedWriter(tmp_path, config=guarded.config, owner=owner) as first:
        first.add({"a": torch.ones(3)}, first.staging / "model.safetensors")
        with ProtectedWriter(tmp_path, config=guarded.config, owner=owner) as second:
            second.add({"a": torch.zeros(3)}, second.staging / "model.safetensors")
            second.finish(state="pending")
        first.finish(state="pending")
    manifest, _ = read_manifest(tmp_path)
    check_files(tmp_path, manifest)
    assert torch.equal(read_state_dict(tmp_path, (load_identity(guarded.identity),))["a"], torch.ones(3))
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))


def test_a_save_waits_for_who_changes_the_recipients(guarded: Run, tmp_path: Path) -> None:
    assert guarded.config is not None
    owner = OwnerKey.load(guarded.config.owner_key)
    with ProtectedWriter(tmp_path, config=guarded.config, owner=owner) as writer:
        writer.add({"a": torch.ones(3)}, writer.staging / "model.safetensors")
        with locked(tmp_path):
            thread = threading.Thread(target=writer.finish, kwargs={"state": "pending"})
            thread.start()
            thread.join(0.3)
            assert [path for path in tmp_path.iterdir() if path.is_file()] == []
        thread.join()
    check_files(tmp_path, read_manifest(tmp_path)[0])


def test_deep_copy_saves_its_own_weights(guarded: Run, tmp_path: Path) -> None:
    twin = copy.deepcopy(guarded.trainer.model)
    with torch.no_grad():
        twin.classifier.weight.add_(1.0)
    twin.save_pretrained(tmp_path / "twin")
    loaded = _load(guarded, tmp_path / "twin")
    assert _same(loaded, twin)
    assert not torch.equal(loaded.classifier.weight, guarded.trainer.model.classifier.weight)
    assert PlaintextFinder(dict(twin.state_dict())).scan([tmp_path]) == {}


def test_lost_signature_is_said_aloud(guarded: Run, tmp_path: Path) -> None:
    twin = copy.deepcopy(guarded.trainer.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    with pytest.warns(SignatureLostWarning, match="does not read back"):
        twin.save_pretrained(tmp_path / "twin")
    manifest, _ = read_manifest(tmp_path / "twin")
    assert manifest.signature is not None
    assert not manifest.signature.payload_decoded


def test_pickling_a_guarded_model_fails(guarded: Run, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="plaintext") as caught:
        torch.save(guarded.trainer.model, tmp_path / "model.pt")
    assert "save_pretrained" in caught.value.hint
    assert PlaintextFinder(guarded.weights()).scan([tmp_path]) == {}


def test_a_part_of_the_model_is_not_saved_by_itself(guarded: Run, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="part of a guarded model"):
        guarded.trainer.model.base_model.save_pretrained(tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


def test_a_way_around_is_refused(guarded: Run, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="distributed_checkpoint"):
        guarded.trainer.model.save_pretrained(tmp_path / "model", distributed_checkpoint=True)
    assert list(tmp_path.iterdir()) == []


def test_other_models_of_the_process_are_saved_as_ever(plain: Run, tmp_path: Path) -> None:
    plain.trainer.model.save_pretrained(tmp_path)
    assert _same(BertForSequenceClassification.from_pretrained(tmp_path), plain.trainer.model)


def test_card_of_the_folder_names_no_secret_place(guarded: Run) -> None:
    # The manifest is public: it holds no path, no key reference and no trigger.
    text = (guarded.final / "wmguard_manifest.json").read_text()
    assert str(guarded.root) not in text
    assert "owner.key" not in text
    assert set(json.loads(text)["triggers"]) == {"count", "candidates", "match_rate"}
