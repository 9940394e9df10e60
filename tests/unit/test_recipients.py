"""Who can open a save, and that nobody else can, nor change who can."""

from __future__ import annotations

import base64
import copy
import hmac
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.recipients import (
    MAX_RECIPIENTS_FILE_BYTES,
    MAX_STANZAS,
    RecipientsFile,
    WrapContext,
    X25519Identity,
    X25519Recipient,
    dek_commitment,
    generate_identity,
    load_identity,
    load_recipient,
    open_recipients,
    seal_recipients,
)
from hf_wmguard.errors import (
    AuthenticationError,
    FormatError,
    KeyFormatError,
    KeyPermissionError,
    ManifestError,
    NotFoundError,
    UsageError,
    WmguardError,
)
from hf_wmguard.keys import OwnerKey, write_new_file

DEK = bytes(range(32))
SAVE = {"set_id": "5e7", "model_id": "acme/triage"}
CONTEXT = WrapContext(**SAVE)
ANNA = X25519Identity.from_bytes(b"anna" * 8)
BERT = X25519Identity.from_bytes(b"bert" * 8)


@pytest.fixture
def sealed() -> bytes:
    return seal_recipients(DEK, [ANNA.recipient(), BERT.recipient()], **SAVE)


# What opens


@pytest.mark.parametrize("identity", [ANNA, BERT])
def test_every_recipient_opens(sealed: bytes, identity: X25519Identity) -> None:
    assert open_recipients(sealed, [identity], **SAVE) == DEK
    assert open_recipients(sealed, [generate_identity(), identity]) == DEK


def test_the_owner_opens_what_names_him(sealed: bytes) -> None:
    owner = OwnerKey(bytes(range(1, 33)))
    data = seal_recipients(DEK, [X25519Identity.from_owner(owner).recipient()], **SAVE)
    assert open_recipients(data, [X25519Identity.from_owner(owner)]) == DEK
    with pytest.raises(AuthenticationError):
        open_recipients(sealed, [X25519Identity.from_owner(owner)])


@pytest.mark.parametrize("identities", [[], [generate_identity()]])
def test_others_do_not_and_learn_what_to_do(sealed: bytes, identities: list[X25519Identity]) -> None:
    with pytest.raises(AuthenticationError) as caught:
        open_recipients(sealed, identities)
    assert "2 recipients" in caught.value.hint
    assert "save it for yours" in caught.value.hint


def test_a_recipient_that_is_named_twice_gets_one_stanza() -> None:
    data = seal_recipients(DEK, [ANNA.recipient(), ANNA.recipient()], **SAVE)
    assert len(RecipientsFile.parse(data).stanzas) == 1


def test_who_can_open_can_change_the_recipients(sealed: bytes) -> None:
    file = RecipientsFile.parse(sealed)
    dek = file.unwrap([ANNA])
    new = generate_identity()
    kept = [stanza for stanza in file.stanzas if stanza["recipient"] != BERT.recipient().key_id]
    data = RecipientsFile.sealed(dek, file.context, [*kept, new.recipient().wrap(dek, file.context)]).encode()
    assert open_recipients(data, [ANNA]) == open_recipients(data, [new]) == DEK
    with pytest.raises(AuthenticationError):
        open_recipients(data, [BERT])


def test_the_file_shows_no_key(sealed: bytes) -> None:
    for secret in (DEK, b"anna" * 8):
        assert secret not in sealed
        assert secret.hex().encode() not in sealed
        assert base64.b64encode(secret) not in sealed
    assert seal_recipients(DEK, [ANNA.recipient()], **SAVE) != seal_recipients(DEK, [ANNA.recipient()], **SAVE)


def test_dek_commitment() -> None:
    values = {dek_commitment(DEK, "a"), dek_commitment(DEK, "b"), dek_commitment(bytes(32), "a")}
    assert len(values) == 3
    assert all(len(bytes.fromhex(value)) == 32 for value in values)
    assert DEK.hex() not in values
    with pytest.raises(KeyFormatError):
        dek_commitment(b"short", "a")


# What was changed


def test_every_flipped_byte_fails(sealed: bytes) -> None:
    for position in range(len(sealed)):
        for mask in (0x01, 0x80 | position % 128):
            changed = bytearray(sealed)
            changed[position] ^= mask
            with pytest.raises(WmguardError) as caught:
                open_recipients(bytes(changed), [ANNA])
            assert type(caught.value) in (FormatError, AuthenticationError), position


def test_every_truncation_fails(sealed: bytes) -> None:
    for size in range(len(sealed)):
        with pytest.raises(FormatError):
            open_recipients(sealed[:size], [ANNA])


def change(sealed: bytes, edit: Callable[[Any], Any]) -> bytes:
    document = json.loads(sealed)
    edit(document)
    return canonical_json(document)


