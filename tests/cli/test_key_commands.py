"""``keygen`` and ``rewrap``: keys are made, recipients come and go, secrets are asked for without being shown."""

from __future__ import annotations

import base64
import json
import os
import pty
import select
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Run

from hf_wmguard.container.owner import load_owner
from hf_wmguard.container.recipients import load_identity, load_recipient
from hf_wmguard.keys import OwnerKey

Command = Callable[..., object]
WORDS = "correct horse battery"


def _is_error(done, code: int) -> None:  # type: ignore[no-untyped-def]
    assert (done.code, done.out) == (code, "")
    assert [line.split(" ")[0] for line in done.err.splitlines()] == ["error:", "hint:"]


# keygen


def test_keygen_post_quantum(wmguard: Command, tmp_path: Path) -> None:
    path = tmp_path / "pq.key"
    done = wmguard("keygen", "recipient", "--post-quantum", "--out", path, "--json")
    name = json.loads(done.out)["id"]
    assert name.startswith("wmguard-recipient-mlkem768-x25519-v1:")
    assert load_recipient(f"file:{path}.pub").to_text().strip() == name  # type: ignore[attr-defined]
    assert load_identity(f"file:{path}").recipient().to_text().strip() == name  # type: ignore[attr-defined]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().split(":")[1].strip() not in done.out + done.err


@pytest.mark.parametrize("as_json", [False, True])
def test_keygen_key(as_json: bool, wmguard: Command, tmp_path: Path) -> None:
    path = tmp_path / "raw.key"
    done = wmguard("keygen", "key", "--out", path, *(["--json"] if as_json else []))
    assert done.code == 0
    assert [one.name for one in tmp_path.iterdir()] == ["raw.key"]
    assert (len(path.read_bytes()), stat.S_IMODE(path.stat().st_mode)) == (32, 0o600)
    name = load_recipient(f"rawkey:file:{path}").key_id
    assert name in done.out
    if as_json:
        assert json.loads(done.out) == {"kind": "key", "private": str(path), "public": None, "id": name}
    assert path.read_bytes().hex() not in done.out


def test_keygen_sealed(wmguard: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(bytes(range(32))).decode())
    path, ref = tmp_path / "owner.key", "rawkey:env:WMGUARD_TEST_KEY"
    done = wmguard("keygen", "owner", "--sealed", ref, "--out", path, "--json")
    assert done.code == 0
    assert load_owner(f"{ref}@file:{path}").key_id() == json.loads(done.out)["id"]
    registry = ["--owner-key", f"{ref}@file:{path}", "--registry", tmp_path / "none"]
    done = wmguard("verify", tmp_path, *registry)
    assert "owner key" not in done.err


@pytest.mark.parametrize(
    "arguments", [["owner", "--post-quantum"], ["key", "--post-quantum"], ["recipient", "--sealed", "vault:a/b"]]
)
def test_keygen_options_that_do_not_fit(arguments: list[str], wmguard: Command, tmp_path: Path) -> None:
    _is_error(wmguard("keygen", *arguments, "--out", tmp_path / "x"), 2)
    assert list(tmp_path.iterdir()) == []


def test_keygen_without_a_terminal(wmguard: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        _is_error(wmguard("keygen", "owner", "--sealed", "passphrase:prompt", "--out", tmp_path / "x"), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_passphrase_is_typed_unseen(tmp_path: Path) -> None:
    """On a terminal of its own: what is typed does not come back from it."""
    path = tmp_path / "owner.key"
    arguments = ["keygen", "owner", "--sealed", "passphrase:prompt", "--out", str(path)]
    shown, code = _on_a_terminal(arguments, [WORDS, WORDS])
    assert (code, WORDS in shown) == (0, False), shown
    assert "Passphrase" in shown
    assert OwnerKey.__name__ in repr(_load_with_words(path))


def _load_with_words(path: Path) -> OwnerKey:
    from hf_wmguard.container.asking import asking

    with asking(lambda what, new: WORDS):
        return load_owner(f"passphrase:prompt@file:{path}")


def _on_a_terminal(arguments: list[str], answers: list[str]) -> tuple[str, int]:
    ours, theirs = pty.openpty()
    code = "from hf_wmguard.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + 120
        while time.monotonic() < deadline and select.select([ours], [], [], 120)[0]:
            try:
                shown += os.read(ours, 1000)
            except OSError:
                # Nobody holds the other end any more.
                break
            # The prompt's last space comes once the echo is off.
            if shown.endswith(b": ") and answers:
                os.write(ours, answers.pop(0).encode() + b"\n")
        os.close(ours)
    return shown.decode(), process.returncode


# rewrap


@pytest.fixture
def folder(guarded: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guarded.final, tmp_path / "model"))


def test_rewrap(wmguard: Command, guarded: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(bytes(range(32))).decode())
    raw = "rawkey:env:WMGUARD_TEST_KEY"
    wmguard("keygen", "recipient", "--out", tmp_path / "new.key")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = wmguard(
        "rewrap", folder, "--identity", guarded.identity, "--add", f"file:{tmp_path}/new.key.pub", "--add", raw,
        "--remove", f"{guarded.identity}.pub", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert len(value["added"]) == 2
    assert value["removed"] == [load_recipient(f"{guarded.identity}.pub").key_id]
    assert [one["kind"] for one in value["recipients"]] == ["x25519", "x25519", "rawkey"]
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"wmguard_recipients.json"}
    assert json.loads(wmguard("inspect", folder, "--json").out)["recipients"] == value["recipients"]
    shown = "".join(wmguard("inspect", folder).out.replace("│", "").split())
    assert all(one["recipient"] in shown for one in value["recipients"])
    assert wmguard("decrypt", folder, tmp_path / "a", "--identity", raw).code == 0
    assert wmguard("decrypt", folder, tmp_path / "b", "--identity", f"file:{tmp_path}/new.key").code == 0
    _is_error(wmguard("decrypt", folder, tmp_path / "c", "--identity", guarded.identity), 3)
    assert (
        wmguard(
            "verify", folder, "--owner-key", guarded.where["owner_key"], "--registry", guarded.where["registry"]
        ).code
        == 0
    )


def test_rewrap_for_people(wmguard: Command, guarded: Run, folder: Path, tmp_path: Path) -> None:
    wmguard("keygen", "key", "--out", tmp_path / "raw")
    done = wmguard("rewrap", folder, "--identity", guarded.identity, "--add", f"rawkey:file:{tmp_path}/raw")
    assert (done.code, done.err) == (0, "")
    assert "rawkey" in done.out


def test_rewrap_errors(wmguard: Command, guarded: Run, folder: Path, tmp_path: Path) -> None:
    wmguard("keygen", "recipient", "--out", tmp_path / "new.key")
    owner = json.loads(wmguard("inspect", folder, "--json").out)["recipients"][0]["recipient"]
    before = (folder / "wmguard_recipients.json").read_bytes()
    identity = ["--identity", guarded.identity]
    for code, arguments in (
        (2, identity),
        (2, [*identity, "--remove", owner]),
        (2, [*identity, "--remove", f"file:{tmp_path}/new.key.pub"]),
        (2, [*identity, "--add", "nonsense"]),
        (3, ["--identity", f"file:{tmp_path}/new.key", "--add", f"file:{tmp_path}/new.key.pub"]),
        (4, [*identity, "--add", f"file:{tmp_path}/none.pub"]),
    ):
        _is_error(wmguard("rewrap", folder, *arguments), code)
    _is_error(wmguard("rewrap", tmp_path / "none", *identity, "--remove", owner), 4)
    assert (folder / "wmguard_recipients.json").read_bytes() == before
