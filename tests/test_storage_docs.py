"""What docs/storage.md tells a reader to type, typed."""

from __future__ import annotations

import re
import shlex
from contextlib import closing
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import HfApi
from s3_server import moto_server

from hf_wmguard.cli import main as cli

DOCS = (Path(__file__).parent.parent / "docs" / "storage.md").read_text()


def test_the_commands_run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_CORE_DUMPS", "1")
    monkeypatch.chdir(tmp_path)
    HfApi().create_repo("acme/triage", private=True)
    with moto_server(tmp_path, monkeypatch) as server:
        with closing(server.client()) as client:
            client.create_bucket(Bucket="acme-models")
        server.assume("break-glass")
        lines = re.findall(r"^\$ (wmguard .*)$", DOCS, flags=re.MULTILINE)
        assert len(lines) == 5
        for line in lines:
            monkeypatch.setattr("sys.argv", shlex.split(line))
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert not stopped.value.code, line
    assert (tmp_path / "lockdown.tf").is_file()
