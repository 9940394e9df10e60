"""Push to S3 and read from it: a reader sees the old version or the new one, whole, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recording_proxy import recording
from s3_servers import ENVIRONMENT, make_save, moto_s3, reset

from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.delivery.fetching import BLOCK_BYTES, WORK_NAME, fetch_all
from hf_wmguard.delivery.parcel import Parcel, pack
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.delivery.s3 import push_to_s3
from hf_wmguard.errors import ExposureError, ManifestError, NotFoundError, OwnershipError, StoreError
from hf_wmguard.evidence.manifest import MANIFEST_NAME
from hf_wmguard.keys import OwnerKey, write_key_pair
from hf_wmguard.stores.location import Location, parse_location
from hf_wmguard.stores.opening import open_store
from hf_wmguard.stores.s3 import S3Options, S3Store, s3_client
from hf_wmguard.stores.s3_pointer import KEPT, POINTER_NAME
from hf_wmguard.suspects.plaintext import PlaintextFinder

PART_BYTES = 5 << 20
WHERE = parse_location("s3://models/acme/tiny")
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
AWS = shutil.which("aws")
# Where it makes no difference whether the bucket keeps versions.
either = pytest.mark.parametrize("s3", ["unversioned"], indirect=True)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with moto_s3() as address:
        yield address


@pytest.fixture(params=["unversioned", "versioned"])
def s3(request: pytest.FixtureRequest, server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client, with an empty bucket that does or does not keep versions."""
    endpoint = f"http://{server[0]}:{server[1]}"
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": endpoint}.items():
        monkeypatch.setenv(name, value)
    client = s3_client()
    reset(server)
    client.create_bucket(Bucket="models")
    if request.param == "versioned":
        client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    yield client
    client.close()


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Folders old, new and sharded of one owner's model, other of another owner, and the weights of all."""
    root = tmp_path_factory.mktemp("saves")
    for name in ("owner", "stranger"):
        OwnerKey.generate().write(root / name)
    identity = generate_identity()
    write_key_pair(root / "reader", identity.to_text().encode(), identity.recipient().to_text().encode())
    weights = {}
    for seed, (name, owner, shards) in enumerate(
        [("old", "owner", 1), ("new", "owner", 1), ("sharded", "owner", 2), ("other", "stranger", 1)]
    ):
        made = make_save(root, name, seed=seed, owner=root / owner, reader=root / "reader", shards=shards)
        weights |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    return root, weights


def push(folder: Path, **options: Any) -> Pushed:
    return push_to_s3(pack(folder), WHERE, part_bytes=PART_BYTES, threads=2, **options)