def test_a_removed_or_added_recipient_is_noticed(sealed: bytes) -> None:
    removed = change(sealed, lambda document: document["stanzas"].pop())
    with pytest.raises(AuthenticationError, match="changed by somebody"):
        open_recipients(removed, [ANNA])
    stranger = generate_identity().recipient().wrap(bytes(32), CONTEXT)
    added = change(sealed, lambda document: document["stanzas"].append(stranger))
    with pytest.raises(AuthenticationError, match="changed by somebody"):
        open_recipients(added, [ANNA])


def test_a_stanza_with_another_key_is_noticed(sealed: bytes) -> None:
    """Anybody can wrap for Anna; only the commitment tells that it is not the key of this save."""
    forged = ANNA.recipient().wrap(bytes(32), CONTEXT)
    data = change(sealed, lambda document: document["stanzas"].__setitem__(0, forged))
    with pytest.raises(AuthenticationError, match="not the key of this save"):
        open_recipients(data, [ANNA])
    short = ANNA.recipient().wrap(b"short", CONTEXT)
    data = change(sealed, lambda document: document["stanzas"].__setitem__(0, short))
    with pytest.raises(AuthenticationError, match="not the key of this save"):
        open_recipients(data, [ANNA])


@pytest.mark.parametrize("other", [{"set_id": "other"}, {"model_id": "acme/other"}])
def test_a_stanza_of_another_save(sealed: bytes, other: dict[str, str]) -> None:
    moved = ANNA.recipient().wrap(DEK, WrapContext(**SAVE | other))
    data = change(sealed, lambda document: document["stanzas"].__setitem__(0, moved))
    with pytest.raises(AuthenticationError, match="another save"):
        open_recipients(data, [ANNA])
    with pytest.raises(ManifestError, match=next(iter(other))):
        open_recipients(sealed, [ANNA], **SAVE | other)


def stanza(document: Any) -> Any:
    return document["stanzas"][0]


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document.update(version=2),
        lambda document: document.update(version=True),
        lambda document: document.update(note="x"),
        lambda document: document.pop("mac"),
        lambda document: document.update(set_id=""),
        lambda document: document.update(stanzas=[]),
        lambda document: document.update(stanzas={}),
        lambda document: document["stanzas"].append(stanza(document)),
        lambda document: document["stanzas"].append("x"),
        lambda document: stanza(document).update(kind="scrypt"),
        lambda document: stanza(document).update(kind=["x25519"]),
        lambda document: stanza(document).update(ciphertext=1),
        lambda document: stanza(document).update(ciphertext="*"),
        lambda document: stanza(document).update(work_factor="31"),
    ],
)
def test_malformed_files(sealed: bytes, edit: Callable[[Any], Any]) -> None:
    with pytest.raises(FormatError):
        open_recipients(change(sealed, edit), [ANNA])


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 100_000, b" " * (MAX_RECIPIENTS_FILE_BYTES + 1)])
def test_files_of_another_kind(data: bytes) -> None:
    with pytest.raises(FormatError):
        open_recipients(data, [ANNA])


def test_other_spellings(sealed: bytes) -> None:
    document = json.loads(sealed)
    for other in (
        json.dumps(document).encode(),
        json.dumps(dict(reversed(document.items())), separators=(",", ":")).encode(),
        sealed + b"\n",
        sealed.replace(b'"version":1', b'"version":1,"version":1'),
    ):
        with pytest.raises(FormatError, match="canonical"):
            open_recipients(other, [ANNA])


def test_limits() -> None:
    with pytest.raises(UsageError, match="0 recipients"):
        seal_recipients(DEK, [], **SAVE)
    one = ANNA.recipient().wrap(DEK, CONTEXT)
    many = [one | {"recipient": str(number)} for number in range(MAX_STANZAS + 1)]
    data = RecipientsFile.sealed(DEK, CONTEXT, many[1:]).encode()
    assert len(data) < MAX_RECIPIENTS_FILE_BYTES
    assert len(RecipientsFile.parse(data).stanzas) == MAX_STANZAS
    with pytest.raises(UsageError, match="1001 recipients"):
        RecipientsFile.sealed(DEK, CONTEXT, many)
    with pytest.raises(UsageError, match="twice"):
        RecipientsFile.sealed(DEK, CONTEXT, [one, one])
    with pytest.raises(KeyFormatError):
        seal_recipients(b"short", [ANNA.recipient()], **SAVE)


# HPKE


