"""The Hub of the tests, by hf_xet: what goes by Xet comes back by it and without it, and belongs to its repo alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from hub import Hub
from hub.clients import environment
from hub.faults import Answer, CutDownload
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url

REPO = "acme/model"
WEIGHTS = "model.safetensors"
DATA = os.urandom(3_000_000)

pytestmark = pytest.mark.parametrize("hub", ["xet"], indirect=True)


@pytest.fixture
def repo(hub: Hub) -> Hub:
    """The hub with one file that came by Xet."""
    HfApi().create_repo(REPO, private=True)
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=DATA, path_in_repo=WEIGHTS)
    assert not hub.traffic.matching("/lfs/")
    assert hub.traffic.bytes_in("POST /xet/v1/xorbs/") > len(DATA)
    hub.traffic.clear()
    return hub


def test_comes_back_by_xet(repo: Hub) -> None:
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == DATA
    assert repo.traffic.bytes_out("GET /xorbs/") >= len(DATA)
    assert not repo.traffic.matching("GET /cdn/")
    assert not any(one.authorized for one in repo.traffic.matching("GET /xorbs/"))


def test_comes_back_without_xet(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == DATA
    with httpx2.Client(follow_redirects=True, headers={"Authorization": "Bearer hf_owner"}) as client:
        answer = client.get(hf_hub_url(REPO, WEIGHTS), headers={"Range": "bytes=1000000-1000099"})
    assert answer.content == DATA[1_000_000:1_000_100]
    assert not repo.traffic.matching("/xet|/xorbs/")


def test_small_change_is_a_small_upload(repo: Hub) -> None:
    changed = DATA[:1_500_000] + b"inserted" + DATA[1_500_000:]
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=changed, path_in_repo=WEIGHTS)
    assert 0 < repo.traffic.bytes_in("POST /xet/v1/xorbs/") < 500_000
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == changed


def test_packed_contents_are_recorded_unpacked(repo: Hub) -> None:
    text = b"a line that repeats itself and is packed well\n" * 4000
    numbers = b"".join((1_065_353_216 + number * 8191).to_bytes(4, "little") for number in range(100_000))
    for data in (text, numbers):
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=data, path_in_repo="packed.bin")
        assert Path(hf_hub_download(REPO, "packed.bin", force_download=True)).read_bytes() == data
        assert any(path.name.startswith("xorb-") for path in repo.traffic.holding(data[5000:5500]))
    assert repo.traffic.bytes_in("POST /xet/v1/xorbs/") < len(text) + len(numbers)


def test_another_repo_and_a_reader_get_nothing(repo: Hub) -> None:
    api = HfApi()
    name = api.get_paths_info(REPO, [WEIGHTS])[0].xet_hash

    def token(kind: str, repo_id: str, by: str) -> httpx2.Response:
        url = f"{repo.endpoint}/api/models/{repo_id}/xet-{kind}-token/main"
        return httpx2.get(url, headers={"Authorization": f"Bearer {by}"})

    def ask(method: str, path: str, with_token: str) -> int:
        url = f"http://127.0.0.1:{repo.port}/xet/v1/{path}"
        return httpx2.request(method, url, headers={"Authorization": f"Bearer {with_token}"}).status_code

    assert token("read", REPO, "hf_stranger").status_code == 404
    assert token("write", REPO, "hf_reader").status_code == 403
    own = token("read", REPO, "hf_reader").json()["accessToken"]
    HfApi(token="hf_stranger").create_repo("stranger/model")
    foreign = token("read", "stranger/model", "hf_stranger").json()["accessToken"]
    assert ask("GET", f"reconstructions/{name}", own) == 200
    assert ask("GET", f"reconstructions/{name}", foreign) == 404
    assert ask("GET", f"reconstructions/{name}", own.replace("acme", "evil")) == 401
    assert ask("POST", "shards", own) == 403


def test_real_client_lives_through_faults(repo: Hub) -> None:
    repo.faults.add("GET /xet/v1/reconstructions/", Answer(503, retry_after=0))
    repo.faults.add("GET /xorbs/", CutDownload(after_bytes=1_000_000))
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == DATA
    assert repo.faults.pending == 0


def test_command_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / WEIGHTS).write_bytes(DATA)
    variables = {**os.environ, **environment(hub, tmp_path / "another-home", xet=True)}
    hf = str(Path(sys.executable).with_name("hf"))
    for arguments in (
        ["upload", REPO, str(tmp_path / "model"), "."],
        ["download", REPO, "--local-dir", str(tmp_path / "back")],
    ):
        done = subprocess.run([hf, *arguments], env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == DATA
    assert hub.traffic.bytes_in("POST /xet/v1/xorbs/") > len(DATA)
