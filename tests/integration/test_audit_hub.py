"""Hub repos audited through the real client, against the Hub of the tests."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub import CommitOperationDelete, HfApi
from safetensors.torch import save, save_file
from transformers import TrainingArguments

from hf_wmguard.errors import NotFoundError
from hf_wmguard.protection import protect_folder
from hf_wmguard.storage.audit import audit
from hf_wmguard.storage.findings import Finding
from hf_wmguard.storage.leaks import MAX_PICKLE_BYTES, secrets_in_pickle, secrets_in_text
from hf_wmguard.stores.location import parse_location

REPO = "acme/triage"
TOKEN = "hf_" + "aB3" * 12


def found(repo: str = REPO) -> list[Finding]:
    return list(audit(parse_location(f"hub://{repo}")).findings)


def what(findings: list[Finding], *severities: str) -> set[tuple[str, str]]:
    return {(one.what, one.where) for one in findings if one.severity in severities}


@pytest.fixture
def protected(tmp_path: Path, identity_file: Path, owner_file: Path) -> Path:
    """A protected folder."""
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"a": torch.arange(3000.0)}, plain / "model.safetensors")
    (plain / "config.json").write_text("{}")
    out = tmp_path / "protected"
    protect_folder(plain, out, recipients=(f"file:{identity_file}.pub",), owner_key=f"file:{owner_file}")
    return out


@pytest.fixture
def api(hub: Hub, protected: Path) -> HfApi:
    """A client, and a private repo that holds the protected folder."""
    api = HfApi()
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=protected)
    return api


def add(api: HfApi, name: str, data: bytes, **more: Any) -> str:
    return str(api.upload_file(repo_id=REPO, path_in_repo=name, path_or_fileobj=data, **more).oid)


def test_a_private_protected_repo_is_closed(api: HfApi) -> None:
    report = audit(parse_location(f"hub://{REPO}@main"))
    assert report.findings == ()
    assert not report.is_open


def test_public_and_gated(api: HfApi, hub: Hub) -> None:
    add(api, "model.bin", b"weights")
    api.update_repo_settings(REPO, private=False)
    findings = found()
    assert what(findings, "critical") == {("public", "repo"), ("plaintext", "model.bin (main)")}
    api.update_repo_settings(REPO, gated="auto")
    findings = found()
    assert what(findings, "medium") == {("gated", "repo")}
    assert what(findings, "high") == {("plaintext", "model.bin (main)")}


def test_plaintext_anywhere_in_the_history(api: HfApi) -> None:
    plain = save({"a": torch.arange(100_000.0)})
    # Pushed by a hook of a checkpoint, and deleted again.
    add(api, "checkpoint-8/model.safetensors", plain)
    gone = CommitOperationDelete("checkpoint-8/model.safetensors")
    api.create_commit(REPO, operations=[gone], commit_message="oops")
    api.create_branch(REPO, branch="old")
    add(api, "model-q8.gguf", b"GGUF" + os.urandom(20), revision="old")
    findings = found()
    (history,) = [where for kind, where in what(findings, "high") if "checkpoint-8" in where]
    assert history.startswith("checkpoint-8/model.safetensors (commit ")
    assert history.endswith("in the history)")
    assert ("plaintext", "model-q8.gguf (old)") in what(findings, "high")
    # Nothing else, and the protected weights are no plaintext.
    assert len(what(findings, "critical", "high", "medium", "low")) == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "weights", "notes.txt", "model.key", "model.dat"])
def test_plaintext_under_the_name_of_something_else(api: HfApi, name: str) -> None:
    add(api, name, save({"a": torch.arange(100_000.0)}))
    pickled = io.BytesIO()
    torch.save({"a": torch.arange(100_000.0)}, pickled)
    add(api, f"pickled-{name}", pickled.getvalue())
    assert what(found(), "high") == {("plaintext", f"{name} (main)"), ("plaintext", f"pickled-{name} (main)")}


@pytest.mark.parametrize("name", ["training_args.bin", "rng_state.pth", "scheduler.pt"])
def test_a_state_that_is_too_large_for_one(api: HfApi, name: str) -> None:
    add(api, name, save({"a": torch.arange(300_000.0)}))
    assert what(found(), "high") == {("plaintext", f"{name} (main)")}


def test_each_blob_is_read_once(api: HfApi, hub: Hub) -> None:
    for number in range(3):
        add(api, "notes.md", f"note {number}".encode())
    hub.traffic.clear()
    found()
    # Five commits with the same weights: their header is read once, from where the Hub sends us.
    assert len([one for one in hub.traffic.exchanges if "/model.safetensors" in one.path]) == 1


def test_token_in_training_args(api: HfApi, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True, report_to=[])
    torch.save(args, tmp_path / "training_args.bin")
    add(api, "training_args.bin", (tmp_path / "training_args.bin").read_bytes())
    clean = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    torch.save(clean, tmp_path / "clean.bin")
    add(api, "checkpoint-1/training_args.bin", (tmp_path / "clean.bin").read_bytes())
    findings = found()
    assert what(findings, "critical") == {("secret", "training_args.bin (main)")}
    assert len(findings) == 1
    assert TOKEN not in repr(findings)


def test_secrets_in_files(api: HfApi) -> None:
    add(api, ".env", f"HF_TOKEN={TOKEN}".encode())
    add(api, "deploy.yaml", b"key: AKIA" + b"A1B2" * 4)
    add(api, "server.pem", b"-----BEGIN RSA PRIVATE KEY-----\nx")
    add(api, "owner.key", os.urandom(32))
    add(api, "owner.key.pub", b"-----BEGIN PUBLIC KEY-----\nx")
    findings = found()
    assert {where.split(" ")[0] for _, where in what(findings, "critical")} == {".env", "deploy.yaml", "server.pem"}
    assert what(findings, "high") == {("secret", "owner.key (main)")}
    assert TOKEN not in repr(findings)


def test_a_manifest_that_does_not_hold(api: HfApi, protected: Path) -> None:
    envelope = protected / "wmguard_manifest.sig.json"
    add(api, envelope.name, envelope.read_bytes().replace(b'"payload":"', b'"payload":"AAAA', 1))
    assert what(found(), "medium") == {("manifest", "main: wmguard_manifest.json")}
    add(api, envelope.name, envelope.read_bytes())
    assert found() == []
    add(api, "config.json", b'{"changed": 1}')
    (finding,) = found()
    assert "config.json" in finding.detail
    api.create_commit(REPO, operations=[CommitOperationDelete(envelope.name)], commit_message="cut")
    assert "there is no" in found()[0].detail


def test_states_of_a_training(api: HfApi, tmp_path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(40_000)}}}, tmp_path / "state")
    add(api, "checkpoint-4/optimizer.pt", (tmp_path / "state").read_bytes())
    torch.save({"hf-wmguard": "the state is in wmguard_optimizer.safetensors"}, tmp_path / "note")
    add(api, "checkpoint-8/optimizer.pt", (tmp_path / "note").read_bytes())
    add(api, "checkpoint-8/rng_state.pth", (tmp_path / "state").read_bytes())
    findings = found()
    assert what(findings, "medium") == {("state", "checkpoint-4/optimizer.pt (main)")}
    assert what(findings, "low") == {("state", "checkpoint-8/rng_state.pth (main)")}


def test_no_such_repo(hub: Hub) -> None:
    with pytest.raises(NotFoundError):
        found("acme/nothing")


class Bomb:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/nonexistent/executed",)


def test_pickles_are_read_and_never_loaded(tmp_path: Path) -> None:
    assert secrets_in_pickle(pickle.dumps({"hub_token": Bomb(), "x": TOKEN})) == ["a token of the Hub"]
    for protocol in range(6):
        if protocol:
            # Of a service's own making, and kept in the pickle's memory before it is used.
            values = ["secret-of-a-company", {"hub_token": "secret-of-a-company"}]
            assert secrets_in_pickle(pickle.dumps(values, protocol)) == ["a token of the Hub"]
        assert secrets_in_pickle(pickle.dumps({"hub_token": None, "push_to_hub_token": None}, protocol)) == []
    assert secrets_in_pickle(b"\x80\x02}q\x00" + TOKEN.encode() + b"\xff") == ["a token of the Hub"]
    assert secrets_in_pickle(b"PK\x03\x04" + TOKEN.encode()) == ["a token of the Hub"]
    assert secrets_in_pickle(b"") == []
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N" * (4 * MAX_PICKLE_BYTES))
    assert secrets_in_pickle(bomb.getvalue()) == []


@pytest.mark.parametrize(
    "text",
    [b"hf_short", b"xhf_" + b"a" * 40, b"AKIA" + b"a" * 16, b"hf_model_name_with_underscores_in_it", b"PUBLIC KEY"],
)
def test_what_is_no_secret(text: bytes) -> None:
    assert secrets_in_text(text) == []