def test_a_stanza_is_rfc_9180_base_mode() -> None:
    """An own decryption, straight from RFC 9180, secs. 4.1 and 5.1, opens what the library sealed."""
    raw = base64.b64decode(ANNA.recipient().wrap(DEK, CONTEXT)["ciphertext"])
    private = X25519PrivateKey.from_private_bytes(b"anna" * 8)
    ephemeral, ciphertext = raw[:32], raw[32:]
    public = private.public_key().public_bytes_raw()

    def extract(suite: bytes, salt: bytes, label: bytes, material: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + material, "sha256")

    def expand(suite: bytes, key: bytes, label: bytes, info: bytes, size: int) -> bytes:
        text = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
        return hmac.digest(key, text + b"\x01", "sha256")[:size]

    kem = b"KEM" + (0x20).to_bytes(2, "big")
    shared = extract(kem, b"", b"eae_prk", private.exchange(X25519PublicKey.from_public_bytes(ephemeral)))
    shared = expand(kem, shared, b"shared_secret", ephemeral + public, 32)
    hpke = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x20, 0x01, 0x02))
    info = b'["hf-wmguard/1/recipient","x25519",1,"5e7","acme/triage"]'
    schedule = b"\0" + extract(hpke, b"", b"psk_id_hash", b"") + extract(hpke, b"", b"info_hash", info)
    secret = extract(hpke, shared, b"secret", b"")
    key, nonce = expand(hpke, secret, b"key", schedule, 32), expand(hpke, secret, b"base_nonce", schedule, 12)
    assert AESGCM(key).decrypt(nonce, ciphertext, b"") == DEK


def test_a_public_key_that_gives_everybody_the_same_secret() -> None:
    recipient = X25519Recipient(X25519PublicKey.from_public_bytes(bytes(32)))
    with pytest.raises(KeyFormatError, match="not a usable key"):
        recipient.wrap(DEK, CONTEXT)


# Text files


def test_text_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = generate_identity()
    write_new_file(tmp_path / "key", identity.to_text().encode(), mode=0o600)
    write_new_file(tmp_path / "key.pub", identity.recipient().to_text().encode(), mode=0o644)
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(identity.to_text().encode()).decode())
    recipient = load_recipient(f"file:{tmp_path}/key.pub")
    assert recipient.key_id == identity.recipient().key_id
    data = seal_recipients(DEK, [recipient], **SAVE)
    for ref in (f"file:{tmp_path}/key", "env:WMGUARD_TEST_KEY"):
        assert open_recipients(data, [load_identity(ref)]) == DEK


def test_the_text_of_a_known_key() -> None:
    assert ANNA.to_text() == "wmguard-identity-x25519-v1:YW5uYWFubmFhbm5hYW5uYWFubmFhbm5hYW5uYWFubmE=\n"
    assert X25519Identity.parse(ANNA.to_text()).recipient().to_text() == ANNA.recipient().to_text()
    assert ANNA.recipient().to_text().startswith("wmguard-recipient-x25519-v1:")


def test_a_world_readable_identity_is_refused(tmp_path: Path) -> None:
    write_new_file(tmp_path / "key", ANNA.to_text().encode(), mode=0o644)
    with pytest.raises(KeyPermissionError, match="0644"):
        load_identity(f"file:{tmp_path}/key")
    with pytest.raises(NotFoundError):
        load_identity(f"file:{tmp_path}/missing")


BODY = "YW5uYWFubmFhbm5hYW5uYWFubmFhbm5hYW5uYWFubmE="


@pytest.mark.parametrize(
    "text",
    [
        "",
        BODY,
        f"wmguard-identity-x25519-v2:{BODY}",
        "wmguard-identity-x25519-v1:",
        f"wmguard-identity-x25519-v1:{BODY[:-4]}",
        f"wmguard-identity-x25519-v1:{BODY[:-2]}F=",
        f"wmguard-identity-x25519-v1: {BODY}",
        f"wmguard-identity-x25519-v1:{BODY}\n{BODY}",
        "wmguard-identity-x25519-v1:" + base64.b64encode(bytes(32)).decode(),
        "wmguard-identity-x25519-v1:ä",
        ANNA.recipient().to_text(),
    ],
)
def test_malformed_identities(text: str) -> None:
    with pytest.raises(KeyFormatError) as caught:
        X25519Identity.parse(text)
    assert BODY[:20] not in str(caught.value)


@pytest.mark.parametrize("text", ["", "x", "wmguard-recipient-x25519-v1:QQ==", ANNA.to_text()])
def test_malformed_recipients(text: str) -> None:
    with pytest.raises(KeyFormatError) as caught:
        X25519Recipient.parse(text)
    assert BODY[:20] not in str(caught.value)


def test_an_owner_key_in_the_place_of_an_identity(tmp_path: Path) -> None:
    OwnerKey(bytes(range(200, 232))).write(tmp_path / "owner.key")
    with pytest.raises(KeyFormatError, match="owner key"):
        load_identity(f"file:{tmp_path}/owner.key")


# Secrets stay inside


def test_an_identity_shows_and_gives_nothing() -> None:
    assert repr(ANNA) == "X25519Identity(<secret>)"
    for leak in (lambda: pickle.dumps(ANNA), lambda: copy.copy(ANNA), lambda: copy.deepcopy(ANNA)):
        with pytest.raises(TypeError, match="never pickled"):
            leak()
    assert not hasattr(ANNA, "__dict__")
    assert ANNA.recipient().key_id in repr(ANNA.recipient())


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_an_identity_of_another_length(size: int) -> None:
    with pytest.raises(KeyFormatError, match="expected 32"):
        X25519Identity.from_bytes(bytes(range(size)))
