"""``wmguard embed`` and ``wmguard plan``: what they print, and how bad input ends."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import PreTrainedTokenizerFast

Command = Callable[..., object]
EMBEDDED = {"out", "commitment", "weight_change", "bit_error_rate", "log10_p", "projections", "carriers"}
PLAN = {
    "budget",
    "weight_change",
    "matrices",
    "carriers",
    "projections",
    "steps",
    "bytes_read",
    "checkpoint_bytes",
    "share_read",
    "predictions",
    "curves",
}


def _is_error(done, code: int) -> None:  # type: ignore[no-untyped-def]
    assert done.code == code
    assert done.out == ""
    assert [line.split(" ")[0] for line in done.err.splitlines()] == ["error:", "hint:"]


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A bf16 classifier's folder."""
    folder = tmp_path / "model"
    make_model("classification", len(tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def embed(wmguard: Command, model: Path, tmp_path: Path, owner_file: Path) -> Command:
    """Run ``wmguard embed`` on the model."""

    def run(*extra: object, source: Path = model, out: Path = tmp_path / "out") -> object:
        where = ["--owner-key", f"file:{owner_file}", "--registry", tmp_path / "registry"]
        return wmguard("embed", source, out, *where, "--model-id", "acme/tiny", "--budget", "0.06", *extra)

    return run


@pytest.mark.parametrize("as_json", [False, True])
def test_embed_and_verify(as_json: bool, embed, wmguard, tmp_path: Path, owner_file: Path) -> None:  # type: ignore[no-untyped-def]
    done = embed("--iteration", "7", *(["--json"] if as_json else []))
    assert done.code == 0
    if as_json:
        value = json.loads(done.out)
        assert set(value) == EMBEDDED
        assert (value["out"], value["bit_error_rate"]) == (str(tmp_path / "out"), 0)
        assert done.err == ""
    else:
        assert "weight_change" in done.out
        assert "plaintext" in done.err
    where = ["--owner-key", f"file:{owner_file}", "--registry", tmp_path / "registry"]
    report = wmguard("verify", tmp_path / "out", *where, "--json")
    assert report.code == 0
    assert json.loads(report.out)["iteration"] == "7"
    assert json.loads(report.out)["signature"]["payload_decoded"] is True


def _empty(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][5, 5] = math.nan
    save_file(weights, folder / "model.safetensors")


def _lying_index(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    value = {"metadata": {}, "weight_map": dict.fromkeys([*weights, "bert.ghost.weight"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (_empty, 4, "holds no weights"),
        (_quantized, 2, "gptq"),
        (_pickle, 2, "pytorch_model.bin"),
        (_not_finite, 3, "layer.1.output.dense.weight"),
        (_lying_index, 3, "bert.ghost.weight"),
        (_cut, 3, "model.safetensors"),
    ],
)
def test_embed_refuses(spoil, code: int, says: str, embed, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spoil(model)
    done = embed()
    _is_error(done, code)
    assert says in done.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".wmguard-*"))


def test_embed_refuses_a_folder_that_holds_something(embed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    _is_error(embed(), 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_embed_refuses_what_is_not_there(embed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _is_error(embed(source=tmp_path / "none"), 4)


def test_embed_says_which_budget_would_do(embed) -> None:  # type: ignore[no-untyped-def]
    done = embed("--budget", "0.002")
    _is_error(done, 2)
    assert "raise the budget to" in done.err
    assert "raise the budget to" in done.err


def test_an_interrupted_embed_leaves_no_copy(  # type: ignore[no-untyped-def]
    embed, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    # In the midst of the copy, after the commitment.
    monkeypatch.setattr(os, "copy_file_range", interrupt, raising=False)
    done = embed()
    _is_error(done, 130)
    assert "error: interrupted" in done.err
    assert "stays in the registry" in done.err
    assert list((tmp_path / "registry").iterdir())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".wmguard-embed-*"))


# plan


@pytest.mark.parametrize("what", ["folder", "file"])
def test_plan_as_json(what: str, wmguard, model: Path) -> None:  # type: ignore[no-untyped-def]
    done = wmguard("plan", model if what == "folder" else model / "model.safetensors", "--budget", "0.06", "--json")
    assert (done.code, done.err) == (0, "")
    value = json.loads(done.out)
    assert set(value) == PLAN
    assert value["projections"] == sum(count for _, count in value["steps"]) >= 1056
    assert {one["verdict"] for one in value["predictions"]} <= {"payload exact", "holds", "doubtful", "lost"}
    assert 0 < value["weight_change"] <= 0.06


def test_plan_as_a_table_with_a_plot(wmguard, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = wmguard("plan", model, "--budget", "0.06", "--plot", tmp_path / "plan.png")
    assert done.code == 0
    for text in ("weight change", "INT4", "pruning", "merging", "payload exact"):
        assert text in done.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_asks_for_matplotlib_before_it_works(wmguard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    # Were the model looked at first, it would be missed first.
    done = wmguard("plan", tmp_path / "none", "--plot", tmp_path / "plan.png")
    _is_error(done, 4)
    assert "hf-wmguard[stress]" in done.err


@pytest.mark.parametrize(("spoil", "code"), [(_empty, 4), (_not_finite, 3), (_cut, 3)])
def test_plan_refuses(spoil, code: int, wmguard, model: Path) -> None:  # type: ignore[no-untyped-def]
    spoil(model)
    _is_error(wmguard("plan", model, "--budget", "0.06"), code)


@pytest.mark.parametrize("budget", ["0", "0.9", "0.002"])
def test_plan_refuses_a_budget(budget: str, wmguard, model: Path) -> None:  # type: ignore[no-untyped-def]
    _is_error(wmguard("plan", model, "--budget", budget), 2)
