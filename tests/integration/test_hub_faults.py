"""Faults of the Hub of the tests: each is what it says, to a plain client, and real clients live through them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hub import Hub
from hub.faults import (
    Answer,
    Corrupt,
    CutDownload,
    CutUpload,
    Hang,
    Headers,
    IgnoreRange,
    LoseAnswer,
    Redirect,
    WrongLength,
)
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

REPO = "acme/model"
DATA = os.urandom(2_500_000)
WEIGHTS = "model.safetensors"


@pytest.fixture
def repo(hub: Hub) -> Hub:
    """The hub with one large file in a repo."""
    HfApi().create_repo(REPO)
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=DATA, path_in_repo=WEIGHTS)
    hub.traffic.clear()
    return hub


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    """A client that follows redirects and does not try again."""
    with httpx2.Client(follow_redirects=True, headers={"Authorization": "Bearer hf_owner"}) as one:
        yield one


def test_busy_server_is_asked_again(repo: Hub) -> None:
    repo.faults.add("POST .*/preupload/", Answer(503, retry_after=0))
    repo.faults.add("PUT /lfs/", Answer(500, retry_after=0))
    repo.faults.add("GET /cdn/", Answer(429, retry_after=0))
    other = os.urandom(1_500_000)
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=other, path_in_repo="other.safetensors")
    assert Path(hf_hub_download(REPO, "other.safetensors")).read_bytes() == other
    assert repo.faults.pending == 0
    statuses = [one.status for one in repo.traffic.exchanges]
    assert {503, 500, 429} < set(statuses)


def test_busy_server_gives_up(repo: Hub) -> None:
    repo.faults.add("POST .*/commit/", Answer(500))
    before = HfApi().model_info(REPO).sha
    with pytest.raises(HfHubHTTPError):
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt")
    assert HfApi().model_info(REPO).sha == before


def test_upload_is_cut(hub: Hub) -> None:
    HfApi().create_repo(REPO)
    # In parts, the second of them cut; and in one piece.
    hub.faults.add("PUT /lfs/", CutUpload(after_bytes=300_000), skip=1)
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=DATA, path_in_repo=WEIGHTS)
    cut = [one for one in hub.traffic.matching("^PUT") if one.status == 0]
    assert len(cut) == 1
    assert 300_000 < cut[0].bytes_in < (1 << 20)
    hub.faults.add("PUT /lfs/", CutUpload(after_bytes=200_000))
    HfApi().upload_file(repo_id=REPO, path_or_fileobj=DATA[:900_000], path_in_repo="small.safetensors")
    assert hub.faults.pending == 0
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == DATA
    assert Path(hf_hub_download(REPO, "small.safetensors")).read_bytes() == DATA[:900_000]
    assert not list((hub.storage.folder / "scratch").iterdir())


def test_download_is_cut(repo: Hub, client: httpx2.Client) -> None:
    repo.faults.add("GET /cdn/", CutDownload(after_bytes=1_000_000))
    with client.stream("GET", hf_hub_url(REPO, WEIGHTS)) as answer:
        assert answer.headers["content-length"] == str(len(DATA))
        seen: list[bytes] = []
        with pytest.raises(httpx2.RemoteProtocolError):
            seen.extend(answer.iter_raw())
    assert b"".join(seen) == DATA[:1_000_000]
    repo.faults.add("GET /cdn/", CutDownload(after_bytes=1_000_000))
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == DATA
    assert [one.bytes_out for one in repo.traffic.matching("GET /cdn/")] == [1_000_000, 1_000_000, len(DATA)]


def test_answer_is_lost(repo: Hub) -> None:
    repo.faults.add("POST .*/commit/", LoseAnswer())
    before = HfApi().model_info(REPO).sha
    with pytest.raises(httpx2.HTTPError):
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt")
    # It happened all the same.
    assert HfApi().model_info(REPO).sha != before
    assert HfApi().file_exists(REPO, "a.txt")


def test_answers_that_are_not_true(repo: Hub, client: httpx2.Client) -> None:
    url, asked = hf_hub_url(REPO, WEIGHTS), {"Range": "bytes=100-199"}
    repo.faults.add("GET /cdn/", IgnoreRange())
    answer = client.get(url, headers=asked)
    assert (answer.status_code, answer.content) == (200, DATA)
    repo.faults.add("GET /cdn/", Headers({"Content-Range": "bytes 0-99/100", "ETag": None}))
    answer = client.get(url, headers=asked)
    assert (answer.status_code, answer.headers["content-range"]) == (206, "bytes 0-99/100")
    assert (answer.content, "etag" in answer.headers) == (DATA[100:200], False)
    for by_bytes, expected in ((-30, DATA[100:170]), (20, DATA[100:200] + bytes(20))):
        repo.faults.add("GET /cdn/", WrongLength(by_bytes))
        assert client.get(url, headers=asked).content == expected
    repo.faults.add("GET /cdn/", Corrupt(at=1_200_000))
    got = client.get(url).content
    assert [at for at in range(len(DATA)) if got[at] != DATA[at]] == [1_200_000]
    repo.faults.add("HEAD .*/resolve/", Headers({"X-Repo-Commit": "0" * 40}))
    assert client.head(url, follow_redirects=False).headers["x-repo-commit"] == "0" * 40
    assert client.get(url, headers=asked).content == DATA[100:200]


def test_hanging(repo: Hub, client: httpx2.Client) -> None:
    url = hf_hub_url(REPO, WEIGHTS)
    for action in (Hang(0.3), Hang(0.3, after_bytes=1_500_000)):
        repo.faults.add("GET /cdn/", action)
        start = time.monotonic()
        assert client.get(url).content == DATA
        assert time.monotonic() - start > 0.3
    repo.faults.add("GET /cdn/", Hang(30.0))
    with pytest.raises(httpx2.ReadTimeout):
        client.get(url, timeout=0.2)


def test_sent_to_another_host(repo: Hub, client: httpx2.Client) -> None:
    url = hf_hub_url(REPO, WEIGHTS)
    repo.faults.add("GET .*/resolve/", Redirect(repo.offsite.url))
    assert client.get(url).content == repo.offsite.body
    assert [visit.path for visit in repo.offsite.visits] == [url.removeprefix(repo.endpoint)]
    # The client is one that knows not to; a token that does come is noticed.
    assert not repo.offsite.saw_authorization
    client.get(repo.offsite.url)
    assert repo.offsite.saw_authorization


def test_wrong_commit_leads_the_cache_astray(repo: Hub) -> None:
    repo.faults.add("HEAD .*/resolve/", Headers({"X-Repo-Commit": "f" * 40}))
    assert Path(hf_hub_download(REPO, WEIGHTS)).parent.name == "f" * 40
    assert Path(snapshot_download(REPO)).name == HfApi().model_info(REPO).sha
