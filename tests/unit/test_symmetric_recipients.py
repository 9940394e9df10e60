"""Recipients by raw key, passphrase, keyring and ML-KEM: what opens, what does not, and what a file may ask for."""

from __future__ import annotations

import base64
import copy
import pickle
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked

from hf_wmguard.config import OWNER_SCHEMES, RECIPIENT_SCHEMES
from hf_wmguard.container.asking import asking
from hf_wmguard.container.hybrid import HybridIdentity, HybridRecipient
from hf_wmguard.container.owner import load_owner, write_sealed
from hf_wmguard.container.passphrase import MAX_PASSPHRASE_STANZAS, Cost, Passphrase
from hf_wmguard.container.recipients import (
    RecipientsFile,
    WrapContext,
    X25519Identity,
    load_identity,
    load_recipient,
    open_recipients,
    seal_recipients,
)
from hf_wmguard.container.references import IDENTITIES, RECIPIENTS, SYMMETRIC
from hf_wmguard.container.symmetric import RawKey
from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    FormatError,
    KeyFormatError,
    KeyPermissionError,
    KeyServiceError,
    NotFoundError,
    UsageError,
)
from hf_wmguard.keys import OwnerKey, write_new_file

DEK = bytes(range(32))
SAVE = {"set_id": "5e7", "model_id": "acme/triage"}
CONTEXT = WrapContext(**SAVE)
CHEAP = Cost(memory_kib=19 * 1024, passes=1, lanes=1)
WORDS = "correct horse battery"


class DictKeyring(KeyringBackend):
    """A keyring that forgets."""

    priority = 1  # type: ignore[assignment]
    locked = False

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise KeyringLocked("locked")
        return self.entries.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.entries[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.entries[service, username]


@pytest.fixture
def ring() -> DictKeyring:
    before = keyring.get_keyring()
    ring = DictKeyring()
    keyring.set_keyring(ring)
    yield ring  # type: ignore[misc]
    keyring.set_keyring(before)


KEYS = {
    "hybrid": (HybridIdentity(bytes(range(96))).recipient(), HybridIdentity(bytes(range(96)))),
    "rawkey": (RawKey(b"k" + bytes(31)), RawKey(b"k" + bytes(31))),
    "passphrase": (Passphrase(WORDS, cost=CHEAP), Passphrase(WORDS)),
}
OTHERS = {
    "hybrid": HybridIdentity.generate(),
    "rawkey": RawKey(b"l" + bytes(31)),
    "passphrase": Passphrase("correct horse staple"),
}
each = pytest.mark.parametrize("kind", KEYS)


@each
def test_opens_for_its_own_key_only(kind: str) -> None:
    wrapping, unwrapping = KEYS[kind]
    data = seal_recipients(DEK, [wrapping], **SAVE)
    assert open_recipients(data, [OTHERS[kind], unwrapping], **SAVE) == DEK
    with pytest.raises(AuthenticationError, match="none of 3 identities"):
        open_recipients(data, [OTHERS[kind], X25519Identity.from_bytes(b"anna" * 8), RawKey(bytes(range(32)))])


@each
@pytest.mark.parametrize("other", [{"set_id": "other"}, {"model_id": "acme/other"}])
def test_is_bound_to_its_save(kind: str, other: dict[str, str]) -> None:
    wrapping, unwrapping = KEYS[kind]
    stanza = wrapping.wrap(DEK, CONTEXT)
    assert unwrapping.unwrap(stanza, CONTEXT) == DEK
    with pytest.raises(AuthenticationError, match="another save"):
        unwrapping.unwrap(stanza, WrapContext(**SAVE | other))


@each
def test_is_bound_to_its_kind(kind: str) -> None:
    wrapping, unwrapping = KEYS[kind]
    stanza = wrapping.wrap(DEK, CONTEXT)
    for other in {"x25519", "vault", *KEYS} - {stanza["kind"]}:
        assert unwrapping.unwrap(stanza | {"kind": other}, CONTEXT) is None


@each
def test_every_changed_field_fails(kind: str) -> None:
    wrapping, unwrapping = KEYS[kind]
    stanza = wrapping.wrap(DEK, CONTEXT)
    raw = bytearray(base64.b64decode(stanza["ciphertext"]))
    for position in range(0, len(raw), 1 if kind == "rawkey" else 50):
        raw[position] ^= 1
        with pytest.raises(AuthenticationError):
            unwrapping.unwrap(stanza | {"ciphertext": base64.b64encode(raw).decode()}, CONTEXT)
        raw[position] ^= 1
    for short in ("", "QQ==", stanza["ciphertext"][:40]):
        with pytest.raises(AuthenticationError):
            unwrapping.unwrap(stanza | {"ciphertext": short}, CONTEXT)
    assert unwrapping.unwrap(stanza | {"recipient": "sha256:00"}, CONTEXT) is None


@each
def test_two_wraps_differ(kind: str) -> None:
    wrapping, _ = KEYS[kind]
    assert wrapping.wrap(DEK, CONTEXT)["ciphertext"] != wrapping.wrap(DEK, CONTEXT)["ciphertext"]


@each
def test_shows_and_gives_nothing(kind: str) -> None:
    _, secret = KEYS[kind]
    assert "<secret>" in repr(secret)
    for leak in (lambda: pickle.dumps(secret), lambda: copy.copy(secret), lambda: copy.deepcopy(secret)):
        with pytest.raises(TypeError, match="never pickled"):
            leak()
    assert not hasattr(secret, "__dict__")


# ML-KEM with X25519


def test_hybrid_lines(tmp_path: Path) -> None:
    identity = HybridIdentity.generate()
    write_new_file(tmp_path / "key", identity.to_text().encode(), mode=0o600)
    write_new_file(tmp_path / "key.pub", identity.recipient().to_text().encode(), mode=0o644)
    data = seal_recipients(DEK, [load_recipient(f"file:{tmp_path}/key.pub")], **SAVE)
    assert open_recipients(data, [load_identity(f"file:{tmp_path}/key")]) == DEK
    with pytest.raises(KeyFormatError, match="private identity"):
        load_recipient(f"file:{tmp_path}/key")
    with pytest.raises(KeyFormatError, match="public recipient"):
        HybridIdentity.parse(identity.recipient().to_text())
    with pytest.raises(KeyFormatError):
        HybridIdentity(bytes(96))
    with pytest.raises(KeyFormatError, match="not a usable"):
        HybridRecipient(b"\xff" * 1216)


# Passphrases


def test_the_cost_of_one_guess() -> None:
    assert Cost() == Cost(memory_kib=262144, passes=3, lanes=4)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_kib": "1048577"},
        {"memory_kib": "19455"},
        {"memory_kib": "0"},
        {"memory_kib": "99999999999"},
        {"memory_kib": "+19456"},
        {"memory_kib": " 19456"},
        {"memory_kib": "19_456"},
        {"memory_kib": "٣"},
        {"passes": "11"},
        {"passes": "0"},
        {"passes": "01"},
        {"passes": "9" * 5000},
        {"lanes": "17"},
        {"lanes": "-1"},
        {"salt": "QQ=="},
        {"salt": base64.b64encode(bytes(1000)).decode()},
        {"salt": "*"},
    ],
)
def test_a_file_cannot_ask_for_more(change: dict[str, str]) -> None:
    stanza = KEYS["passphrase"][0].wrap(DEK, CONTEXT)
    data = RecipientsFile.sealed(DEK, CONTEXT, [stanza | change]).encode()
    with pytest.raises(FormatError):
        RecipientsFile.parse(data)
    with pytest.raises(FormatError):
        Passphrase(WORDS).unwrap(stanza | change, CONTEXT)


