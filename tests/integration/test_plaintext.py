"""No weight and no key reaches the disk or a log in the clear."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from tiny import Run

from hf_wmguard.suspects.plaintext import PlaintextFinder


def test_guarded_run_leaves_no_plaintext(guarded: Run) -> None:
    finder = PlaintextFinder(guarded.weights())
    # out, final, own, registry, the temporary folder: all that the run could write to.
    assert len(list(guarded.root.rglob("*.safetensors"))) > 10
    assert finder.scan([guarded.root]) == {}


def test_the_same_search_finds_an_unguarded_run(plain: Run) -> None:
    found = PlaintextFinder(plain.weights()).scan([plain.root])
    assert {path.relative_to(plain.root).as_posix() for path in found} >= {
        "out/checkpoint-8/model.safetensors",
        "out/checkpoint-16/model.safetensors",
        "out/checkpoint-17/model.safetensors",
        "final/model.safetensors",
    }


def _secrets(root: Path) -> dict[str, bytes]:
    owner = (root / "keys" / "owner.key").read_bytes()
    identity = (root / "keys" / "inference.key").read_bytes().split()[-1]
    return {
        "raw": owner,
        "hex": owner.hex().encode(),
        "HEX": owner.hex().upper().encode(),
        "base64": base64.b64encode(owner).rstrip(b"="),
        "base64url": base64.urlsafe_b64encode(owner).rstrip(b"="),
        "identity": identity,
    }


@pytest.mark.parametrize("form", ["raw", "hex", "HEX", "base64", "base64url", "identity"])
def test_no_key_is_written_or_printed(guarded: Run, form: str) -> None:
    secret = _secrets(guarded.root)[form]
    assert len(secret) >= 32
    files = [path for path in guarded.root.rglob("*") if path.is_file() and path.parent.name != "keys"]
    assert [path for path in files if secret in path.read_bytes()] == []
    assert secret.decode("latin-1") not in guarded.printed
    assert "encrypted; mark complete" in guarded.printed
