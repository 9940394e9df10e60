"""The signed manifest: what is refused when any part of it, or of the folder, is not as it was written."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from hf_wmguard.canonical import (
    canonical_json,
    canonical_time,
    decode_base64,
    is_canonical_time,
    parse_canonical,
)
from hf_wmguard.errors import (
    FormatError,
    KeyFormatError,
    ManifestError,
    NotFoundError,
    OwnershipError,
    UsageError,
)
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    MANIFEST_TYPE,
    STAGING_PREFIX,
    FileEntry,
    Manifest,
    SignatureSummary,
    TriggerSummary,
    check_files,
    check_free_for,
    check_sizes,
    digest_file,
    read_manifest,
    write_manifest,
)
from hf_wmguard.evidence.records import MAX_FILES
from hf_wmguard.evidence.signing import (
    MAX_ENVELOPE_BYTES,
    MAX_PAYLOAD_BYTES,
    load_signer,
    make_signature,
    open_envelope,
    pae,
    sign,
)
from hf_wmguard.keys import OwnerKey

OWNER = OwnerKey(bytes(range(32)))
STRANGER = OwnerKey(bytes(range(1, 33)))
TYPE = "application/vnd.test+json"
WEIGHTS = b"ciphertext" * 1000
CONFIG = b'{"hidden_size": 64}'


def example(**changes: Any) -> Manifest:
    manifest = Manifest(
        model_id="acme/triage",
        iteration="3",
        set_id="0123456789abcdef" * 2,
        created="2026-01-31T12:00:00Z",
        step=500,
        state="complete",
        files=(
            FileEntry(name="config.json", size_bytes=len(CONFIG), sha256=hashlib.sha256(CONFIG).hexdigest()),
            FileEntry(name="model.safetensors", size_bytes=len(WEIGHTS), sha256=hashlib.sha256(WEIGHTS).hexdigest()),
        ),
        dek_commitment="ab" * 32,
        commitment="sha256:" + "cd" * 32,
        commitment_time="2026-01-30T12:00:00Z",
        signature=SignatureSummary(
            bit_error_rate=0.0, log10_p=-241.3, projections=2304, payload_decoded=True, weight_change=0.0098
        ),
        triggers=TriggerSummary(count=64, candidates=45, match_rate=1.0),
        sealed_state="c2VhbGVk",
    )
    return replace(manifest, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(CONFIG)
    write_manifest(tmp_path, example(), OWNER)
    return tmp_path


class TestCanonical:
    @pytest.mark.parametrize(
        "value",
        [
            float("nan"),
            float("inf"),
            {1: "a"},
            {"a": [{2: 0}]},
            b"bytes",
            "\ud800",
            pytest.param({"key": object()}, id="object"),
        ],
        ids=ascii,
    )
    def test_refuses_what_has_no_single_spelling(self, value: object) -> None:
        with pytest.raises(FormatError, match="cannot be written"):
            canonical_json(value)

    def test_error_does_not_quote_the_value(self) -> None:
        with pytest.raises(FormatError) as caught:
            canonical_json({"hunter2": float("nan")})
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        "data",
        [
            b'{"a":1,"a":1}',
            b'{"a":1,"a":2}',
            b'{"a": 1}',
            b'{"b":1,"a":2}',
            b'{"a":1}\n',
            b'\xef\xbb\xbf{"a":1}',
            b'{"a":NaN}',
            b'{"a":Infinity}',
            b'{"a":1e999}',
            b'{"a":1E5}',
            b'{"a":-0}',
            b'{"a":"\\u0041"}',
            b'{"a":"\\ud800"}',
            b'{"a":"\xff"}',
            b'{"a":',
            b"",
            b"[" * 100_000,
            b"9" * 10_000,
        ],
        ids=lambda data: ascii(data[:20]),
    )
    def test_refuses_every_other_spelling(self, data: bytes) -> None:
        with pytest.raises(FormatError):
            parse_canonical(data, "thing", 1 << 20)

    def test_size_limit_comes_before_parsing(self) -> None:
        assert parse_canonical(b'"1234"', "thing", 6) == "1234"
        with pytest.raises(FormatError, match="6 bytes, expected at most 5"):
            parse_canonical(b'"1234"', "thing", 5)

    def test_text_is_utf8_and_keys_are_sorted(self) -> None:
        assert canonical_json({"b": "ü", "a": [1, 2.0, None]}) == '{"a":[1,2.0,null],"b":"ü"}'.encode()

    @pytest.mark.parametrize("text", ["QR==", "QQ", "QQ==\n", "Q Q==", "QQ=", "Q-==", "ü"])
    def test_base64_has_one_spelling(self, text: str) -> None:
        with pytest.raises(FormatError):
            decode_base64(text, "thing")
        assert decode_base64("QQ==", "thing") == b"A"

    def test_times(self) -> None:
        zone = timezone(timedelta(hours=2))
        assert canonical_time(datetime(2026, 1, 31, 14, 0, 0, 999, zone)) == "2026-01-31T12:00:00Z"
        assert is_canonical_time(canonical_time())
        for text in ("2026-1-31T12:00:00Z", "2026-01-31T12:00:00", "2026-02-30T12:00:00Z", "", "today"):
            assert not is_canonical_time(text)
        with pytest.raises(UsageError, match="zone"):
            canonical_time(datetime(2026, 1, 31))


class TestEnvelope:
    def test_encoding_and_signature_are_those_of_the_dsse_test_vector(self) -> None:
        # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md#test-vectors
        kind, body = "http://example.com/HelloWorld", b"hello world"
        assert pae(body, kind) == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        secret = 97358161215184420915383655311931858321456579547487070936769975997791359926199
        r, s = decode_dss_signature(make_signature(body, kind, ec.derive_private_key(secret, ec.SECP256R1())))
        expected = base64.b64decode(
            "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
        )
        assert r.to_bytes(32, "big") + s.to_bytes(32, "big") == expected

    def test_round_trip(self) -> None:
        data = sign(b"payload", TYPE, OWNER)
        for signer in (None, OWNER.signing_key().public_key()):
            opened = open_envelope(data, payload_type=TYPE, signer=signer)
            assert (opened.payload, opened.key_id) == (b"payload", OWNER.key_id())
        assert sign(b"payload", TYPE, OWNER) == data

    def test_every_changed_byte_is_refused(self) -> None:
        data = sign(b"payload", TYPE, OWNER)
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 1
            with pytest.raises(ManifestError):
                open_envelope(bytes(changed), payload_type=TYPE, signer=None)

    def test_another_signer_is_refused_when_one_is_pinned(self) -> None:
        data = sign(b"payload", TYPE, STRANGER)
        assert open_envelope(data, payload_type=TYPE, signer=None).key_id == STRANGER.key_id()
        with pytest.raises(ManifestError, match="expected " + OWNER.key_id()):
            open_envelope(data, payload_type=TYPE, signer=OWNER.signing_key().public_key())

    def test_a_stranger_cannot_borrow_the_pinned_key(self) -> None:
        forged = json.loads(sign(b"payload", TYPE, STRANGER))
        own = json.loads(sign(b"other", TYPE, OWNER))
        forged["public_key"] = own["public_key"]
        forged["signatures"][0]["keyid"] = own["signatures"][0]["keyid"]
        with pytest.raises(ManifestError, match="does not match"):
            open_envelope(canonical_json(forged), payload_type=TYPE, signer=OWNER.signing_key().public_key())

    def test_a_signature_for_one_type_is_not_good_for_another(self) -> None:
        data = sign(b"payload", TYPE, OWNER)
        with pytest.raises(ManifestError, match="expected 'application/other'"):
            open_envelope(data, payload_type="application/other", signer=None)
        retyped = canonical_json({**json.loads(data), "payloadType": "application/other"})
        with pytest.raises(ManifestError, match="does not match"):
            open_envelope(retyped, payload_type="application/other", signer=None)

    @pytest.mark.parametrize("count", [0, 2])
    def test_exactly_one_signature(self, count: int) -> None:
        envelope = json.loads(sign(b"payload", TYPE, OWNER))
        envelope["signatures"] *= count
        with pytest.raises(ManifestError, match=f"{count} signatures"):
            open_envelope(canonical_json(envelope), payload_type=TYPE, signer=None)

    @pytest.mark.parametrize(
        "change",
        [
            {"extra": 1},
            {"payload": None},
            {"payload": "QR=="},
            {"signatures": [1]},
            {"signatures": [{"sig": ""}]},
            {"public_key": ""},
            {"public_key": "ü"},
        ],
        ids=str,
    )
    def test_malformed_fields(self, change: dict[str, object]) -> None:
        envelope = json.loads(sign(b"payload", TYPE, OWNER))
        with pytest.raises(ManifestError):
            open_envelope(canonical_json({**envelope, **change}), payload_type=TYPE, signer=None)

    @pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\x00" * 10, b" " * (MAX_ENVELOPE_BYTES + 1)])
    def test_what_is_no_envelope(self, data: bytes) -> None:
        with pytest.raises(ManifestError):
            open_envelope(data, payload_type=TYPE, signer=None)

    def test_the_largest_payload_can_be_read_back_and_a_larger_one_is_not_signed(self) -> None:
        payload = bytes(MAX_PAYLOAD_BYTES)
        assert len(sign(payload, MANIFEST_TYPE, OWNER)) <= MAX_ENVELOPE_BYTES
        with pytest.raises(ManifestError, match="at most"):
            sign(payload + b"x", TYPE, OWNER)

    def test_another_curve_or_spelling_of_the_key_is_refused(self) -> None:
        envelope = json.loads(sign(b"payload", TYPE, OWNER))
        curve = ec.generate_private_key(ec.SECP384R1()).public_key()
        pem = curve.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        for text in (pem, envelope["public_key"] + "\n", "note\n" + envelope["public_key"]):
            with pytest.raises(ManifestError, match="P-256"):
                open_envelope(canonical_json({**envelope, "public_key": text}), payload_type=TYPE, signer=None)

    def test_load_signer(self, tmp_path: Path) -> None:
        OWNER.write(tmp_path / "owner.key")
        signer = load_signer(f"file:{tmp_path / 'owner.key.pub'}")
        assert open_envelope(sign(b"x", TYPE, OWNER), payload_type=TYPE, signer=signer).payload == b"x"
        for data in (b"not a key", ec_pem(ec.SECP384R1())):
            (tmp_path / "bad.pub").write_bytes(data)
            with pytest.raises(KeyFormatError, match="P-256"):
                load_signer(f"file:{tmp_path / 'bad.pub'}")
        with pytest.raises(NotFoundError):
            load_signer(f"file:{tmp_path / 'none.pub'}")


def ec_pem(curve: ec.EllipticCurve) -> bytes:
    return (
        ec.generate_private_key(curve)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


class TestManifestFields:
    def test_round_trip(self) -> None:
        for manifest in (
            example(),
            example(
                signature=None,
                triggers=None,
                step=None,
                sealed_state=None,
                commitment=None,
                commitment_time=None,
            ),
            example(commitment_timestamp="dG9rZW4="),
        ):
            assert Manifest.from_bytes(manifest.to_bytes()) == manifest

    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "..",
            "/etc/passwd",
            "../model.safetensors",
            "a//b",
            "a/",
            "./a",
            "a/../../b",
            "a\\b",
            "C:model",
            "a\nb",
            "a\x00b",
            "\x1b[2J",
            "\u202egnp.exe",
            "\ud800",
            "x" * 256,
            "x" * 256 + "/a",
            "/".join(["x" * 200] * 6),
            MANIFEST_NAME,
            ENVELOPE_NAME,
        ],
        ids=ascii,
    )
    def test_file_names_that_leave_the_folder_or_deceive(self, name: str) -> None:
        with pytest.raises(ManifestError):
            FileEntry(name=name, size_bytes=0, sha256="00" * 32)

    @pytest.mark.parametrize("name", ["/etc/passwd", "..", "a/../b", "a\\b"])
    def test_traversal_in_a_signed_manifest_is_refused_too(self, tmp_path: Path, name: str) -> None:
        fields = json.loads(example().to_bytes())
        fields["files"][0]["name"] = name
        data = canonical_json(fields)
        (tmp_path / MANIFEST_NAME).write_bytes(data)
        (tmp_path / ENVELOPE_NAME).write_bytes(sign(data, MANIFEST_TYPE, OWNER))
        with pytest.raises(ManifestError, match="does not name a file in the folder"):
            read_manifest(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"version": True},
            {"version": 1.0},
            {"extra": 1},
            {"model_id": ""},
            {"model_id": "a\nb"},
            {"model_id": "x" * 257},
            {"model_id": 3},
            {"iteration": 3},
            {"set_id": "AB" * 16},
            {"set_id": "abc"},
            {"created": "2026-01-31"},
            {"step": -1},
            {"step": True},
            {"step": 1.0},
            {"state": "done"},
            {"files": []},
            {"files": {}},
            {"files": [1]},
            {"dek_commitment": ""},
            {"commitment": None},
            {"commitment": "cd" * 32},
            {"commitment_time": None},
            {"commitment_time": "yesterday"},
            {"commitment_timestamp": "?"},
            {"commitment": None, "commitment_time": None, "commitment_timestamp": "QQ=="},
            {"signature": []},
            {"signature": {}},
            {"triggers": {"count": 0, "candidates": 2, "match_rate": None}},
            {"triggers": {"count": 1, "candidates": 1, "match_rate": None}},
            {"triggers": {"count": 1, "candidates": 2, "match_rate": 1.5}},
            {"triggers": {"count": 1, "candidates": 2, "match_rate": 1}},
            {"sealed_state": "QR=="},
        ],
        ids=str,
    )
    def test_field_out_of_bounds(self, change: dict[str, object]) -> None:
        fields = {**json.loads(example().to_bytes()), **change}
        with pytest.raises(ManifestError):
            Manifest.from_bytes(canonical_json(fields))

    @pytest.mark.parametrize("name", sorted(json.loads(example().to_bytes())))
    def test_missing_field(self, name: str) -> None:
        fields = json.loads(example().to_bytes())
        del fields[name]
        with pytest.raises(ManifestError):
            Manifest.from_bytes(canonical_json(fields))

    @pytest.mark.parametrize(
        "change",
        [
            {"bit_error_rate": 1.5},
            {"bit_error_rate": -0.1},
            {"bit_error_rate": 0},
            {"bit_error_rate": float("nan")},
            {"log10_p": 0.5},
            {"log10_p": -float("inf")},
            {"projections": 0},
            {"weight_change": -1.0},
        ],
        ids=str,
    )
    def test_signature_numbers(self, change: dict[str, object]) -> None:
        summary = example().signature
        assert summary is not None
        with pytest.raises(ManifestError, match=next(iter(change))):
            replace(summary, **change)

    @pytest.mark.parametrize(
        "change",
        [
            {"name": 1},
            {"size_bytes": -1},
            {"size_bytes": 1 << 60},
            {"size_bytes": 1.0},
            {"size_bytes": True},
            {"sha256": "AB" * 32},
            {"sha256": "ab"},
            {"mode": 1},
        ],
        ids=str,
    )
    def test_file_fields(self, change: dict[str, object]) -> None:
        fields = json.loads(example().to_bytes())
        fields["files"][0].update(change)
        with pytest.raises(ManifestError):
            Manifest.from_bytes(canonical_json(fields))

    def test_files_are_sorted_and_named_once(self) -> None:
        first, second = example().files
        for files in ((second, first), (first, first)):
            with pytest.raises(ManifestError, match="sorted"):
                example(files=files)

    def test_count_of_files_is_limited(self) -> None:
        entry = asdict(example().files[0])
        fields = json.loads(example().to_bytes())
        fields["files"] = [{**entry, "name": f"{number:06}"} for number in range(MAX_FILES + 1)]
        with pytest.raises(ManifestError, match="at most"):
            Manifest.from_bytes(canonical_json(fields))


class TestFolder:
    def test_round_trip(self, folder: Path) -> None:
        signer = OWNER.signing_key().public_key()
        assert read_manifest(folder) == read_manifest(folder, signer=signer) == (example(), OWNER.key_id())
        seen: list[tuple[str, int]] = []
        check_files(folder, example(), progress=lambda name, count: seen.append((name, count)))
        assert seen == [("config.json", len(CONFIG)), ("model.safetensors", len(WEIGHTS))]

    def test_no_secret_is_written(self, folder: Path) -> None:
        secret = bytes(range(32))
        scalar = OWNER.signing_key().private_numbers().private_value.to_bytes(32, "big")
        for path in folder.iterdir():
            data = path.read_bytes()
            for form in (secret, scalar):
                assert form not in data
                assert form.hex().encode() not in data
                assert base64.b64encode(form).rstrip(b"=") not in data

    @pytest.mark.parametrize("name", [MANIFEST_NAME, ENVELOPE_NAME])
    def test_missing_part_is_named(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(NotFoundError, match=name):
            read_manifest(folder)
        with pytest.raises(NotFoundError):
            read_manifest(folder / "nowhere")

    def test_every_changed_byte_of_the_manifest_is_refused(self, folder: Path) -> None:
        data = (folder / MANIFEST_NAME).read_bytes()
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 1
            (folder / MANIFEST_NAME).write_bytes(changed)
            with pytest.raises(ManifestError, match="is not what"):
                read_manifest(folder)
        (folder / MANIFEST_NAME).write_bytes(data + b"\n")
        with pytest.raises(ManifestError, match="is not what"):
            read_manifest(folder)

    def test_manifest_signed_again_by_a_stranger(self, folder: Path) -> None:
        write_manifest(folder, example(iteration="4"), STRANGER)
        assert read_manifest(folder)[1] == STRANGER.key_id()
        with pytest.raises(ManifestError, match=STRANGER.key_id()):
            read_manifest(folder, signer=OWNER.signing_key().public_key())

    def test_envelope_of_another_save_is_refused(self, folder: Path) -> None:
        # What a save that was killed between the two writes leaves behind.
        (folder / MANIFEST_NAME).write_bytes(example(step=501).to_bytes())
        with pytest.raises(ManifestError, match="is not what"):
            read_manifest(folder)

    def test_oversized_manifest_is_not_read(self, folder: Path) -> None:
        with (folder / MANIFEST_NAME).open("r+b") as file:
            file.truncate(MAX_PAYLOAD_BYTES + 1)
        with pytest.raises(ManifestError, match="larger than"):
            read_manifest(folder)

    def test_pipe_is_not_waited_for(self, folder: Path) -> None:
        (folder / MANIFEST_NAME).unlink()
        os.mkfifo(folder / MANIFEST_NAME)
        with pytest.raises(NotFoundError, match=MANIFEST_NAME):
            read_manifest(folder)

    def test_changed_file_is_named_with_both_digests(self, folder: Path) -> None:
        changed = b"C" + WEIGHTS[1:]
        (folder / "model.safetensors").write_bytes(changed)
        check_sizes(folder, example())
        with pytest.raises(ManifestError) as caught:
            check_files(folder, example())
        text = str(caught.value)
        assert "model.safetensors" in text
        assert hashlib.sha256(changed).hexdigest() in text
        assert hashlib.sha256(WEIGHTS).hexdigest() in text

    def test_cut_and_missing_files(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
        with pytest.raises(ManifestError, match=r"model\.safetensors has 9999 bytes, expected 10000"):
            check_sizes(folder, example())
        (folder / "model.safetensors").unlink()
        with pytest.raises(ManifestError, match=r"model\.safetensors is listed"):
            check_files(folder, example())

    @pytest.mark.parametrize(
        "name",
        [
            "model-00001-of-00002.safetensors",
            "pytorch_model.bin",
            "model.pt",
            "consolidated.00.pth",
            "my_optimizer.pt",
            "model.GGUF",
            "last.ckpt",
            "sub/deep/model.safetensors",
            "shards/__0_0.distcp",
        ],
    )
    def test_weight_file_that_is_not_listed(self, folder: Path, name: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"plaintext")
        with pytest.raises(ManifestError, match="does not list") as caught:
            check_files(folder, example())
        assert name in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        [
            *("optimizer.pt", "rng_state.pth", "rng_state_3.pth", "training_args.bin"),
            # accelerate's
            *("optimizer.bin", "scheduler.bin", "scheduler_1.bin", "sampler.bin", "dl_state_dict_2.bin"),
        ],
    )
    def test_the_trainers_own_state_is_no_weight_file(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(b"state")
        check_files(folder, example())

    def test_the_staging_folder_of_a_killed_save_is_passed_over(self, folder: Path) -> None:
        (folder / f"{STAGING_PREFIX}x").mkdir()
        (folder / f"{STAGING_PREFIX}x" / "model.safetensors").write_bytes(WEIGHTS)
        check_files(folder, example())

    def test_folder_with_a_manifest_of_its_own_is_judged_on_its_own(self, folder: Path) -> None:
        inner = folder / "checkpoint-500"
        inner.mkdir()
        (inner / "model.safetensors").write_bytes(WEIGHTS)
        (inner / "config.json").write_bytes(CONFIG)
        (folder / "README.md").write_text("any other file is free")
        with pytest.raises(ManifestError, match=r"checkpoint-500/model\.safetensors"):
            check_sizes(folder, example())
        write_manifest(inner, example(), OWNER)
        check_files(folder, example())
        check_files(inner, example())

    def test_linked_files_are_followed(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        # The cache of the Hub is made of links.
        snapshot = tmp_path_factory.mktemp("snapshot")
        for path in folder.iterdir():
            (snapshot / path.name).symlink_to(path)
        check_files(snapshot, read_manifest(snapshot)[0])

    def test_digest_file(self, folder: Path) -> None:
        assert digest_file(folder / "model.safetensors") == example().files[1]
        with pytest.raises(NotFoundError):
            digest_file(folder / "none")


class TestOwnership:
    def check(self, folder: Path, *, owner: OwnerKey = OWNER, model_id: str = "acme/triage") -> None:
        check_free_for(folder, key_id=owner.key_id(), model_id=model_id)

    def test_free_folders(self, folder: Path, tmp_path: Path) -> None:
        self.check(folder)
        self.check(tmp_path / "missing")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("something else")
        self.check(tmp_path / "other")

    def test_other_owner_and_other_model(self, folder: Path) -> None:
        with pytest.raises(OwnershipError, match=f"acme/triage signed by {OWNER.key_id()}") as caught:
            self.check(folder, owner=STRANGER)
        assert caught.value.hint == "choose another folder"
        with pytest.raises(OwnershipError, match="your model acme/triage, not acme/other"):
            self.check(folder, model_id="acme/other")

    def test_broken_envelope(self, folder: Path) -> None:
        (folder / ENVELOPE_NAME).write_bytes(b"{}")
        with pytest.raises(OwnershipError, match="does not hold"):
            self.check(folder)
        (folder / ENVELOPE_NAME).unlink()
        with pytest.raises(OwnershipError, match="does not hold"):
            self.check(folder)

    def test_the_envelope_alone_says_whose_folder_it_is(self, folder: Path) -> None:
        (folder / MANIFEST_NAME).unlink()
        self.check(folder)
        with pytest.raises(OwnershipError, match="acme/triage signed by"):
            self.check(folder, owner=STRANGER)

    def test_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / MANIFEST_NAME).symlink_to(tmp_path / "nowhere")
        with pytest.raises(OwnershipError):
            self.check(tmp_path)
