"""The Hub of the tests, by its real clients: what other tests build on has to be as the Hub is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from hub import Hub
from hub.clients import forget_connections, point_clients
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "acme/model"
LFS = "lfs"


def make_folder(folder: Path) -> dict[str, bytes]:
    """Write a folder with files of all kinds; return their contents."""
    files = {
        "README.md": b"---\nlicense: mit\n---\n# A model\n",
        "config.json": b'{"hidden_size": 64}',
        "empty.txt": b"",
        "sub/folder/notes with spaces.txt": b"notes",
        "sub/binary.dat": b"\0\1\2" * 10,
        "model-00001-of-00002.safetensors": os.urandom(5000),
        "model-00002-of-00002.safetensors": os.urandom(3 * (1 << 20) + 17),
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return files


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return what is in a folder of a client, its own notes and the Hub's first file left out."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    own = [path for path in paths if not path.startswith((".cache/", ".gitattributes"))]
    return {path: (folder / path).read_bytes() for path in own}


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    """Return the HTTP status an error is about."""
    return error.value.response.status_code


def clone(hub: Hub, commit: str) -> dict[str, bytes]:
    """Return a commit's files, as a client gets them."""
    return read_folder(Path(snapshot_download(REPO, revision=commit)))


@pytest.mark.parametrize("hub", [LFS], indirect=True)
def test_folder_comes_back(hub: Hub, tmp_path: Path) -> None:
    files = make_folder(tmp_path / "model")
    api = HfApi()
    assert api.create_repo(REPO, private=True).repo_id == REPO
    commit = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model", commit_message="All of it")
    assert clone(hub, "main") == files
    assert clone(hub, commit.oid) == files

    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.author) == (commit.oid, True, "acme")
    siblings = {one.rfilename: one for one in info.siblings or ()}
    assert {path: len(data) for path, data in files.items()}.items() <= {p: s.size for p, s in siblings.items()}.items()
    large = {path for path, sibling in siblings.items() if sibling.lfs}
    assert large == {path for path in files if path.endswith((".safetensors", ".dat"))}
    assert [one.title for one in api.list_repo_commits(REPO)] == ["All of it", "initial commit"]


def test_large_files_go_in_parts_to_the_other_host(hub: Hub, tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    puts = hub.traffic.matching("^PUT /lfs/")
    assert sorted(one.bytes_in for one in puts) == [17, 30, 5000, 1 << 20, 1 << 20, 1 << 20]
    assert {one.host.split(":")[0] for one in puts} == {"127.0.0.1"}
    assert not any(one.authorized for one in puts)
    assert len(hub.traffic.matching("^POST .*/lfs/verify")) == 3


def test_known_contents_are_not_sent_again(hub: Hub, tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    api = HfApi()
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    hub.traffic.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model").oid == first.oid
    assert not hub.traffic.matching("^PUT|/commit/")
    # Another repo does not get them by their name alone.
    api.create_repo("acme/other")
    with pytest.raises(BadRequestError, match="not uploaded"):
        api.create_commit(
            "acme/other", [_pretend(tmp_path / "model/model-00001-of-00002.safetensors")], commit_message="x"
        )


def _pretend(path: Path) -> CommitOperationAdd:
    operation = CommitOperationAdd("model.safetensors", path)
    operation._is_uploaded, operation._upload_mode, operation._should_ignore = True, LFS, False
    return operation


def test_operations_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    files = make_folder(tmp_path / "model")
    api = HfApi()
    api.create_repo(REPO)
    before = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model").oid
    weights = "model-00001-of-00002.safetensors"
    after = api.create_commit(
        REPO,
        [
            CommitOperationDelete("sub/"),
            CommitOperationDelete("config.json"),
            CommitOperationCopy(weights, "copy.safetensors"),
            CommitOperationAdd("new.txt", b"new"),
        ],
        commit_message="Change",
        commit_description="At length",
        parent_commit=before,
    ).oid
    kept = {path: data for path, data in files.items() if not path.startswith(("sub/", "config"))}
    assert clone(hub, after) == {**kept, "copy.safetensors": files[weights], "new.txt": b"new"}
    assert clone(hub, before) == files
    changed = {one.path: one.last_commit.oid for one in api.get_paths_info(REPO, ["new.txt", weights], expand=True)}
    assert changed == {"new.txt": after, weights: before}


def test_commit_is_refused_as_a_whole(hub: Hub) -> None:
    api = HfApi()
    api.create_repo(REPO)
    first = api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a.txt").oid
    second = api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt").oid
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"3", path_in_repo="a.txt", parent_commit=first)
    assert status_of(error) == 412
    with pytest.raises(EntryNotFoundError):
        api.create_commit(
            REPO, [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("missing.txt")], commit_message="Half"
        )
    assert api.model_info(REPO).sha == second
    assert not api.file_exists(REPO, "b.txt")


def test_branches_and_tags(hub: Hub) -> None:
    api = HfApi()
    api.create_repo(REPO)
    first = api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a.txt").oid
    api.create_branch(REPO, branch="try/it", revision=first)
    api.create_tag(REPO, tag="v1", tag_message="One")
    second = api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", revision="try/it").oid
    refs = api.list_repo_refs(REPO)
    assert {one.name: one.target_commit for one in refs.branches} == {"main": first, "try/it": second}
    assert {one.name: one.target_commit for one in refs.tags} == {"v1": first}
    read = {name: Path(hf_hub_download(REPO, "a.txt", revision=name)).read_bytes() for name in ("v1", "main", "try/it")}
    assert read == {"v1": b"1", "main": b"1", "try/it": b"2"}
    for make in (lambda: api.create_tag(REPO, tag="v1"), lambda: api.create_branch(REPO, branch="try/it")):
        with pytest.raises(HfHubHTTPError) as error:
            make()
        assert status_of(error) == 409
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="try/it")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")
    # Its commit stays, as every one does.
    assert api.model_info(REPO, revision=second).sha == second


