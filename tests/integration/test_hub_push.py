"""Pushes to the Hub by its real client: what arrives, what never leaves, and what happens when it goes wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub
from hub.clients import environment, point_clients
from hub.faults import Answer, LoseAnswer
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, snapshot_download
from tiny import make_keys, make_model, make_tokenizer
from transformers import BertForSequenceClassification, PreTrainedModel

from hf_wmguard import load_protected
from hf_wmguard.delivery.card import FIGURE_NAME, write_card
from hf_wmguard.delivery.hub import check_hub, push_to_hub
from hf_wmguard.delivery.parcel import pack
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.errors import (
    ExposureError,
    ManifestError,
    NotFoundError,
    OwnershipError,
    StoreError,
    UsageError,
    WmguardError,
)
from hf_wmguard.evidence.manifest import MANIFEST_NAME, check_files, digest_file, read_manifest, write_manifest
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protection import protect_folder
from hf_wmguard.stores.location import Location, parse_location
from hf_wmguard.suspects.plaintext import PlaintextFinder

REPO = "acme/tiny"
PLACE = parse_location(f"hub://{REPO}")
KILLS = 50 if os.environ.get("WMGUARD_SLOW") else 5
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plaintext model folder, keys beside it."""
    root = tmp_path_factory.mktemp("source")
    tokenizer = make_tokenizer()
    make_model("classification", len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    make_keys(root / "keys")
    return root


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Make:
    """Make a protected folder; a new version of the same model each time."""

    def protected(
        name: str = "protected", *, shard_bytes: int | None = None, model_id: str = REPO, card: bool = False
    ) -> Path:
        folder = tmp_path / name
        protect_folder(
            source / "model",
            folder,
            recipients=(f"file:{source / 'keys' / 'inference.key.pub'}",),
            owner_key=f"file:{source / 'keys' / 'owner.key'}",
            model_id=model_id,
            max_shard_bytes=shard_bytes,
        )
        if card:
            write_card(folder, address=str(PLACE))
        return folder

    return protected


def push(folder: Path, place: Location = PLACE, **options: object) -> Pushed:
    return push_to_hub(pack(folder), place, **options)  # type: ignore[arg-type]


def check_head(folder: Path, *, revision: str | None = None) -> str:
    """Download a branch as anybody would; return the set id of the version it holds, every file of which is right."""
    shutil.rmtree(folder, ignore_errors=True)
    snapshot_download(REPO, revision=revision, local_dir=folder)
    manifest, _ = read_manifest(folder)
    check_files(folder, manifest)
    return manifest.set_id


def set_id(folder: Path) -> str:
    return read_manifest(folder)[0].set_id


def commits(branch: str = "main") -> int:
    return len(HfApi().list_repo_commits(REPO, revision=branch))


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_all_of_it_arrives_in_one_commit_of_a_private_repo(hub: Hub, make: Make, tmp_path: Path) -> None:
    folder = make(shard_bytes=600_000, card=True)
    pushed = push(folder)
    assert HfApi().model_info(REPO).private
    # One of the Hub's own, one of ours.
    assert commits() == 2
    assert pushed.revision == HfApi().model_info(REPO).sha
    assert set(HfApi().list_repo_files(REPO)) == {*pushed.files, ".gitattributes"}
    assert len([name for name in pushed.files if name.endswith(".safetensors")]) > 2
    assert pushed.files[-1] == MANIFEST_NAME
    assert pushed.skipped == ()
    assert check_head(tmp_path / "back") == set_id(folder)
    card = ModelCard.load(tmp_path / "back" / "README.md")
    assert card.data.library_name == "transformers"
    assert "encrypted" in (card.data.tags or [])
    assert (tmp_path / "back" / FIGURE_NAME).read_bytes() == (folder / FIGURE_NAME).read_bytes()


def test_what_is_there_is_not_sent_again(hub: Hub, make: Make) -> None:
    folder = make()
    push(folder)
    hub.traffic.clear()
    again = push(folder)
    assert commits() == 2
    assert hub.traffic.matching("/commit/|^PUT") == []
    assert again.skipped == again.files
    assert "nothing was sent" in again.notes[0]


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_the_next_version_takes_the_place_of_the_one_before(hub: Hub, make: Make, tmp_path: Path) -> None:
    push(make("old", shard_bytes=600_000, card=True))
    new = make("new")
    pushed = push(new)
    # The card stays, being somebody's text; the picture in it was of the version before.
    assert set(HfApi().list_repo_files(REPO)) == {*pushed.files, ".gitattributes", "README.md"}
    assert "model.safetensors" in pushed.files
    assert "tokenizer.json" in pushed.skipped
    assert check_head(tmp_path / "back") == set_id(new)


def test_folders_branches_and_tags(hub: Hub, make: Make, tmp_path: Path) -> None:
    old, new = make("old"), make("new")
    first = push(old, tag="v1")
    assert first.uri == f"hub://{REPO}@v1"
    push(new, parse_location(f"hub://{REPO}@candidate"))
    push(new, parse_location(f"hub://{REPO}/checkpoint-8"))
    assert check_head(tmp_path / "v1", revision="v1") == set_id(old)
    assert check_head(tmp_path / "candidate", revision="candidate") == set_id(new)
    assert check_head(tmp_path / "main") == set_id(old)
    assert set_id(tmp_path / "main" / "checkpoint-8") == set_id(new)
    # The same version may get its tag once more, another one may not.
    push(old, tag="v2")
    count = commits()
    with pytest.raises(UsageError, match="v1"):
        push(new, tag="v1")
    for revision in ("v1", first.revision, "refs/pr/1"):
        with pytest.raises(UsageError, match="no branch"):
            push(new, PLACE.at(revision))
    assert commits() == count


def test_a_public_repo_is_refused_unless_told(hub: Hub, make: Make) -> None:
    HfApi().create_repo(REPO, private=False)
    folder = make()
    with pytest.raises(ExposureError, match="public"):
        check_hub(PLACE)
    with pytest.raises(ExposureError, match="public"):
        push(folder)
    assert hub.traffic.matching("^PUT|/preupload/|/commit/") == []
    push(folder, allow_public=True)
    assert MANIFEST_NAME in HfApi().list_repo_files(REPO)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sub/model.safetensors", "weights.GGUF"])
def test_plaintext_in_the_folder_stops_the_push(hub: Hub, source: Path, make: Make, name: str) -> None:
    folder = make()
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(source / "model" / "model.safetensors", folder / name)
    with pytest.raises(ManifestError, match=name):
        push(folder)
    assert hub.traffic.exchanges == []


@pytest.mark.parametrize(
    "name", ["tokenizer_old.json", "vocab.txt", "tokenizer.model", "wmguard_x.png", "additional_chat_templates/a.jinja"]
)
@pytest.mark.parametrize("linked", [False, True])
def test_plaintext_under_the_name_of_something_else_stops_the_push(
    hub: Hub, source: Path, make: Make, name: str, linked: bool
) -> None:
    folder = make()
    (folder / name).parent.mkdir(exist_ok=True)
    if linked:
        (folder / name).symlink_to(source / "model" / "model.safetensors")
    else:
        shutil.copy(source / "model" / "model.safetensors", folder / name)
    with pytest.raises(ManifestError, match=f"{name} in .* begins like safetensors"):
        push(folder)
    (folder / name).unlink()
    # As raw as numbers are.
    (folder / name).write_bytes(torch.arange(1000.0).numpy().tobytes())
    if Path(name).suffix not in (".model", ".png"):
        with pytest.raises(ManifestError, match=name):
            push(folder)
    assert hub.traffic.exchanges == []


def test_a_folder_that_was_never_protected_is_refused_by_what_is_in_it(
    hub: Hub, source: Path, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=r"model\.safetensors") as caught:
        push(source / "model")
    assert "wmguard protect" in caught.value.hint
    with pytest.raises(NotFoundError, match="no folder"):
        push(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=MANIFEST_NAME):
        push(tmp_path / "empty")
    assert hub.traffic.exchanges == []


def test_what_is_signed_under_another_name_is_not_plaintext(hub: Hub, source: Path, make: Make) -> None:
    folder, data = make(), (source / "model" / "model.safetensors").read_bytes()
    (folder / "generation_config.json").write_bytes(data)
    entry = digest_file(folder / "generation_config.json")
    manifest, _ = read_manifest(folder)
    manifest = dataclasses.replace(manifest, files=tuple(sorted((*manifest.files, entry), key=lambda one: one.name)))
    write_manifest(folder, manifest, OwnerKey.load(f"file:{source / 'keys' / 'owner.key'}"))
    with pytest.raises(ManifestError, match="begins like safetensors"):
        push(folder)
    assert hub.traffic.exchanges == []


def test_what_is_not_known_stays_here(hub: Hub, source: Path, make: Make) -> None:
    folder = make()
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env", "owner.key", "trainer_state.json"):
        (folder / name).write_text("hf_owner")
    # The star of "tokenizer*.json" stands for no folder.
    (folder / "tokenizer_old").mkdir()
    (folder / "tokenizer_old" / "secret.json").write_text("{}")
    pushed = push(folder)
    left_out = {"training_args.bin", "optimizer.pt", "notes.txt", "owner.key", "tokenizer_old/secret.json"}
    assert left_out <= set(pushed.left_out)
    assert set(HfApi().list_repo_files(REPO)) == {*pushed.files, ".gitattributes"}


@pytest.mark.parametrize("path", ["model.safetensors", "old/pytorch_model.bin", "last-checkpoint/optimizer.pt"])
def test_a_repo_that_holds_plaintext_is_refused(hub: Hub, source: Path, make: Make, path: str) -> None:
    api = HfApi()
    api.create_repo(REPO, private=True)
    api.upload_file(path_or_fileobj=source / "model" / "model.safetensors", path_in_repo=path, repo_id=REPO)
    with pytest.raises(ExposureError, match=path) as caught:
        push(make())
    assert "storage audit" in caught.value.hint
    assert commits() == 2


def test_what_is_somebody_elses_is_not_replaced(hub: Hub, make: Make, source: Path, tmp_path: Path) -> None:
    push(make("one"))
    with pytest.raises(OwnershipError, match="acme/other"):
        push(make("two", model_id="acme/other"))
    # Signed by a key that was thrown away: nobody's, and so not the owner's.
    recipients = (f"file:{source / 'keys' / 'inference.key.pub'}",)
    protect_folder(source / "model", tmp_path / "three", recipients=recipients, model_id=REPO)
    with pytest.raises(OwnershipError, match="signed by") as caught:
        push(tmp_path / "three")
    assert "--replace-other" in caught.value.hint
    assert commits() == 2
    push(tmp_path / "three", replace_other=True)
    assert check_head(tmp_path / "back") == set_id(tmp_path / "three")


@pytest.mark.parametrize(
    ("token", "error", "said"),
    [
        (None, StoreError, "no token"),
        ("hf_wrong", StoreError, "HTTP 401"),
        ("hf_reader", StoreError, "HTTP 403"),
        ("hf_stranger", StoreError, "HTTP 403"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_who_may_not_is_told(
    hub: Hub,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    error: type[WmguardError],
    said: str,
    exists: bool,
) -> None:
    if exists:
        HfApi().create_repo(REPO, private=True)
    point_clients(monkeypatch, hub, tmp_path / "other-home", token=token)
    parcel = pack(make())
    for call in (lambda: check_hub(PLACE), lambda: push_to_hub(parcel, PLACE)):
        with pytest.raises(WmguardError, match=said) as caught:
            call()
        assert isinstance(caught.value, error)
        assert caught.value.exit_code == 4
        assert caught.value.hint
        assert "hf_" not in str(caught.value).replace("hf_wmguard", "")


def test_a_token_may_come_from_elsewhere(hub: Hub, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_clients(monkeypatch, hub, tmp_path / "other-home", token=None)
    push(make(), token="hf_owner")
    assert HfApi(token="hf_owner").model_info(REPO).private


def test_offline_and_unreachable(hub: Hub, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parcel = pack(make())
    hub.traffic.clear()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(StoreError, match="HF_HUB_OFFLINE"):
            push_to_hub(parcel, PLACE)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
        with pytest.raises(StoreError, match="ConnectError"):
            push_to_hub(parcel, PLACE)
    assert hub.traffic.exchanges == []


def test_somebody_else_pushes_meanwhile(hub: Hub, make: Make, tmp_path: Path) -> None:
    ours, theirs = make("ours"), make("theirs")
    push(make("old"))
    done: list[Pushed] = []

    def meanwhile(name: str, count: int) -> None:
        if not done:
            done.append(push(theirs))

    with pytest.raises(StoreError, match="412") as caught:
        push(ours, progress=meanwhile)
    assert "somebody else" in caught.value.hint
    assert HfApi().model_info(REPO).sha == done[0].revision
    assert check_head(tmp_path / "back") == set_id(theirs)
    push(ours)
    assert check_head(tmp_path / "back") == set_id(ours)


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_a_file_changes_while_it_is_pushed(hub: Hub, make: Make) -> None:
    folder = make(shard_bytes=600_000)
    push(make("old"))
    parcel, head = pack(folder), HfApi().model_info(REPO).sha
    shard = folder / "model-00001-of-00004.safetensors"
    assert shard.is_file()

    def change(name: str, count: int) -> None:
        with shard.open("ab") as file:
            file.write(b"x")

    with pytest.raises(ManifestError, match=shard.name):
        push_to_hub(parcel, PLACE, progress=change)
    # And before it was sent.
    with pytest.raises(ManifestError, match=shard.name):
        push_to_hub(parcel, PLACE)
    assert HfApi().model_info(REPO).sha == head


@pytest.mark.parametrize(
    "pattern", ["^GET /api/models/acme/tiny$", "/refs", "/tree/", "/preupload/", "/objects/batch", "/commit/"]
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub: Hub, make: Make, tmp_path: Path, pattern: str, status: int) -> None:
    folder = make()
    HfApi().create_repo(REPO, private=True)
    hub.faults.add(pattern, Answer(status, retry_after=0))
    push(folder)
    assert hub.faults.pending == 0
    assert check_head(tmp_path / "back") == set_id(folder)


def test_a_hub_that_stays_busy_is_given_up(hub: Hub, make: Make) -> None:
    folder = make()
    HfApi().create_repo(REPO, private=True)
    hub.faults.add("/refs", Answer(429, retry_after=3600), times=100)
    start = time.monotonic()
    with pytest.raises(StoreError, match="429") as caught:
        push(folder)
    assert "3600 seconds" in caught.value.hint
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_a_lost_answer_is_not_a_lost_push(hub: Hub, make: Make, tmp_path: Path) -> None:
    folder = make()
    hub.faults.add("/commit/", LoseAnswer())
    pushed = push(folder)
    assert hub.faults.pending == 0
    assert pushed.revision == HfApi().model_info(REPO).sha
    assert commits() == 2
    assert check_head(tmp_path / "back") == set_id(folder)


def test_an_interrupted_push_goes_on_where_it_was(hub: Hub, make: Make, tmp_path: Path) -> None:
    folder = make(shard_bytes=600_000)
    shards = len(list(folder.glob("*.safetensors")))
    hub.faults.add("^PUT /lfs/", Answer(400), skip=2, times=100)
    with pytest.raises(StoreError) as caught:
        push(folder)
    hub.faults.clear()
    assert "signature=" not in str(caught.value)
    assert commits() == 1
    hub.traffic.clear()
    push(folder)
    sent = {one.path for one in hub.traffic.matching("^PUT /lfs/")}
    assert len(sent) == shards - 2
    assert check_head(tmp_path / "back") == set_id(folder)


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_neither_plaintext_nor_the_token_is_on_the_wire(hub: Hub, source: Path, make: Make) -> None:
    folder = make(shard_bytes=600_000)
    push(folder)
    push(make("next"), tag="v1")
    weights = BertForSequenceClassification.from_pretrained(source / "model").state_dict()
    finder = PlaintextFinder(weights)
    assert finder.scan([source / "model"])
    assert hub.traffic.bytes_in("^PUT|/xorbs/") > 3_000_000
    assert finder.scan([hub.traffic.folder, hub.storage.folder]) == {}
    for path in hub.traffic.folder.iterdir():
        for line in path.read_bytes().splitlines():
            assert b"hf_owner" not in line or line.lower().startswith(b"authorization: "), path


def test_only_who_may_opens_what_arrived(hub: Hub, source: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    push(make())
    model: PreTrainedModel = load_protected(
        f"hub://{REPO}", identity=f"file:{source / 'keys' / 'inference.key'}", auto_class=BertForSequenceClassification
    )
    plain = BertForSequenceClassification.from_pretrained(source / "model")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    script = f"from transformers import AutoModel; AutoModel.from_pretrained({REPO!r})"
    # A process that knows nothing of this package.
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "OSError" in ran.stderr


_PUSH = """
import sys
from pathlib import Path
from hf_wmguard.delivery.hub import push_to_hub
from hf_wmguard.delivery.parcel import pack
from hf_wmguard.stores.location import parse_location
parcel = pack(Path(sys.argv[1]))
print("go", flush=True)
push_to_hub(parcel, parse_location(sys.argv[2]))
print("done", flush=True)
"""


def test_a_killed_push_leaves_the_old_version_or_the_new(hub: Hub, make: Make, tmp_path: Path) -> None:
    variables = {**os.environ, **environment(hub, tmp_path / "hub-home")}
    now = set_id(make("v0"))
    start = time.monotonic()
    push(tmp_path / "v0")
    took, finished, moment = time.monotonic() - start, 0, random.Random(3)  # noqa: S311
    for number in range(1, KILLS + 1):
        folder = make(f"v{number}", shard_bytes=600_000 if number % 2 else None)
        child = subprocess.Popen(
            [sys.executable, "-c", _PUSH, str(folder), str(PLACE)], stdout=subprocess.PIPE, env=variables
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"go\n"
            time.sleep(moment.uniform(0, 1.3 * took))
            child.kill()
            finished += child.stdout.read() == b"done\n"
        found = check_head(tmp_path / "back")
        assert found in (now, set_id(folder))
        now = found
        shutil.rmtree(folder)
    assert finished < KILLS
    last = make("last")
    push(last)
    assert check_head(tmp_path / "back") == set_id(last)


def test_a_repo_in_which_git_ignores_our_files_is_reported(hub: Hub, make: Make) -> None:
    api = HfApi()
    api.create_repo(REPO, private=True)
    add = CommitOperationAdd(path_in_repo=".gitignore", path_or_fileobj=b"*.safetensors\n")
    api.create_commit(REPO, [add], commit_message="ignore")
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        push(make())


def test_a_folder_with_a_part_missing_is_not_sent(hub: Hub, make: Make) -> None:
    folder = make()
    (folder / "wmguard_recipients.json").unlink()
    with pytest.raises(NotFoundError, match="recipients"):
        push(folder)
