"""A suspect, or a protected model, in a bucket: sent and fetched by the command line, judged and loaded there."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_servers import ENVIRONMENT, moto_s3
from tiny import make_marked, save_protected
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_wmguard import WatermarkConfig, load_protected, verify
from hf_wmguard.cli import main as cli
from hf_wmguard.delivery.pushing import push
from hf_wmguard.errors import MissingDependencyError, NotFoundError, UsageError
from hf_wmguard.stores.s3 import s3_client

WHERE = "s3://models/acme/tiny"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with moto_s3() as address:
        yield address


@pytest.fixture
def bucket(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": f"http://{server[0]}:{server[1]}"}.items():
        monkeypatch.setenv(name, value)
    client = s3_client()
    client.create_bucket(Bucket="models")
    yield client
    client.close()


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[WatermarkConfig, PreTrainedModel, Path]:
    root = tmp_path_factory.mktemp("s3-remote")
    config, model = make_marked(root)
    return config, model, root


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Type a command with ``--json``; return what it prints."""
    monkeypatch.setattr("sys.argv", ["wmguard", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return json.loads(capsys.readouterr().out)


def test_there_and_back_by_the_command_line(
    bucket: Any, marked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model, root = marked
    folder = tmp_path / "protected"
    save_protected(model, folder, config, max_shard_size="300KB")
    pushed = run(monkeypatch, capsys, "push", folder, WHERE)
    pulled = run(monkeypatch, capsys, "pull", WHERE, tmp_path / "back", "--signer", f"{config.owner_key}.pub")
    assert (pushed["uri"], pulled["pinned"], sorted(pulled["files"])) == (WHERE, True, sorted(pushed["files"]))
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "README.md" in sent
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == sent
    judged = run(monkeypatch, capsys, "verify", WHERE, "--owner-key", config.owner_key, "--registry", config.registry)
    assert judged["verdict"] == "detected"
    loaded = load_protected(WHERE, identity=f"file:{root / 'inference.key'}", auto_class=AutoModelForCausalLM)
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(UsageError, match="tag"):
        push(folder, WHERE, tag="v1")


def test_a_suspect_is_judged_by_ranges(bucket: Any, marked: Any, tmp_path: Path) -> None:
    config, model, _ = marked
    where = {"owner_key": config.owner_key, "registry": config.registry}
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    for path in (tmp_path / "model").iterdir():
        bucket.upload_file(str(path), "models", f"suspects/one/{path.name}")
    local = verify(tmp_path / "model", **where)
    report = verify("s3://models/suspects/one", **where)
    assert (report.verdict, report.log10_p, report.signature) == ("detected", local.log10_p, local.signature)
    assert report.suspect["uri"] == "s3://models/suspects/one"
    for name, offset, size_bytes, sha256 in report.suspect["read"]["ranges"]:
        data = (tmp_path / "model" / name).read_bytes()[offset : offset + size_bytes]
        assert hashlib.sha256(data).hexdigest() == sha256
    with pytest.raises(NotFoundError):
        verify("s3://models/suspects/none", **where)


def test_without_the_client_its_extra_is_named(marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, _ = marked
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingDependencyError) as caught:
        verify(WHERE, owner_key=config.owner_key, registry=config.registry)
    assert "hf-wmguard[s3]" in caught.value.hint
