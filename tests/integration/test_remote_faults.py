"""What a Hub, or somebody between, can do to reads by ranges: never other bytes than those that were asked for."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub
from hub.clients import point_clients
from hub.faults import Answer, CutDownload, Headers, IgnoreRange, Redirect, WrongLength
from huggingface_hub import HfApi

from hf_wmguard.errors import NotFoundError, StoreError, WmguardError
from hf_wmguard.stores import hub as hub_module
from hf_wmguard.stores.hub import HubStore
from hf_wmguard.stores.location import parse_location
from hf_wmguard.stores.remote import Reads, RemoteFile

REPO = "acme/suspect"
NAME = "model.gguf"
DATA = bytes(range(251)) * 8000
FILE = "GET /(cdn|acme)"


@pytest.fixture
def store(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStore]:
    # Waits between tries are the client's, and seconds long.
    monkeypatch.setattr(hub_module, "_PAUSE_S", 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / NAME).write_bytes(DATA)
    api = HfApi()
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "f")
    with HubStore(parse_location(f"hub://{REPO}")) as opened:
        yield opened


def read(store: HubStore, offset: int = 1000, size_bytes: int = 500_000) -> bytes:
    buffer = bytearray(size_bytes)
    store.read_into(NAME, offset, memoryview(buffer))
    return bytes(buffer)


def refused(store: HubStore, match: str) -> WmguardError:
    with pytest.raises(StoreError, match=match) as caught:
        read(store)
    assert "hf_owner" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("fault", [CutDownload(100_000), CutDownload(0), WrongLength(-1000)], ids=repr)
def test_a_cut_connection_is_taken_up_where_it_was(hub: Hub, store: HubStore, fault: object) -> None:
    hub.faults.add(FILE + ".*", fault, times=3)  # type: ignore[arg-type]
    assert read(store) == DATA[1000:501_000]
    assert hub.faults.pending == 0


def test_one_that_is_always_cut_is_given_up(hub: Hub, store: HubStore) -> None:
    hub.faults.add(FILE, CutDownload(0), times=1000)
    refused(store, "cut again and again|cannot be reached")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for(hub: Hub, store: HubStore, status: int) -> None:
    hub.faults.add("GET /acme", Answer(status, retry_after=0), times=1)
    assert read(store) == DATA[1000:501_000]


def test_a_server_that_ignores_ranges_is_refused(hub: Hub, store: HubStore) -> None:
    hub.faults.add(FILE, IgnoreRange(), times=100)
    refused(store, "whole file")
    # Of the whole file the whole file is what was asked for.
    assert read(store, 0, len(DATA)) == DATA


@pytest.mark.parametrize(
    "changes",
    [
        {"Content-Range": "bytes 0-499999/2008000"},
        {"Content-Range": "bytes 1000-500999/9"},
        {"Content-Range": "bytes 1000-500999/*"},
        {"Content-Range": None},
        {"Content-Range": "bytes 1000-" + "9" * 400 + "/2008000"},
    ],
    ids=lambda one: str(one["Content-Range"])[:30],
)
def test_another_range_is_refused(hub: Hub, store: HubStore, changes: dict[str, str | None]) -> None:
    hub.faults.add("GET /cdn", Headers(changes), times=100)
    refused(store, "asked for bytes 1000 to 501000")


def test_more_bytes_than_asked_for_are_refused(hub: Hub, store: HubStore) -> None:
    hub.faults.add("GET /cdn", WrongLength(10), times=100)
    refused(store, "more bytes")


def test_another_commit_is_refused(hub: Hub, store: HubStore) -> None:
    hub.faults.add("GET /acme", Headers({"X-Repo-Commit": "0" * 40}), times=100)
    refused(store, "of commit")


def test_no_token_goes_to_another_host(hub: Hub, store: HubStore) -> None:
    hub.faults.add("GET /acme", Redirect(hub.offsite.url), times=100)
    # What it sends is the whole of something, and no range.
    refused(store, "whole file")
    assert hub.offsite.visits
    assert not hub.offsite.saw_authorization


def test_a_signed_address_that_has_expired_is_asked_for_again(hub: Hub, store: HubStore) -> None:
    read(store, 0, 1000)
    hub.faults.add("GET /cdn", Answer(403), times=1)
    assert read(store) == DATA[1000:501_000]
    assert hub.faults.pending == 0


def test_a_size_that_lies_ends_at_the_end(hub: Hub, tmp_path: Path, store: HubStore) -> None:
    with pytest.raises(StoreError):
        read(store, len(DATA) - 10, 20)
    with pytest.raises(WmguardError, match="ended early"):
        RemoteFile(store, NAME).read_into(memoryview(bytearray(20)), len(DATA) - 10)


@pytest.mark.parametrize(("token", "error"), [("hf_stranger", NotFoundError), (None, NotFoundError), ("x", StoreError)])
def test_who_may_not_see_it_is_told(
    hub: Hub,
    store: HubStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    error: type[WmguardError],
) -> None:
    point_clients(monkeypatch, hub, tmp_path / "other-home", token=token)
    with pytest.raises(error) as caught:
        HubStore(parse_location(f"hub://{REPO}"))
    assert "HF_TOKEN" in caught.value.hint


def test_no_server_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch, store: HubStore) -> None:
    hub.faults.add("GET /api/models", Answer(500), times=1000)
    with pytest.raises(StoreError, match="500"):
        HubStore(parse_location(f"hub://{REPO}"))


@pytest.mark.parametrize(
    "body", [b"<html>Log in first</html>", b"null", b"[]", b'{"siblings": 3}', b'{"siblings": [{}]}']
)
def test_what_is_no_hub_is_named(hub: Hub, store: HubStore, body: bytes) -> None:
    hub.faults.add("GET /api/models", Answer(200, body=body), times=1)
    with pytest.raises(StoreError, match="none of the Hub's answers") as caught:
        HubStore(parse_location(f"hub://{REPO}"))
    assert "HF_ENDPOINT" in caught.value.hint


def test_a_header_is_read_in_one_piece_and_kept(store: HubStore) -> None:
    reads = Reads()
    file = RemoteFile(store, NAME, reads)
    for offset, size_bytes in ((0, 8), (8, 1000), (300_000, 10), (1_500_000, 10), (0, 8)):
        buffer = bytearray(size_bytes)
        file.read_into(memoryview(buffer), offset)
        assert buffer == DATA[offset : offset + size_bytes]
    assert [(offset, size) for _, offset, size, _ in reads.to_json()["ranges"]] == [
        (0, 256 << 10),
        (300_000, 10),
        (1_500_000, 10),
    ]