def test_listing(hub: Hub, tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    assert {one.path for one in api.list_repo_tree(REPO, "sub")} == {"sub/folder", "sub/binary.dat"}
    everything = {one.path for one in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert everything >= {"sub", "sub/folder", "sub/folder/notes with spaces.txt", "config.json"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))
    assert [one.path for one in api.get_paths_info(REPO, ["sub", "nowhere", "config.json"])] == ["sub", "config.json"]


def test_metadata_and_cache(hub: Hub, tmp_path: Path) -> None:
    files = make_folder(tmp_path / "model")
    api = HfApi()
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model").oid
    for path in ("config.json", "model-00002-of-00002.safetensors"):
        seen = get_hf_file_metadata(hf_hub_url(REPO, path), token="hf_owner")
        assert (seen.commit_hash, seen.size) == (commit, len(files[path]))
        cached = Path(hf_hub_download(REPO, path))
        assert cached.resolve().name == seen.etag
        assert cached.parent.name == commit
        hub.traffic.clear()
        assert Path(hf_hub_download(REPO, path)) == cached
        assert hub.traffic.bytes_out() == 0
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="nowhere")


@pytest.mark.parametrize("path", ["config.json", "model-00002-of-00002.safetensors"])
def test_ranges(hub: Hub, tmp_path: Path, path: str) -> None:
    data = make_folder(tmp_path / "model")[path]
    HfApi().create_repo(REPO, private=True)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    headers = {"Authorization": "Bearer hf_owner"}
    size = len(data)
    with httpx2.Client(follow_redirects=True, headers=headers) as client:

        def get(asked: str) -> tuple[int, str | None, bytes]:
            answer = client.get(hf_hub_url(REPO, path), headers={"Range": asked})
            return answer.status_code, answer.headers.get("content-range"), answer.content

        assert get("bytes=3-9") == (206, f"bytes 3-9/{size}", data[3:10])
        assert get("bytes=5-") == (206, f"bytes 5-{size - 1}/{size}", data[5:])
        assert get("bytes=-4") == (206, f"bytes {size - 4}-{size - 1}/{size}", data[-4:])
        assert get(f"bytes=2-{size + 99}") == (206, f"bytes 2-{size - 1}/{size}", data[2:])
        assert get("bytes=0-1,3-4") == (200, None, data)
        assert get("bytes=9-3") == (200, None, data)
        assert get(f"bytes={size}-")[:2] == (416, f"bytes */{size}")