def test_a_file_holds_few_passphrases() -> None:
    stanza = KEYS["passphrase"][0].wrap(DEK, CONTEXT)
    many = [stanza | {"recipient": str(number)} for number in range(MAX_PASSPHRASE_STANZAS + 1)]
    RecipientsFile.sealed(DEK, CONTEXT, many[1:])
    with pytest.raises(UsageError, match="passphrases"):
        RecipientsFile.sealed(DEK, CONTEXT, many)


def test_unicode_is_normalised() -> None:
    stanza = Passphrase("grüße aus köln", cost=CHEAP).wrap(DEK, CONTEXT)
    assert Passphrase("gru\u0308ße aus ko\u0308ln").unwrap(stanza, CONTEXT) == DEK


@pytest.mark.parametrize("text", ["", "x" * 5000, "\udc80" * 20])
def test_what_is_no_passphrase(text: str) -> None:
    with pytest.raises(KeyFormatError):
        Passphrase(text)


def test_a_short_passphrase_opens_but_does_not_wrap() -> None:
    with pytest.raises(KeyFormatError, match="expected 8 or more") as caught:
        Passphrase("hunter2", cost=CHEAP).wrap(DEK, CONTEXT)
    assert "hunter2" not in str(caught.value)


def test_passphrase_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_new_file(tmp_path / "words", f"{WORDS}\n".encode(), mode=0o600)
    monkeypatch.setenv("WMGUARD_TEST_WORDS", WORDS)
    data = seal_recipients(DEK, [load_recipient("passphrase:env:WMGUARD_TEST_WORDS")], **SAVE)
    assert '"lanes":"4","memory_kib":"262144","passes":"3"' in data.decode().replace('"kind":"passphrase",', "")
    assert open_recipients(data, [load_identity(f"passphrase:file:{tmp_path}/words")]) == DEK
    asked = []

    def answer(what: str, new: bool) -> str:
        asked.append((what, new))
        return WORDS

    with asking(answer):
        load_recipient("passphrase:prompt")
        assert open_recipients(data, [load_identity("passphrase:prompt")]) == DEK
    assert asked == [("passphrase", True), ("passphrase", False)]


