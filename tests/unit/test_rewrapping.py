"""Who can open a folder changes, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_wmguard.container.recipients import (
    Identity,
    Stanza,
    WrapContext,
    X25519Identity,
    dek_commitment,
    generate_identity,
    seal_recipients,
)
from hf_wmguard.container.symmetric import RawKey
from hf_wmguard.errors import AuthenticationError, FormatError, ManifestError, NotFoundError, UsageError
from hf_wmguard.evidence.manifest import RECIPIENTS_NAME, FileEntry, Manifest, read_manifest, write_manifest
from hf_wmguard.keys import OwnerKey, write_key_pair, write_new_file
from hf_wmguard.rewrapping import list_recipients, rewrap
from hf_wmguard.suspects.protected import open_dek

DEK = bytes(range(32))
OWNER = OwnerKey(bytes(range(1, 33)))
ANNA = X25519Identity.from_bytes(b"anna" * 8)


def write_folder(folder: Path, *others: X25519Identity, dek: bytes = DEK, set_id: str = "5e" * 16) -> Path:
    """Write manifest and recipients; the weights are named, and are not there: nothing may read them."""
    folder.mkdir()
    recipients = [X25519Identity.from_owner(OWNER).recipient(), *(one.recipient() for one in others)]
    (folder / RECIPIENTS_NAME).write_bytes(seal_recipients(dek, recipients, set_id=set_id, model_id="acme/triage"))
    manifest = Manifest(
        model_id="acme/triage",
        iteration="1",
        set_id=set_id,
        created="2026-01-31T12:00:00Z",
        step=None,
        state="complete",
        files=(FileEntry(name="model.safetensors", size_bytes=16_000_000_000, sha256="0" * 64),),
        dek_commitment=dek_commitment(dek, set_id),
        commitment=None,
        commitment_time=None,
        signature=None,
        triggers=None,
        sealed_state=None,
    )
    write_manifest(folder, manifest, OWNER)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", ANNA)


@pytest.fixture
def bert(tmp_path: Path) -> X25519Identity:
    identity = generate_identity()
    write_key_pair(tmp_path / "bert", identity.to_text().encode(), identity.recipient().to_text().encode())
    return identity


def opens(folder: Path, identity: Identity) -> bool:
    manifest, _ = read_manifest(folder)
    try:
        return open_dek(folder, manifest, (identity,)) == DEK
    except AuthenticationError:
        return False


def names(folder: Path) -> list[str]:
    return [one["recipient"] for one in list_recipients(folder)]


def test_one_comes_and_one_goes(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECIPIENTS_NAME}
    owner = X25519Identity.from_owner(OWNER)
    done = rewrap(folder, identity=ANNA, add=[f"file:{tmp_path}/bert.pub"], remove=[ANNA.recipient().key_id])
    assert (done.added, done.removed) == ((bert.recipient().key_id,), (ANNA.recipient().key_id,))
    assert done.recipients == list_recipients(folder)
    assert names(folder) == [owner.recipient().key_id, bert.recipient().key_id]
    assert [opens(folder, one) for one in (owner, ANNA, bert)] == [True, False, True]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECIPIENTS_NAME}


def test_by_reference(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    write_new_file(tmp_path / "raw", bytes(range(32)), mode=0o600)
    write_new_file(tmp_path / "anna", ANNA.to_text().encode(), mode=0o600)
    raw = f"rawkey:file:{tmp_path}/raw"
    rewrap(folder, identity=f"file:{tmp_path}/anna", add=[raw, f"file:{tmp_path}/bert.pub"])
    assert opens(folder, RawKey(bytes(range(32))))
    rewrap(folder, identity=raw, remove=[f"file:{tmp_path}/bert.pub"])
    assert not opens(folder, bert)


def test_who_is_there_already_keeps_the_stanza(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    public = f"file:{tmp_path}/bert.pub"
    rewrap(folder, identity=ANNA, add=[public])
    before = (folder / RECIPIENTS_NAME).read_bytes()
    assert rewrap(folder, identity=ANNA, add=[public, public]).added == ()
    assert (folder / RECIPIENTS_NAME).read_bytes() == before
    done = rewrap(folder, identity=ANNA, add=[public], remove=[public])
    assert done.added == done.removed == (bert.recipient().key_id,)
    assert (folder / RECIPIENTS_NAME).read_bytes() != before
    assert opens(folder, bert)


def test_the_owner_stays_unless_told(folder: Path) -> None:
    owner = names(folder)[0]
    with pytest.raises(UsageError, match="who is the owner unless"):
        rewrap(folder, identity=ANNA, remove=[owner])
    rewrap(folder, identity=ANNA, remove=[owner], remove_owner=True)
    assert names(folder) == [ANNA.recipient().key_id]
    with pytest.raises(UsageError, match="last recipient"):
        rewrap(folder, identity=ANNA, remove=names(folder), remove_owner=True)
    assert opens(folder, ANNA)


def test_a_key_that_no_owner_has_is_no_owners(folder: Path, tmp_path: Path) -> None:
    raw = RawKey(bytes(range(32)))
    sealed = seal_recipients(DEK, [raw, ANNA.recipient()], set_id="5e" * 16, model_id="acme/triage")
    (folder / RECIPIENTS_NAME).write_bytes(sealed)
    rewrap(folder, identity=ANNA, remove=[raw.key_id])
    assert names(folder) == [ANNA.recipient().key_id]


def test_what_is_refused_changes_nothing(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    public = f"file:{tmp_path}/bert.pub"
    stranger = tmp_path / "stranger.pub"
    stranger.write_bytes(OwnerKey.generate().public_pem())
    before = (folder / RECIPIENTS_NAME).read_bytes()
    for kind, options in (
        (UsageError, {"identity": ANNA}),
        (UsageError, {"identity": ANNA, "remove": [public]}),
        (AuthenticationError, {"identity": bert, "add": [public]}),
        (NotFoundError, {"identity": ANNA, "add": [public, f"file:{tmp_path}/none.pub"]}),
        (ManifestError, {"identity": ANNA, "add": [public], "signer": f"file:{stranger}"}),
    ):
        with pytest.raises(kind):
            rewrap(folder, **options)
        assert (folder / RECIPIENTS_NAME).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [RECIPIENTS_NAME, "wmguard_manifest.json", "wmguard_manifest.sig.json"]
    )


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        rewrap(tmp_path / "none", identity=ANNA, remove=["x"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError):
        rewrap(tmp_path / "empty", identity=ANNA, remove=["x"])
    with pytest.raises(NotFoundError):
        list_recipients(tmp_path / "empty")


def test_the_recipients_of_another_save(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", ANNA, dek=b"o" * 32)
    (folder / RECIPIENTS_NAME).write_bytes((other / RECIPIENTS_NAME).read_bytes())
    with pytest.raises(ManifestError, match="another save"):
        rewrap(folder, identity=ANNA, add=[f"file:{tmp_path}/bert.pub"])


def test_a_changed_list_is_not_sealed_again(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    """Whoever adds a stanza by hand must not get our MAC over it."""
    document = json.loads((folder / RECIPIENTS_NAME).read_bytes())
    smuggled = bert.recipient().wrap(bytes(32), WrapContext(set_id="5e" * 16, model_id="acme/triage"))
    document["stanzas"].append(smuggled)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (folder / RECIPIENTS_NAME).write_text(text)
    with pytest.raises(AuthenticationError, match="changed by somebody"):
        rewrap(folder, identity=ANNA, remove=[smuggled["recipient"]])
    (folder / RECIPIENTS_NAME).write_text(text[:-1])
    with pytest.raises(FormatError):
        rewrap(folder, identity=ANNA, remove=[smuggled["recipient"]])


def test_two_at_once_both_count(folder: Path, tmp_path: Path) -> None:
    added = []
    for number in range(6):
        identity = generate_identity()
        (tmp_path / f"{number}.pub").write_text(identity.recipient().to_text())
        added.append(identity)
    threads = [
        threading.Thread(target=rewrap, args=(folder,), kwargs={"identity": ANNA, "add": [f"file:{tmp_path}/{n}.pub"]})
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(opens(folder, one) for one in added)


def test_a_save_that_comes_between_keeps_its_recipients(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", ANNA, dek=b"o" * 32, set_id="0a" * 16)

    class Slow:
        """Whoever unwraps takes so long that the folder is another one afterwards."""

        def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
            for path in other.iterdir():
                shutil.copy(path, folder)
            return ANNA.unwrap(stanza, context)

    with pytest.raises(ManifestError, match="saved again meanwhile"):
        rewrap(folder, identity=Slow(), add=[f"file:{tmp_path}/bert.pub"])
    assert (folder / RECIPIENTS_NAME).read_bytes() == (other / RECIPIENTS_NAME).read_bytes()


def test_what_is_authenticated_is_what_is_sealed_again(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    smuggled = bert.recipient().wrap(bytes(32), WrapContext(set_id="5e" * 16, model_id="acme/triage"))

    class Slow:
        """While it unwraps, somebody adds a stanza by hand."""

        def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
            document = json.loads((folder / RECIPIENTS_NAME).read_bytes())
            document["stanzas"] = [*document["stanzas"][:2], smuggled]
            text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            (folder / RECIPIENTS_NAME).write_text(text)
            return ANNA.unwrap(stanza, context)

    write_new_file(tmp_path / "raw", bytes(range(32)), mode=0o600)
    rewrap(folder, identity=Slow(), add=[f"rawkey:file:{tmp_path}/raw"])
    assert smuggled["recipient"] not in names(folder)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.write_bytes(b" " * ((1 << 20) + 1))


@pytest.mark.parametrize("make", [_fifo, Path.mkdir, _endless])
def test_recipients_that_are_no_file(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / RECIPIENTS_NAME).unlink()
    make(folder / RECIPIENTS_NAME)
    manifest, _ = read_manifest(folder)
    for read in (
        lambda: rewrap(folder, identity=ANNA, remove=["x"]),
        lambda: open_dek(folder, manifest, (ANNA,)),
        lambda: list_recipients(folder),
    ):
        with pytest.raises(FormatError) as caught:
            read()
        assert caught.value.hint


def test_a_reader_sees_the_old_or_the_new(folder: Path, bert: X25519Identity, tmp_path: Path) -> None:
    inode = (folder / RECIPIENTS_NAME).stat().st_ino
    with (folder / RECIPIENTS_NAME).open("rb") as held:
        rewrap(folder, identity=ANNA, add=[f"file:{tmp_path}/bert.pub"])
        assert bert.recipient().key_id.encode() not in held.read()
    assert (folder / RECIPIENTS_NAME).stat().st_ino != inode