def read(folder: Path, where: Location = WHERE) -> Parcel:
    """Fetch what readers see, and check it as whoever loads it does."""
    folder.mkdir()
    with open_store(where) as store:
        fetch_all(store, store.files(), folder, threads=2)
    return pack(folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keys(client: Any) -> set[str]:
    found = client.list_objects_v2(Bucket="models").get("Contents", ())
    return {one["Key"].removeprefix("acme/tiny/") for one in found}


def uploads(client: Any) -> list[Any]:
    found: list[Any] = client.list_multipart_uploads(Bucket="models").get("Uploads", [])
    return found


def test_readers_get_what_was_pushed(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    seen: dict[str, int] = {}
    pushed = push(root / "old", progress=lambda name, size: seen.update({name: seen.get(name, 0) + size}))
    assert bytes_of(root / "old").keys() == set(pushed.files) == seen.keys()
    assert sum(seen.values()) == pushed.size_bytes
    assert (pushed.skipped, pushed.unchecked, pushed.notes, pushed.uri) == ((), (), (), str(WHERE))
    read(tmp_path / "got")
    assert bytes_of(tmp_path / "got") == bytes_of(root / "old")
    # The canonical names are there for tools that know no pointer, and nothing else is.
    assert keys(s3) == {*pushed.files, POINTER_NAME}
    assert uploads(s3) == []


def test_the_same_again_sends_nothing(s3: Any, saves: Any) -> None:
    root, _ = saves
    first = push(root / "old")
    versions = s3.list_object_versions(Bucket="models")["Versions"]
    again = push(root / "old")
    assert (again.revision, again.skipped) == (first.revision, first.files)
    assert s3.list_object_versions(Bucket="models")["Versions"] == versions


def test_a_running_reader_finishes_while_two_pushes_pass(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    push(root / "old")
    (tmp_path / "got").mkdir()
    with S3Store(WHERE) as store:
        fetch_all(store, [MANIFEST_NAME], tmp_path / "got")
        push(root / "sharded")
        fetch_all(store, store.files(), tmp_path / "got")
        assert bytes_of(tmp_path / "got") == bytes_of(root / "old")
    assert bytes_of(root / "sharded").keys() | {POINTER_NAME} == {k for k in keys(s3) if not k.startswith(KEPT)}
    push(root / "new")
    read(tmp_path / "then")
    assert bytes_of(tmp_path / "then") == bytes_of(root / "new")
    kept = {key.split("/")[1] for key in keys(s3) if key.startswith(KEPT)}
    assert len(kept) <= 1, "one version back and no more"
    assert {key for key in keys(s3) if not key.startswith(KEPT)} == {*bytes_of(root / "new"), POINTER_NAME}


def test_of_two_pushes_one_is_told(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    push(root / "old")
    passed = threading.Event()

    def meanwhile(name: str, size_bytes: int) -> None:
        if not passed.is_set():
            passed.set()
            push(root / "sharded")

    with pytest.raises(StoreError, match=r"somebody else pushed|lost an upload") as caught:
        push(root / "new", progress=meanwhile)
    assert caught.value.hint
    read(tmp_path / "got")
    assert bytes_of(tmp_path / "got") == bytes_of(root / "sharded")
    push(root / "new")
    read(tmp_path / "then")
    assert bytes_of(tmp_path / "then") == bytes_of(root / "new")
    assert uploads(s3) == []


def test_an_object_replaced_by_hand_is_never_mixed_in(s3: Any, saves: Any) -> None:
    root, _ = saves
    push(root / "old")
    versioned = s3.get_bucket_versioning(Bucket="models").get("Status") == "Enabled"
    with S3Store(WHERE) as store:
        s3.put_object(Bucket="models", Key=WHERE.key("model.safetensors"), Body=bytes(1 << 20))
        buffer = bytearray(64)
        if versioned:
            store.read_into("model.safetensors", 100, memoryview(buffer))
            assert buffer == (root / "old" / "model.safetensors").read_bytes()[100:164]
        else:
            with pytest.raises(StoreError, match="replaced or deleted"):
                store.read_into("model.safetensors", 100, memoryview(buffer))
    push(root / "old")
    with S3Store(WHERE) as store:
        store.read_into("model.safetensors", 100, memoryview(buffer))
        assert buffer == (root / "old" / "model.safetensors").read_bytes()[100:164]
        with pytest.raises(StoreError, match="asked for"):
            store.read_into("model.safetensors", store.files()["model.safetensors"].size_bytes - 1, memoryview(buffer))
        with pytest.raises(NotFoundError):
            store.read_into("no.safetensors", 0, memoryview(buffer))


def test_a_folder_without_a_pointer_is_read_as_it_is(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    with pytest.raises(NotFoundError, match="nothing is at"):
        open_store(WHERE)
    for name, data in bytes_of(root / "old").items():
        s3.put_object(Bucket="models", Key=WHERE.key(name), Body=data)
    s3.put_object(Bucket="models", Key=WHERE.key("elsewhere/model.safetensors"), Body=b"another model")
    with open_store(WHERE) as store:
        assert store.files().keys() == {*bytes_of(root / "old"), "elsewhere/model.safetensors"}
    push(root / "new")
    read(tmp_path / "got")
    assert bytes_of(tmp_path / "got") == bytes_of(root / "new")
    assert "elsewhere/model.safetensors" in keys(s3)


@either
def test_another_owners_model_stays(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    push(root / "other")
    with pytest.raises(OwnershipError, match="acme/tiny signed by"):
        push(root / "new")
    push(root / "new", replace_other=True)
    read(tmp_path / "got")
    assert bytes_of(tmp_path / "got") == bytes_of(root / "new")


@either
def test_files_that_are_no_protected_model_stay(s3: Any, saves: Any) -> None:
    root, _ = saves
    s3.put_object(Bucket="models", Key=WHERE.key("model.safetensors"), Body=b"plain")
    with pytest.raises(OwnershipError, match="no protected model"):
        push(root / "new")
    push(root / "new", replace_other=True)
    assert not [key for key in keys(s3) if key.startswith(KEPT)], "no copy of what may be plaintext"


@either
def test_file_changed_during_the_push(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    push(root / "old")
    shutil.copytree(root / "new", tmp_path / "new")
    parcel = pack(tmp_path / "new")
    with (tmp_path / "new" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    with pytest.raises(ManifestError, match=r"model.safetensors was changed"):
        push_to_s3(parcel, WHERE, part_bytes=PART_BYTES, threads=2)
    assert uploads(s3) == []
    with (tmp_path / "new" / "model.safetensors").open("r+b") as file:
        file.truncate(7_000_000)
    with pytest.raises(ManifestError, match=r"model.safetensors was changed"):
        push_to_s3(parcel, WHERE, part_bytes=PART_BYTES, threads=2)
    assert uploads(s3) == []
    shutil.copy(root / "new" / "model.safetensors", tmp_path / "new")
    parcel = pack(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"config.json was changed"):
        push_to_s3(parcel, WHERE, part_bytes=PART_BYTES, threads=2)
    read(tmp_path / "got")
    assert bytes_of(tmp_path / "got") == bytes_of(root / "old")


def test_an_interrupted_push_sends_only_what_is_missing(s3: Any, saves: Any, server: Any, tmp_path: Path) -> None:
    root, _ = saves
    parts = []

    def stop(name: str, size_bytes: int) -> None:
        parts.append(size_bytes)
        if len(parts) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(root / "old", progress=stop)
    assert len(uploads(s3)) == 1
    with pytest.raises(NotFoundError):
        open_store(WHERE)
    with recording(server) as proxy:
        push(root / "old", options=S3Options(endpoint_url=f"http://127.0.0.1:{proxy.port}"))
        assert proxy.size_bytes < 12_000_000 - 2 * PART_BYTES + 200_000
    read(tmp_path / "got")
    assert bytes_of(tmp_path / "got") == bytes_of(root / "old")
    assert uploads(s3) == []


@either
def test_no_plaintext_on_the_wire(s3: Any, saves: Any, server: Any, tmp_path: Path) -> None:
    root, weights = saves
    finder = PlaintextFinder(weights)
    with recording(server) as proxy:
        options = S3Options(endpoint_url=f"http://127.0.0.1:{proxy.port}")
        for name in ("old", "new"):
            push(root / name, options=options)
        (tmp_path / "got").mkdir()
        with S3Store(WHERE, options=options) as store:
            fetch_all(store, store.files(), tmp_path / "got", threads=2)
    assert proxy.size_bytes > 36_000_000
    assert [finder.count(bytes(stream)) for stream in proxy.streams] == [0] * len(proxy.streams)
    assert finder.count((root / "old-plain" / "model.safetensors").read_bytes()) > 0
    assert all(ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode() not in stream for stream in proxy.streams)


@either
def test_public_buckets_are_refused(s3: Any, saves: Any) -> None:
    root, _ = saves
    s3.put_bucket_acl(Bucket="models", ACL="public-read")
    with pytest.raises(ExposureError, match="everybody") as caught:
        push(root / "old")
    assert "nothing was sent" in caught.value.message
    assert keys(s3) == set()
    assert uploads(s3) == []
    push(root / "old", allow_public=True)
    closed = {"IgnorePublicAcls": True, "BlockPublicAcls": True, "BlockPublicPolicy": True}
    s3.put_public_access_block(Bucket="models", PublicAccessBlockConfiguration=closed)
    push(root / "new")


@either
def test_public_policy_is_refused(s3: Any, saves: Any) -> None:
    root, _ = saves
    statement = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::models/*"}
    s3.put_bucket_policy(Bucket="models", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    with pytest.raises(ExposureError, match="policy is public"):
        push(root / "old")


@either
def test_kms_key_is_used_for_everything(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    push(root / "old", kms_key="alias/models")
    push(root / "new", kms_key="alias/models")
    for key in keys(s3):
        assert s3.head_object(Bucket="models", Key=WHERE.key(key))["ServerSideEncryption"] == "aws:kms", key
    read(tmp_path / "got")


@either
def test_an_interrupted_fetch_goes_on(s3: Any, saves: Any, server: Any, tmp_path: Path) -> None:
    root, _ = saves
    push(root / "old")
    folder = tmp_path / "got"
    folder.mkdir()
    told = []

    def stop(name: str, size_bytes: int) -> None:
        if size_bytes == BLOCK_BYTES:
            raise KeyboardInterrupt

    with S3Store(WHERE) as store:
        with pytest.raises(KeyboardInterrupt):
            fetch_all(store, ["model.safetensors", "config.json"], folder, stop, threads=1)
        assert (folder / WORK_NAME).is_dir()
    with (
        recording(server) as proxy,
        S3Store(WHERE, options=S3Options(endpoint_url=f"http://127.0.0.1:{proxy.port}")) as store,
    ):
        fetch_all(store, store.files(), folder, lambda *one: told.append(one), threads=2)
        assert sum(map(len, proxy.streams)) < 12_000_000 - BLOCK_BYTES + 200_000
    assert sum(size for _, size in told) == pack(folder).size_bytes
    assert not (folder / WORK_NAME).exists()
    assert bytes_of(folder) == bytes_of(root / "old")


@pytest.mark.awscli
@pytest.mark.skipif(AWS is None, reason="needs the AWS command line on the PATH")
def test_the_aws_command_line_reads_what_we_wrote(s3: Any, saves: Any, tmp_path: Path) -> None:
    root, _ = saves
    for name, command in (("sharded", ["sync"]), ("new", ["cp", "--recursive"])):
        push(root / name)
        words = [str(AWS), "s3", *command, str(WHERE), str(tmp_path / name)]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        parcel = pack(tmp_path / name)
        assert {file: (tmp_path / name / file).read_bytes() for file in parcel.names} == bytes_of(root / name)
        assert set(parcel.left_out) == {POINTER_NAME}


# One process imports everything once; its forks push until they are killed.
_UNTIL_KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.delivery.fetching import fetch_all
from hf_wmguard.delivery.parcel import pack
from hf_wmguard.delivery.s3 import push_to_s3
from hf_wmguard.errors import NotFoundError
from hf_wmguard.stores.location import parse_location
from hf_wmguard.stores.s3 import S3Store, s3_client

root, work, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
where = parse_location("s3://models/acme/tiny")
parcels = [pack(root / name) for name in ("old", "sharded", "new")]

def push(parcel):
    return push_to_s3(parcel, where, part_bytes=5 << 20, threads=2)

def seen(label):
    folder = work / label
    folder.mkdir()
    try:
        with S3Store(where) as store:
            fetch_all(store, store.files(), folder, threads=2)
    except NotFoundError:
        return None
    # Everything is checked, byte by byte, and no file of another version is there.
    return pack(folder).manifest.set_id

client = s3_client()
random.seed(seed)
before, times, found = None, [], []
for number in range(kills):
    parcel = parcels[number % 3]
    child = os.fork()
    if child == 0:
        push(parcel)
        os._exit(0)
    time.sleep(random.uniform(0.0, 1.0) * (sorted(times)[len(times) // 2] if times else 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = len(client.list_multipart_uploads(Bucket="models").get("Uploads", []))
    set_id = seen(f"killed-{number}")
    assert set_id in (before, parcel.manifest.set_id), (number, set_id)
    begin = time.perf_counter()
    pushed = push(parcel)
    times.append(time.perf_counter() - begin)
    assert pushed.notes == (), pushed.notes
    before = parcel.manifest.set_id
    assert seen(f"next-{number}") == before
    assert "Uploads" not in client.list_multipart_uploads(Bucket="models"), number
    listed = {one["Key"] for one in client.list_objects_v2(Bucket="models")["Contents"]}
    names = {where.key(name) for name in (*parcel.names, "wmguard_current.json")}
    assert {key for key in listed if ".wmguard-saves" not in key} == names, number
    found.append({"new": set_id == before, "uploads": left, "skipped": len(pushed.skipped)})
client.close()
print(json.dumps(found))
"""


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=SLOW)])
def test_killed_pushes_leave_the_old_or_the_new_version(s3: Any, saves: Any, tmp_path: Path, kills: int) -> None:
    root, _ = saves
    done = subprocess.run(
        [sys.executable, "-c", _UNTIL_KILLED, str(root), str(tmp_path), str(kills), "7"],
        check=False,
        capture_output=True,
        text=True,
        timeout=3000,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kills
    if kills > 6:
        # Kills came before, in the middle and after: the test tests something.
        assert any(one["uploads"] for one in found)
        assert any(one["skipped"] for one in found)