def test_passphrase_references_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WMGUARD_TEST_WORDS", raising=False)
    write_new_file(tmp_path / "open", WORDS.encode(), mode=0o644)
    write_new_file(tmp_path / "binary", b"\xff\xfe", mode=0o600)
    for rest, kind in (
        ("prompt", ConfigError),
        (WORDS, ConfigError),
        ("env:WMGUARD_TEST_WORDS", NotFoundError),
        (f"file:{tmp_path}/none", NotFoundError),
        (f"file:{tmp_path}/open", KeyPermissionError),
        (f"file:{tmp_path}/binary", KeyFormatError),
    ):
        with pytest.raises(kind) as caught:
            load_identity(f"passphrase:{rest}")
        assert WORDS not in str(caught.value)


# Raw keys and the keyring


def test_raw_key_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_new_file(tmp_path / "key", DEK, mode=0o600)
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(DEK).decode())
    data = seal_recipients(b"d" * 32, [load_recipient(f"rawkey:file:{tmp_path}/key")], **SAVE)
    assert open_recipients(data, [load_identity("rawkey:env:WMGUARD_TEST_KEY")]) == b"d" * 32
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(KeyPermissionError):
        load_identity(f"rawkey:file:{tmp_path}/key")
    with pytest.raises(KeyFormatError, match="raw key"):
        RawKey(b"short")


def test_keyring_entries(ring: DictKeyring, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = X25519Identity.from_bytes(b"anna" * 8)
    ring.set_password("wmguard/x", "line", identity.to_text())
    ring.set_password("wmguard/x", "raw", base64.b64encode(DEK).decode())
    ring.set_password("wmguard/x", "bad", "hunter2!")
    for name in ("line", "raw"):
        ref = f"keyring:wmguard/x/{name}"
        data = seal_recipients(b"d" * 32, [load_recipient(ref)], **SAVE)
        assert open_recipients(data, [load_identity(ref)]) == b"d" * 32
    assert load_owner("keyring:wmguard/x/raw").key_id() == OwnerKey(DEK).key_id()
    with pytest.raises(KeyFormatError, match="not a key") as caught:
        load_identity("keyring:wmguard/x/bad")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(NotFoundError, match="no entry"):
        load_identity("keyring:wmguard/x/none")
    with pytest.raises(ConfigError):
        load_identity("keyring:nameonly")
    ring.locked = True
    with pytest.raises(KeyServiceError, match="KeyringLocked"):
        load_identity("keyring:wmguard/x/raw")


# Owner keys that are sealed


def test_an_owner_key_sealed_by_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_WORDS", WORDS)
    owner, path = OwnerKey.generate(), tmp_path / "owner.key"
    write_sealed(owner, path, "passphrase:env:WMGUARD_TEST_WORDS")
    assert load_owner(f"passphrase:env:WMGUARD_TEST_WORDS@file:{path}").key_id() == owner.key_id()
    assert (path.stat().st_mode & 0o777, (tmp_path / "owner.key.pub").read_bytes()) == (0o600, owner.public_pem())
    with pytest.raises(KeyFormatError):
        load_owner(f"file:{path}")
    with pytest.raises(ConfigError, match="names no sealed file"):
        load_owner("passphrase:env:WMGUARD_TEST_WORDS")
    monkeypatch.setenv("WMGUARD_TEST_WORDS", WORDS + "!")
    with pytest.raises(AuthenticationError, match="does not open"):
        load_owner(f"passphrase:env:WMGUARD_TEST_WORDS@file:{path}")


def test_a_sealed_owner_key_that_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(DEK).decode())
    path, ref = tmp_path / "owner.key", "rawkey:env:WMGUARD_TEST_KEY"
    write_sealed(OwnerKey.generate(), path, ref)
    sealed = path.read_bytes()
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises((FormatError, AuthenticationError)):
            load_owner(f"{ref}@file:{path}")


def test_an_owner_key_in_plaintext_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(DEK).decode())
    write_new_file(tmp_path / "owner.key", DEK, mode=0o600)
    assert load_owner(f"file:{tmp_path}/owner.key").key_id() == load_owner("env:WMGUARD_TEST_KEY").key_id()
    with pytest.raises(FormatError, match="not sealed"):
        load_owner(f"rawkey:env:WMGUARD_TEST_KEY@file:{tmp_path}/owner.key")


# References


def test_config_knows_the_schemes() -> None:
    assert set(RECIPIENTS) == set(IDENTITIES) == RECIPIENT_SCHEMES
    assert {"file", "env", "keyring", *SYMMETRIC} == OWNER_SCHEMES


@pytest.mark.parametrize("ref", ["", "owner.key", "file", "file:", "http://x", "FILE:x", "awskms:", ":x"])
@pytest.mark.parametrize("load", [load_recipient, load_identity])
def test_what_is_no_reference_is_not_repeated(load, ref: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="not a key reference") as caught:
        load(ref)
    assert not ref.strip(":") or f" {ref} " not in str(caught.value)
