"""``wmguard protect``: what it prints, and how bad input ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_wmguard.cli.protect import Suite
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.container.suites import SUITES
from hf_wmguard.keys import write_key_pair


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.arange(300.0), "b": torch.ones(2, 3)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    key = generate_identity()
    write_key_pair(tmp_path / "reader.key", key.to_text().encode(), f"{key.recipient().to_text()}\n".encode())
    return tmp_path / "reader.key"


def test_protect_inspect_decrypt(wmguard: Any, model: Path, tmp_path: Path, reader: Path, owner_file: Path) -> None:
    out = tmp_path / "out"
    more = ("--owner-key", f"file:{owner_file}", "--model-id", "acme/x", "--iteration", "2", "--json")
    done = wmguard("protect", model, out, "--recipient", f"file:{reader}.pub", *more)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert (value["model_id"], value["iteration"], value["pinned"]) == ("acme/x", "2", True)
    assert value["files"] == ["model.safetensors"]
    assert wmguard("inspect", out, "--signer", f"file:{owner_file}.pub").code == 0
    assert wmguard("decrypt", out, tmp_path / "plain", "--identity", f"file:{reader}").code == 0
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_shortest_command(wmguard: Any, model: Path, tmp_path: Path, reader: Path) -> None:
    done = wmguard("protect", model, tmp_path / "out", "--recipient", f"file:{reader}.pub")
    assert done.code == 0
    assert "model.safetensors" in done.out
    assert "nobody's" in done.err
    assert wmguard("inspect", tmp_path / "out").code == 0


def test_hidden_and_sharded(wmguard: Any, model: Path, tmp_path: Path, reader: Path) -> None:
    more = ("--hide-names", "--suite", "ChaCha20-Poly1305", "--max-shard-size", "1KB", "--json")
    done = wmguard("protect", model, tmp_path / "out", "--recipient", f"file:{reader}.pub", *more)
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["files"]) == 2
    shown = json.loads(wmguard("inspect", tmp_path / "out", "--json").out)["headers"]
    for header in shown.values():
        assert (header["suite"], header["tensors"]) == ("ChaCha20-Poly1305", {})


def test_odd_inputs(wmguard: Any, model: Path, tmp_path: Path, reader: Path) -> None:
    to = ("--recipient", f"file:{reader}.pub")
    (model / "config.json").write_text("[" * 100_000)
    assert wmguard("protect", model, tmp_path / "deep", *to).code == 0
    (model / "other.safetensors").symlink_to(tmp_path / "none")
    done = wmguard("protect", model, tmp_path / "out", *to)
    assert done.code == 2
    assert "no ordinary file" in done.err
    (model / "other.safetensors").unlink()
    (model / "config.json").write_text("{}")
    named = tmp_path / "a\nb"
    shutil.copytree(model, named)
    for arguments in (
        (model, "--model-id", "x" * 300),
        (model, "--model-id", "\x1b[2J"),
        (model, "--iteration", "x" * 300),
        (named,),
    ):
        done = wmguard("protect", arguments[0], tmp_path / "out", *to, *arguments[1:])
        assert (done.code, [line.split(" ")[0] for line in done.err.splitlines()]) == (2, ["error:", "hint:"])
    (model / "a:b.json").write_text("{}")
    assert wmguard("protect", model, tmp_path / "out", *to).code == 2
    assert not (tmp_path / "out").exists()


def test_suites_are_those_of_the_container() -> None:
    assert [suite.value for suite in Suite] == list(SUITES)


def test_bad_commands(wmguard: Any, model: Path, tmp_path: Path, reader: Path) -> None:
    to = ("--recipient", f"file:{reader}.pub")
    (model / "pytorch_model.bin").touch()
    for arguments, code in (
        ((model, tmp_path / "out"), 2),
        ((model, tmp_path / "out", *to), 2),
        ((model, model / "out", *to), 2),
        ((tmp_path / "none", tmp_path / "out", *to), 4),
        ((model, tmp_path / "out", "--recipient", f"file:{tmp_path}/none.pub"), 4),
        ((model, tmp_path / "out", *to, "--max-shard-size", "much"), 2),
    ):
        done = wmguard("protect", *arguments)
        assert (done.code, done.out) == (code, "")
        assert [line.split(" ")[0] for line in done.err.splitlines()] == ["error:", "hint:"]
        assert not (tmp_path / "out").exists()
