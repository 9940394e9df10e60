"""Owner keys: what a reference may be, what is derived, and that secrets stay inside."""

from __future__ import annotations

import base64
import copy
import hmac
import itertools
import os
import pickle
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    KeyFormatError,
    KeyPermissionError,
    NotFoundError,
    UsageError,
)
from hf_wmguard.keys import MAX_KEY_FILE_BYTES, OwnerKey, public_key_id, read_reference, write_new_file

SECRET = bytes(range(100, 132))
OWNER = OwnerKey(SECRET)


def read(ref: str, private: bool = True) -> bytes:
    return read_reference(ref, what="owner key", private=private)


# References


def test_file_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_new_file(tmp_path / "key", SECRET, mode=0o600)
    assert read(f"file:{tmp_path}/key") == SECRET
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("file:~/key") == SECRET


def test_env_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_KEY", base64.b64encode(SECRET).decode() + "\n")
    assert read("env:WMGUARD_TEST_KEY") == SECRET


@pytest.mark.parametrize("value", ["*", "QQ", "ä", "QQ==QQ=="])
def test_env_that_is_not_base64(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WMGUARD_TEST_KEY", value)
    with pytest.raises(KeyFormatError, match="WMGUARD_TEST_KEY is not base64") as caught:
        read("env:WMGUARD_TEST_KEY")
    assert caught.value.__cause__ is None


def test_missing_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WMGUARD_TEST_KEY", raising=False)
    for ref in (f"file:{tmp_path}/missing", f"file:{tmp_path}/no/folder", "env:WMGUARD_TEST_KEY"):
        with pytest.raises(NotFoundError) as caught:
            read(ref)
        assert caught.value.exit_code == 4
        assert caught.value.hint


@pytest.mark.parametrize("ref", ["", "owner.key", SECRET.hex(), "http://host/key", "FILE:x"])
def test_a_reference_that_is_none_is_not_repeated(ref: str) -> None:
    with pytest.raises(ConfigError, match="not a key reference") as caught:
        read(ref)
    assert not ref or ref not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o610])
def test_a_private_file_is_closed_to_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_new_file(path, SECRET, mode=mode)
    with pytest.raises(KeyPermissionError, match=f"{mode:04o}") as caught:
        read(f"file:{path}")
    assert "chmod 600" in caught.value.hint
    assert read(f"file:{path}", private=False) == SECRET


def test_a_folder_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFormatError, match="not a regular file"):
        read(f"file:{tmp_path}")


def test_a_file_too_large_for_a_key(tmp_path: Path) -> None:
    write_new_file(tmp_path / "big", bytes(MAX_KEY_FILE_BYTES + 1), mode=0o600)
    with pytest.raises(KeyFormatError, match="larger than"):
        read(f"file:{tmp_path}/big")


# The owner key


@pytest.mark.parametrize("secret", [b"", SECRET[:31], SECRET + b"x", bytes(32), b"\xff" * 32])
def test_secrets_that_are_no_key(secret: bytes) -> None:
    with pytest.raises(KeyFormatError):
        OwnerKey(secret)


