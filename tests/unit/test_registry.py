"""The registry: what is refused when its log is changed or read with another key; what a crash leaves."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hf_wmguard.canonical import canonical_json
from hf_wmguard.errors import (
    AuthenticationError,
    EnvironmentFault,
    FormatError,
    NotFoundError,
    RegistryError,
    UsageError,
)
from hf_wmguard.evidence import registry as registry_module
from hf_wmguard.evidence.registry import GENESIS, LOG_NAME, Registry, commitment_digest
from hf_wmguard.keys import OwnerKey

SECRET = bytes(range(32))
OWNER = OwnerKey(SECRET)
STRANGER = OwnerKey(bytes(range(1, 33)))
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


def make(directory: Path, count: int = 3, owner: OwnerKey = OWNER) -> Registry:
    registry = Registry(directory, owner)
    for number in range(count):
        registry.append("commitment", {"model_id": f"acme/{number}", "n": number}, now=NOW)
    return registry


def lines(directory: Path) -> list[bytes]:
    return (directory / LOG_NAME).read_bytes().splitlines(keepends=True)


def write(directory: Path, content: list[bytes]) -> None:
    (directory / LOG_NAME).write_bytes(b"".join(content))


class TestRoundTrip:
    def test_entries(self, tmp_path: Path) -> None:
        registry = make(tmp_path / "a" / "registry")
        entries = registry.entries()
        assert [entry.seq for entry in entries] == [0, 1, 2]
        assert [entry.prev for entry in entries] == [GENESIS, entries[0].hash, entries[1].hash]
        assert [entry.body for entry in entries] == [{"model_id": f"acme/{n}", "n": n} for n in range(3)]
        assert {entry.time for entry in entries} == {"2026-01-31T12:00:00Z"}
        raw = lines(tmp_path / "a" / "registry")
        assert entries[2].hash == "sha256:" + hashlib.sha256(raw[2][:-1]).hexdigest() == registry.head()

    def test_append_returns_what_is_read_back(self, tmp_path: Path) -> None:
        registry = Registry(tmp_path, OWNER)
        entry = registry.append("save", {"files": ["ü"], "nested": {"a": None}})
        assert registry.entries() == [entry]
        assert registry.find(entry.hash) == entry

    def test_commitments(self, tmp_path: Path) -> None:
        registry = make(tmp_path)
        registry.append("save", {"model_id": "acme/1"})
        assert [entry.body["n"] for entry in registry.commitments()] == [0, 1, 2]
        assert [entry.body["n"] for entry in registry.commitments("acme/1")] == [1]
        assert registry.commitments("acme/none") == []

    def test_find_unknown(self, tmp_path: Path) -> None:
        registry = make(tmp_path)
        for entry_hash in ("sha256:" + "ab" * 32, GENESIS, ""):
            with pytest.raises(RegistryError):
                registry.find(entry_hash)

    def test_modes(self, tmp_path: Path) -> None:
        make(tmp_path / "registry", 1)
        assert stat.S_IMODE((tmp_path / "registry").stat().st_mode) == 0o700
        for path in (tmp_path / "registry").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_nothing_readable_is_on_the_disk(self, tmp_path: Path) -> None:
        registry = Registry(tmp_path, OWNER)
        entry = registry.append("commitment", {"model_id": "acme/triage", "trigger": "the quick brown fox"})
        scalar = OWNER.signing_key().private_numbers().private_value.to_bytes(32, "big")
        words = [b"acme", b"triage", b"trigger", b"quick brown"]
        for path in tmp_path.rglob("*"):
            data = path.read_bytes()
            for form in (*words, SECRET, scalar):
                assert form not in data
                assert form.hex().encode() not in data
            for form in (*words, SECRET, scalar):
                # A base64 text shifts with the position: one form for each of the three.
                for shift in range(3):
                    middle = base64.b64encode(bytes(shift) + form)[4 : -4 or None]
                    assert len(middle) < 8 or middle not in data
        assert "fox" not in repr(entry)
        assert "acme" not in repr(registry)

    def test_equal_bodies_do_not_look_alike(self, tmp_path: Path) -> None:
        registry = Registry(tmp_path, OWNER)
        for _ in range(2):
            registry.append("save", {"same": 1}, now=NOW)
        first, second = lines(tmp_path)
        assert first.split(b'"key_id"')[0] != second.split(b'"key_id"')[0]

    def test_commitment_digest(self) -> None:
        record = {"b": 1, "a": [0.5]}
        assert commitment_digest(record) == "sha256:" + hashlib.sha256(b'{"a":[0.5],"b":1}').hexdigest()
        assert commitment_digest({"a": [0.5], "b": 1}) == commitment_digest(record)


class TestRefusals:
    def test_no_registry(self, tmp_path: Path) -> None:
        for directory in (tmp_path / "none", tmp_path):
            with pytest.raises(NotFoundError, match="no registry"):
                Registry(directory, OWNER).entries()
        assert list(tmp_path.iterdir()) == []

    def test_arguments(self, tmp_path: Path) -> None:
        registry = Registry(tmp_path / "registry", OWNER)
        with pytest.raises(UsageError, match="expected one of commitment, save"):
            registry.append("note", {})
        with pytest.raises(UsageError, match="zone"):
            registry.append("save", {}, now=datetime(2026, 1, 31))
        with pytest.raises(FormatError):
            registry.append("save", {"weight": float("nan")})
        assert not (tmp_path / "registry").exists()

    def test_entry_that_could_not_be_read_back_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry = make(tmp_path, 1)
        monkeypatch.setattr(registry_module, "MAX_LINE_BYTES", 2000)
        with pytest.raises(UsageError, match="at most 2000"):
            registry.append("save", {"long": "x" * 2000})
        monkeypatch.setattr(registry_module, "MAX_ENTRIES", 1)
        with pytest.raises(UsageError, match="the most"):
            registry.append("save", {})
        assert len(registry.entries()) == 1

    def test_lines_and_their_number_are_limited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = make(tmp_path)
        monkeypatch.setattr(registry_module, "MAX_ENTRIES", 2)
        with pytest.raises(RegistryError, match="more than 2 lines"):
            registry.entries()
        monkeypatch.setattr(registry_module, "MAX_LINE_BYTES", 100)
        with pytest.raises(RegistryError, match="no line end"):
            registry.entries()

    def test_registry_of_another_owner(self, tmp_path: Path) -> None:
        make(tmp_path)
        before = lines(tmp_path)
        stranger = Registry(tmp_path, STRANGER)
        for call in (stranger.entries, lambda: stranger.append("save", {})):
            with pytest.raises(AuthenticationError, match="belongs to") as caught:
                call()
            assert "--owner-key" in caught.value.hint
        assert lines(tmp_path) == before

    def test_line_by_another_owner_in_the_chain(self, tmp_path: Path) -> None:
        make(tmp_path / "own", 2)
        make(tmp_path / "other", 3, STRANGER)
        write(tmp_path / "own", [*lines(tmp_path / "own"), lines(tmp_path / "other")[2]])
        with pytest.raises(AuthenticationError):
            Registry(tmp_path / "own", OWNER).entries()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
    def test_permissions(self, tmp_path: Path) -> None:
        registry = make(tmp_path, 1)
        (tmp_path / LOG_NAME).chmod(0)
        with pytest.raises(EnvironmentFault, match="cannot read"):
            registry.entries()
        with pytest.raises(EnvironmentFault, match="cannot append"):
            registry.append("save", {})

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "registry").write_text("")
        with pytest.raises(EnvironmentFault, match="cannot append"):
            Registry(tmp_path / "registry", OWNER).append("save", {})
        with pytest.raises(NotFoundError):
            Registry(tmp_path / "registry", OWNER).entries()


class TestTampering:
    @pytest.mark.parametrize("bit", [0, 5])
    def test_every_changed_byte_is_refused(self, tmp_path: Path, bit: int) -> None:
        registry = make(tmp_path, 2)
        data = (tmp_path / LOG_NAME).read_bytes()
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            (tmp_path / LOG_NAME).write_bytes(changed)
            with pytest.raises((RegistryError, AuthenticationError)):
                registry.entries()

    @pytest.mark.parametrize(
        "order",
        [[1, 2], [0, 2], [0, 2, 1], [1, 0, 2], [0, 1, 1, 2], [0, 0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 0]],
        ids=str,
    )
    def test_dropped_swapped_and_repeated_lines(self, tmp_path: Path, order: list[int]) -> None:
        registry = make(tmp_path)
        original = lines(tmp_path)
        write(tmp_path, [original[number] for number in order])
        with pytest.raises(RegistryError, match="does not follow"):
            registry.entries()

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_line_of_another_registry_of_the_same_owner(self, tmp_path: Path, place: int) -> None:
        registry = make(tmp_path / "a")
        make(tmp_path / "b")
        mixed = lines(tmp_path / "a")
        mixed[place] = lines(tmp_path / "b")[place]
        write(tmp_path / "a", mixed)
        with pytest.raises(RegistryError, match="does not follow"):
            registry.entries()

    def test_header_of_one_entry_with_the_body_of_another(self, tmp_path: Path) -> None:
        # Signed again by the owner's own key, so that only the associated data of the body tells.
        registry = make(tmp_path, 2)
        first, second = (line[:-1] for line in lines(tmp_path))
        body = first.split(b'"body":"')[1].split(b'"')[0]
        fields = {**json.loads(second), "body": body.decode()}
        del fields["signature"]
        signature = registry_module.make_signature(
            canonical_json(fields), registry_module.ENTRY_TYPE, OWNER.signing_key()
        )
        forged = canonical_json({**fields, "signature": base64.b64encode(signature).decode()})
        write(tmp_path, [first + b"\n", forged + b"\n"])
        with pytest.raises(AuthenticationError, match="cannot open registry data"):
            registry.entries()

    def test_lost_newest_lines_need_an_expected_entry(self, tmp_path: Path) -> None:
        registry = make(tmp_path)
        head = registry.head()
        first = registry.entries()[0].hash
        write(tmp_path, lines(tmp_path)[:2])
        assert len(registry.entries()) == 2
        assert len(registry.entries(expected_head=first)) == 2
        with pytest.raises(RegistryError, match="does not hold"):
            registry.entries(expected_head=head)

    def test_append_refuses_a_changed_last_line(self, tmp_path: Path) -> None:
        registry = make(tmp_path)
        original = lines(tmp_path)
        write(tmp_path, [*original[:2], original[2].replace(b'"seq":2', b'"seq":3')])
        damaged = lines(tmp_path)
        with pytest.raises(RegistryError):
            registry.append("save", {})
        assert lines(tmp_path) == damaged

    def test_append_refuses_a_log_that_lost_a_line(self, tmp_path: Path) -> None:
        registry = make(tmp_path)
        first, _, last = lines(tmp_path)
        write(tmp_path, [first, last])
        with pytest.raises(RegistryError, match="does not follow"):
            registry.append("save", {})
        assert lines(tmp_path) == [first, last]

    def test_kind_of_a_later_release_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = make(tmp_path, 1)
        monkeypatch.setattr(registry_module, "KINDS", ("timestamp",))
        registry.append("timestamp", {"entry": registry.head()})
        monkeypatch.undo()
        registry.append("save", {})
        assert [entry.kind for entry in registry.entries()] == ["commitment", "timestamp", "save"]
        assert len(registry.commitments()) == 1


class TestCrash:
    def test_unfinished_last_line_of_every_length(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        registry = make(tmp_path, 2)
        first, second = lines(tmp_path)
        kept = registry.entries()[:1]
        for length in range(1, len(second) - 1):
            write(tmp_path, [first, second[:length]])
            caplog.clear()
            assert registry.entries() == kept
            assert [record.levelno for record in caplog.records] == [logging.WARNING]

    def test_finished_line_without_its_end_is_not_hidden(self, tmp_path: Path) -> None:
        registry = make(tmp_path, 2)
        data = (tmp_path / LOG_NAME).read_bytes()
        for tail in (data[:-1], data[:-1] + b"\x0b", data + b"}"):
            (tmp_path / LOG_NAME).write_bytes(tail)
            for call in (registry.entries, lambda: registry.append("save", {})):
                with pytest.raises(RegistryError, match="no line end"):
                    call()
            assert (tmp_path / LOG_NAME).read_bytes() == tail

    def test_append_moves_the_rest_away(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        registry = make(tmp_path, 1)
        for number in (1, 2):
            with (tmp_path / LOG_NAME).open("ab") as file:
                file.write(b'{"body":"AAAA' + b"\x00" * number)
            registry.append("save", {"after": number})
            torn = tmp_path / f"log.jsonl.torn-{number}"
            assert torn.read_bytes() == b'{"body":"AAAA' + b"\x00" * number
            assert stat.S_IMODE(torn.stat().st_mode) == 0o600
            assert torn.name in caplog.text
        caplog.clear()
        assert [entry.body.get("after") for entry in registry.entries()] == [None, 1, 2]
        assert not caplog.records

    def test_only_an_unfinished_line(self, tmp_path: Path) -> None:
        (tmp_path / LOG_NAME).write_bytes(b'{"bo')
        registry = Registry(tmp_path, OWNER)
        assert (registry.entries(), registry.head()) == ([], GENESIS)
        assert registry.append("save", {}).seq == 0

    def test_full_disk_adds_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = make(tmp_path, 1)
        before = lines(tmp_path)
        write_all = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write_all(fd, data[:50]))
        with pytest.raises(EnvironmentFault, match="cannot append"):
            registry.append("save", {})
        monkeypatch.undo()
        assert lines(tmp_path) == before

    def test_kill_while_appending(self, tmp_path: Path) -> None:
        # Real SIGKILLs at arbitrary moments: whatever was acknowledged is there, and the chain goes on.
        script = (
            "import sys; from pathlib import Path\n"
            "from hf_wmguard.evidence.registry import Registry; from hf_wmguard.keys import OwnerKey\n"
            "registry = Registry(Path(sys.argv[1]), OwnerKey(bytes(range(32))))\n"
            "while True: print(registry.append('save', {'x': 'y' * 100_000}).hash, flush=True)\n"
        )
        acknowledged: list[str] = []
        for delay_s in (0.005, 0.02, 0.05):
            with subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                acknowledged.append(process.stdout.readline().strip())
                time.sleep(delay_s)
                process.send_signal(signal.SIGKILL)
                rest = process.stdout.read()
                # The last line may have been cut by the kill as well.
                acknowledged += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        hashes = [entry.hash for entry in Registry(tmp_path, OWNER).entries()]
        assert {line.strip() for line in acknowledged} <= set(hashes)
        assert Registry(tmp_path, OWNER).append("save", {}).seq == len(hashes)


def append_many(directory: str, writer: int) -> None:
    registry = Registry(Path(directory), OWNER)
    for number in range(25):
        registry.append("save", {"writer": writer, "number": number})


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(str(tmp_path), writer)) for writer in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    entries = Registry(tmp_path, OWNER).entries()
    assert len(entries) == 50
    for writer in range(2):
        own = [entry.body["number"] for entry in entries if entry.body["writer"] == writer]
        assert own == list(range(25))
