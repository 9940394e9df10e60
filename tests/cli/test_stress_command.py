"""``wmguard stress``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Run

Command = Callable[..., object]


def _arguments(run: Run, out: Path, *more: object) -> list[object]:
    where = ["--owner-key", run.where["owner_key"], "--registry", run.where["registry"]]
    return ["stress", run.final, "--out", out, *where, *more]


def test_stress_prints_a_table_and_leaves_a_report(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = wmguard(*_arguments(guarded, out, "--attacks", "bf16, nf4,finetune", "--model-id", "acme/tiny"))
    assert done.code == 0
    assert "NF4 block 64" in done.out
    assert "not run: finetune: needs --data or --text" in done.out
    assert f"report: {out / 'report.html'}" in done.out
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl",
        "results.json",
        "table.md",
        "overview.png",
        "storage.png",
        "quantization.png",
        "report.html",
    }
    # Again, from what is there, and as JSON.
    before = (out / "results.jsonl").read_bytes()
    done = wmguard(*_arguments(guarded, out, "--attacks", "nf4", "--model-id", "acme/tiny", "--json"))
    assert done.code == 0
    assert done.out.count("\n") == 1
    value = json.loads(done.out)
    assert set(value) == {"subject", "results", "skipped"}
    assert [(one["attack"], one["verdict"]) for one in value["results"]] == [
        ("none", "detected"),
        ("bf16", "detected"),
        ("nf4", "detected"),
    ]
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--attacks", "nonsense"], 2, "unknown attack nonsense"),
        (["--attacks", ""], 2, "unknown attack"),
        (["--model-id", "nobody"], 3, "commitment of nobody"),
        (["--data", "nowhere.csv"], 4, "nowhere.csv"),
    ],
)
def test_bad_input_is_two_lines(
    more: list[str], code: int, message: str, wmguard: Command, guarded: Run, tmp_path: Path
) -> None:
    done = wmguard(*_arguments(guarded, tmp_path / "out", *more))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    # Only transformers' own progress may stand before them.
    assert [line.split(" ")[0] for line in done.err.splitlines()][-2:] == ["error:", "hint:"]
    assert "Traceback" not in done.err


def test_an_empty_folder_is_named(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = _arguments(guarded, tmp_path / "out")
    done = wmguard("stress", tmp_path / "empty", *arguments[2:])
    assert done.code == 4
    assert "holds no weights" in done.err


def test_matplotlib_is_asked_for_first(
    wmguard: Command, guarded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = wmguard(*_arguments(guarded, tmp_path / "out"))
    assert done.code == 4
    assert "hf-wmguard[stress]" in done.err
    assert not (tmp_path / "out").exists()