def test_who_may_do_what(hub: Hub, tmp_path: Path) -> None:
    owner, reader, stranger = HfApi(), HfApi(token="hf_reader"), HfApi(token="hf_stranger")
    nobody, forger = HfApi(token=False), HfApi(token="hf_forged")
    owner.create_repo(REPO, private=True)
    owner.upload_file(repo_id=REPO, path_or_fileobj=b"secret", path_in_repo="a.txt")
    assert owner.whoami()["name"] == "acme"
    assert owner.whoami()["auth"]["accessToken"]["role"] == "write"
    assert reader.model_info(REPO).private

    def download(api: HfApi) -> str:
        return api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path / "fresh")

    for api, status in ((stranger, 404), (nobody, 401)):
        for act in (lambda one: one.model_info(REPO), download, lambda one: one.list_repo_refs(REPO)):
            with pytest.raises(RepositoryNotFoundError) as error:
                act(api)
            assert status_of(error) == status
    with pytest.raises(HfHubHTTPError, match="Invalid") as invalid:
        forger.whoami()
    assert status_of(invalid) == 401
    assert Path(download(reader)).read_bytes() == b"secret"
    for act in (
        lambda one: one.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt"),
        lambda one: one.create_repo("acme/another"),
        lambda one: one.create_tag(REPO, tag="v1"),
        lambda one: one.delete_repo(REPO),
        lambda one: one.update_repo_settings(REPO, private=False),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            act(reader)
        assert status_of(error) == 403

    owner.update_repo_settings(REPO, private=False)
    assert Path(download(nobody)).read_bytes() == b"secret"
    with pytest.raises(HfHubHTTPError) as error:
        stranger.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt")
    assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        owner.create_repo(REPO)
    assert status_of(error) == 409
    owner.create_repo(REPO, exist_ok=True)
    owner.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        owner.model_info(REPO)


def test_links_to_storage_are_signed(hub: Hub, tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    HfApi().create_repo(REPO, private=True)
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    url = hf_hub_url(REPO, "model-00001-of-00002.safetensors")
    location = get_hf_file_metadata(url, token="hf_owner").location
    assert location.startswith(f"http://127.0.0.1:{hub.port}/cdn/")
    assert httpx2.get(location).status_code == 200
    assert httpx2.get(location.replace("signature=", "signature=0")).status_code == 403
    assert httpx2.get(location.partition("?")[0]).status_code == 403


def test_everything_sent_is_recorded(hub: Hub) -> None:
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"in git itself", path_in_repo="a.txt")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"in LFS" * 20, path_in_repo="a.bin")
    assert any("decoded" in path.name for path in hub.traffic.holding(b"in git itself"))
    assert any("PUT" in path.name for path in hub.traffic.holding(b"in LFS" * 20))
    assert hub.traffic.holding(b"POST /api/repos/create HTTP/1.1\r\n")
    assert not hub.traffic.holding(b"never sent")
    assert hub.traffic.bytes_in("^PUT") == 120


def test_restart_goes_on(tmp_path: Path) -> None:
    files = make_folder(tmp_path / "model")
    for run in range(2):
        with Hub(tmp_path / "server") as hub, pytest.MonkeyPatch.context() as patch:
            point_clients(patch, hub, tmp_path / f"home-{run}")
            if run == 0:
                HfApi().create_repo(REPO)
                HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
            else:
                assert clone(hub, "main") == files
        forget_connections()


def test_own_process_and_command_line(tmp_path: Path) -> None:
    files = make_folder(tmp_path / "model")
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "tests.hub.server",
        "--folder",
        str(tmp_path / "server"),
        "--part-bytes",
        "1048576",
    ]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            variables = {
                **os.environ,
                "HF_ENDPOINT": server.stdout.readline().strip(),
                "HF_TOKEN": "hf_owner",
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_UPDATE_CHECK": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            }
            hf = str(Path(sys.executable).with_name("hf"))
            for arguments in (
                ["upload", REPO, str(tmp_path / "model"), ".", "--private"],
                ["download", REPO, "--local-dir", str(tmp_path / "back")],
            ):
                done = subprocess.run([hf, *arguments], env=variables, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, done.stderr
            assert read_folder(tmp_path / "back") == files
        finally:
            server.terminate()


def test_offline_again_after_the_fixture(tmp_path: Path) -> None:
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "a.txt", cache_dir=tmp_path)
