"""What a release wrote reads for ever: the watermark, the registry and the protected folder of version 1."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import make as golden
import pytest
import torch

from hf_wmguard.container.recipients import X25519Identity, load_identity, load_recipient
from hf_wmguard.errors import AuthenticationError, ManifestError
from hf_wmguard.evidence.manifest import check_files, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.evidence.signing import load_signer
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import Committed
from hf_wmguard.suspects.protected import open_folder
from hf_wmguard.suspects.reader import open_suspect, tile_reader
from hf_wmguard.suspects.tensors import decode
from hf_wmguard.verification import verify
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import read_signature

OWNER = OwnerKey(golden.OWNER_SECRET)


@pytest.fixture(scope="module")
def watermark() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(golden.WATERMARK.read_text())
    return value


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefacts with the modes that git does not keep: keys closed to others, and a registry that can lock."""
    folder = tmp_path_factory.mktemp("golden")
    for path in (golden.KEYS, golden.PROTECTED, golden.REGISTRY):
        shutil.copytree(path, folder / path.name)
    for key in (folder / "keys").glob("*.key"):
        key.chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def protected(copies: Path) -> Path:
    return copies / golden.PROTECTED.name


@pytest.fixture(scope="module")
def owner_key(copies: Path) -> str:
    return f"file:{copies / 'keys' / golden.OWNER_KEY}"


@pytest.fixture(scope="module")
def recipient_key(copies: Path) -> str:
    return f"file:{copies / 'keys' / golden.RECIPIENT_KEY}"


def test_the_watermark_is_derived_as_ever(watermark: dict[str, Any]) -> None:
    """One changed byte here, and no model that was marked before can be recognised."""
    record = WatermarkRecord.from_json(watermark["record"])
    owner = OwnerKey(bytes.fromhex(watermark["owner_key"]))
    digests = {key.carrier.name: golden.key_digest(key) for key in record.carrier_keys(owner)}
    assert digests == watermark["carrier_keys"]
    assert record == golden.make_record(owner)
    assert record.to_json() == watermark["record"]


def test_the_digest_sees_every_part(watermark: dict[str, Any]) -> None:
    key = WatermarkRecord.from_json(watermark["record"]).carrier_keys(OWNER)[0]
    for name in ("left_signs", "right_kept", "step", "dither", "bits"):
        changed = key.to(torch.device("cpu"))
        tensor = getattr(changed, name).clone()
        tensor[0, 0] = 1 - tensor[0, 0] if name == "bits" else -tensor[0, 0]
        object.__setattr__(changed, name, tensor)
        assert golden.key_digest(changed) != watermark["carrier_keys"][key.carrier.name]


def test_keys_are_read_and_derive_as_ever(owner_key: str, recipient_key: str) -> None:
    assert OwnerKey.load(owner_key).key_id() == OWNER.key_id()
    assert OWNER.key_id() == "sha256:e9d8408147e1c37b6be7c802effebb3119db3b21a52e0b08e9dfa9250afb6391"
    assert load_signer(f"{owner_key}.pub").public_numbers() == OWNER.signing_key().public_key().public_numbers()
    recipient = load_identity(recipient_key).recipient()
    assert recipient.to_text() == load_recipient(f"{recipient_key}.pub").to_text()
    assert recipient.to_text() == X25519Identity.from_bytes(golden.RECIPIENT_SECRET).recipient().to_text()
    assert (
        X25519Identity.from_owner(OWNER).recipient().to_text().strip()
        == "wmguard-recipient-x25519-v1:TBn5yI5uaX+tax2FbXGhWUn5rOQHpHdHLbmdHreEGXA="
    )


def test_the_registry_reads(copies: Path, watermark: dict[str, Any]) -> None:
    (entry,) = Registry(copies / golden.REGISTRY.name, OWNER).entries()
    assert entry.kind == "commitment"
    assert Committed.from_entry(entry).record.to_json() == watermark["record"]


def test_the_manifest_reads(copies: Path, protected: Path) -> None:
    manifest, key_id = read_manifest(protected, signer=OWNER.signing_key().public_key())
    assert key_id == OWNER.key_id()
    check_files(protected, manifest)
    assert (manifest.model_id, manifest.iteration, manifest.step) == (golden.MODEL_ID, golden.ITERATION, 12)
    assert manifest.state == "complete"
    assert manifest.commitment == Registry(copies / golden.REGISTRY.name, OWNER).head()
    assert manifest.signature is not None
    assert manifest.signature.payload_decoded
    assert manifest.triggers is not None
    assert manifest.triggers.match_rate == 0.75
    names = [entry.name for entry in manifest.files]
    assert names == ["config.json", *golden.SHARDS, "model.safetensors.index.json"]


@pytest.mark.parametrize("who", ["owner", "recipient"])
def test_the_folder_opens_and_holds_what_was_put_in(
    protected: Path, recipient_key: str, watermark: dict[str, Any], who: str
) -> None:
    identity = X25519Identity.from_owner(OWNER) if who == "owner" else load_identity(recipient_key)
    with open_folder(protected, (identity,), signer=OWNER.signing_key().public_key()) as opened:
        assert [file.metadata for file in opened.files] == [golden.METADATA] * 2
        tensors = {
            name: decode(file.info(name).dtype, file.info(name).shape, file.read(name))
            for file in opened.files
            for name in file.names()
        }
    for name, expected in golden.plain_tensors().items():
        got = tensors.pop(name)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(got.double(), expected.double())
    assert set(tensors) == {carrier.name for carrier in golden.CARRIERS}
    digests = {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    assert digests == watermark["marked"]


def test_the_sealed_state_opens(protected: Path) -> None:
    manifest, _ = read_manifest(protected)
    sealed = base64.b64decode(manifest.sealed_state or "")
    assert OWNER.open(golden.STATE_LABEL, sealed, aad=manifest.set_id.encode()) == golden.STATE


def test_the_mark_is_read_from_the_folder(protected: Path, watermark: dict[str, Any]) -> None:
    record = WatermarkRecord.from_json(watermark["record"])
    with open_suspect(protected, identities=(X25519Identity.from_owner(OWNER),)) as suspect:
        reading = read_signature(record.carrier_keys(OWNER), tile_reader(suspect))
    manifest, _ = read_manifest(protected)
    assert manifest.signature is not None
    assert reading.bit_error_rate == manifest.signature.bit_error_rate == 0.0
    assert reading.projections == manifest.signature.projections
    # The reading of a release may differ by rounding; its p-value may not be another.
    assert reading.log10_p == pytest.approx(manifest.signature.log10_p, rel=1e-3)
    assert record.decode_payload(OWNER, reading.soft) == record.payload


def test_the_verdict_stands(copies: Path, protected: Path, owner_key: str) -> None:
    report = verify(protected, owner_key=owner_key, registry=copies / golden.REGISTRY.name)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.payload_decoded
    manifest, _ = read_manifest(protected)
    assert report.commitment["entry"] == manifest.commitment


def test_strangers_are_refused(protected: Path) -> None:
    stranger = OwnerKey(golden.RECIPIENT_SECRET)
    with (
        pytest.raises(AuthenticationError),
        open_folder(protected, (X25519Identity.from_bytes(golden.OWNER_SECRET),)),
    ):
        pass
    with pytest.raises(ManifestError):
        read_manifest(protected, signer=stranger.signing_key().public_key())


def test_golden_artefacts_are_never_made_again() -> None:
    before = golden.WATERMARK.read_bytes()
    run = subprocess.run([sys.executable, golden.__file__], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "never made again" in run.stderr
    assert golden.WATERMARK.read_bytes() == before