def test_write_and_load(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        OWNER.write(tmp_path / "owner.key")
    finally:
        os.umask(before)
    assert (tmp_path / "owner.key").read_bytes() == SECRET
    assert stat.S_IMODE((tmp_path / "owner.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "owner.key.pub").stat().st_mode) == 0o644
    loaded = OwnerKey.load(f"file:{tmp_path}/owner.key")
    assert loaded.key_id() == OWNER.key_id()
    public = serialization.load_pem_public_key((tmp_path / "owner.key.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public_key_id(public) == OWNER.key_id()


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    OWNER.write(path)
    with pytest.raises(UsageError, match="not overwritten"):
        OwnerKey.generate().write(path)
    assert path.read_bytes() == SECRET
    (tmp_path / "new.key.pub").write_bytes(b"something else")
    with pytest.raises(UsageError, match="not overwritten"):
        OWNER.write(tmp_path / "new.key")
    assert not (tmp_path / "new.key").exists()
    with pytest.raises(NotFoundError):
        OWNER.write(tmp_path / "no" / "folder.key")


def test_generated_keys_differ() -> None:
    assert len({OwnerKey.generate().key_id() for _ in range(8)}) == 8


# What is derived


def test_derive_is_hkdf_over_an_unambiguous_info() -> None:
    """HKDF written out (RFC 5869): the bytes are the same on every machine and in every release."""
    extracted = hmac.digest(bytes(32), SECRET, "sha256")
    info = b'["hf-wmguard/1","carriers","acme/triage","3",2]'
    expected = hmac.digest(extracted, info + b"\x01", "sha256")
    assert OWNER.derive("carriers", model_id="acme/triage", iteration="3", slot=2) == expected
    longer = OWNER.derive("carriers", model_id="acme/triage", iteration="3", slot=2, length_bytes=48)
    assert longer[:32] == expected
    assert len(longer) == 48


def test_no_two_uses_share_a_key() -> None:
    uses = [
        OWNER.derive(label, model_id=model_id, iteration=iteration, slot=slot, salt=salt)
        for label, model_id, iteration, slot, salt in itertools.product(
            ("a", "ab", 'a","b'), ("", "b"), ("", "b"), (0, 1, 10), (b"", b"s")
        )
    ]
    assert len(set(uses)) == len(uses)
    assert OwnerKey(SECRET[::-1]).derive("a") not in uses


def test_signing_key_signs() -> None:
    signature = OWNER.signing_key().sign(b"message", ec.ECDSA(hashes.SHA256()))
    public = serialization.load_pem_public_key(OWNER.public_pem())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert isinstance(public.curve, ec.SECP256R1)
    public.verify(signature, b"message", ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        public.verify(signature, b"another", ec.ECDSA(hashes.SHA256()))
    assert OWNER.key_id().startswith("sha256:")
    assert OWNER.key_id() != OwnerKey(SECRET[::-1]).key_id()


def test_seal_and_open() -> None:
    sealed = OWNER.seal("registry", b"plaintext", aad=b"entry 1")
    assert OWNER.open("registry", sealed, aad=b"entry 1") == b"plaintext"
    assert b"plaintext" not in sealed
    assert OWNER.seal("registry", b"plaintext", aad=b"entry 1") != sealed
    assert OWNER.open("registry", OWNER.seal("registry", b"", aad=b""), aad=b"") == b""


def test_open_refuses_everything_else() -> None:
    sealed = OWNER.seal("registry", b"plaintext", aad=b"entry 1")
    attempts = [(OWNER, "record", sealed, b"entry 1"), (OWNER, "registry", sealed, b"entry 2")]
    attempts += [(OwnerKey(SECRET[::-1]), "registry", sealed, b"entry 1")]
    attempts += [(OWNER, "registry", sealed[:size], b"entry 1") for size in range(len(sealed))]
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        attempts.append((OWNER, "registry", bytes(changed), b"entry 1"))
    for owner, label, data, aad in attempts:
        with pytest.raises(AuthenticationError, match=f"cannot open {label}"):
            owner.open(label, data, aad=aad)


# Secrets stay inside


def test_an_owner_key_shows_and_gives_nothing() -> None:
    assert repr(OWNER) == "OwnerKey(<secret>)"
    assert f"{OWNER}" == "OwnerKey(<secret>)"
    assert not hasattr(OWNER, "__dict__")
    for leak in (lambda: pickle.dumps(OWNER), lambda: copy.copy(OWNER), lambda: copy.deepcopy(OWNER)):
        with pytest.raises(TypeError, match="never pickled"):
            leak()


def test_write_new_file_has_its_mode_from_the_start(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        write_new_file(tmp_path / "a", b"x", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert (tmp_path / "a").read_bytes() == b"x"
    with pytest.raises(UsageError):
        write_new_file(tmp_path / "a", b"y", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"x"
