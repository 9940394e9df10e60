"""Transcripts: chained, signed, gone on with after a crash, and refused after any change."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_wmguard.canonical import canonical_json, encode_base64
from hf_wmguard.errors import AuthenticationError, ConfigError, EnvironmentFault, TranscriptError, UsageError
from hf_wmguard.evidence.recording import Transcript
from hf_wmguard.evidence.signing import make_signature
from hf_wmguard.evidence.transcript import (
    MAX_LINE_BYTES,
    VERDICT_TYPE,
    Asked,
    check_transcript,
    hash_line,
    read_transcript,
)
from hf_wmguard.keys import OwnerKey

OWNER = OwnerKey(bytes(range(32)))
OTHER = OwnerKey(bytes(range(1, 33)))
PLAN = {"owner": OWNER.key_id(), "tries": 1, "system": None}
REPORT = {"verdict": "not_detected", "log10_p": -0.5}


def write(path: Path, count: int = 3, *, finish: bool = True, owner: OwnerKey = OWNER) -> Path:
    with Transcript(path, {**PLAN, "owner": owner.key_id()}, owner) as transcript:
        for i in range(count):
            transcript.append(Asked(prompt=f"question {i}", text=f"answer {i}", ranked=("a", "b")))
        if finish:
            transcript.finish(REPORT)
    return path


def signer(owner: OwnerKey = OWNER):
    return owner.signing_key().public_key()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    contents = check_transcript(write(tmp_path / "t"), signer())
    assert [one.prompt for one in contents.asked] == ["question 0", "question 1", "question 2"]
    assert contents.asked[0].ranked == ("a", "b")
    assert contents.report == REPORT
    assert contents.plan == PLAN
    assert contents.key_id == OWNER.key_id()


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.touch(mode=0o644)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_answer_is_in_the_file_before_the_next_question(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Transcript(path, PLAN, OWNER) as transcript:
        for i in range(3):
            transcript.append(Asked(prompt=f"question {i}", refused=True))
            assert len(read_transcript(path).asked) == i + 1


def test_an_unfinished_one_is_gone_on_with(tmp_path: Path) -> None:
    path = write(tmp_path / "t", 2, finish=False)
    seed = read_transcript(path).seed
    with Transcript(path, PLAN, OWNER) as transcript:
        assert [one.prompt for one in transcript.asked] == ["question 0", "question 1"]
        assert transcript.seed == seed
        transcript.append(Asked(prompt="question 2", text="x"))
        transcript.finish(REPORT)
    assert len(check_transcript(path, signer()).asked) == 3


def test_a_finished_one_gets_no_second_verdict(tmp_path: Path) -> None:
    path = write(tmp_path / "t")
    before = path.read_bytes()
    with Transcript(path, PLAN, OWNER) as transcript:
        assert transcript.is_finished
        transcript.finish(REPORT)
    assert path.read_bytes() == before


@pytest.mark.parametrize("left", [1, 20, 100])
def test_a_torn_last_line_is_dropped(tmp_path: Path, left: int) -> None:
    path = write(tmp_path / "t", 2, finish=False)
    whole = path.read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole + line[:left])
    with pytest.raises(TranscriptError, match="cut off"):
        read_transcript(path)
    with Transcript(path, PLAN, OWNER) as transcript:
        assert len(transcript.asked) == 2
    assert path.read_bytes() == whole


def test_another_plan_is_refused_by_its_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "t", finish=False)
    with pytest.raises(ConfigError, match="another plan: 'system', 'tries' differ"):
        Transcript(path, {**PLAN, "tries": 2, "system": "Be kind."}, OWNER)
    with pytest.raises(ConfigError, match="'system'"):
        Transcript(path, {name: value for name, value in PLAN.items() if name != "system"}, OWNER)
    with pytest.raises(AuthenticationError, match="another owner key"):
        Transcript(path, {**PLAN, "owner": OTHER.key_id()}, OTHER)


def test_before_the_first_answer_the_plan_may_change(tmp_path: Path) -> None:
    path = write(tmp_path / "t", 0, finish=False)
    with Transcript(path, {**PLAN, "tries": 2}, OWNER):
        pass
    assert read_transcript(path).plan["tries"] == 2


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, lines[0]],
        lambda lines: [lines[0], lines[1].replace(b"answer 0", b"answer 9"), *lines[2:]],
        lambda lines: [lines[0].replace(b'"tries":1', b'"tries":2'), *lines[1:]],
        lambda lines: [*lines[:-1], lines[-1].replace(b"not_detected", b"detected")],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"kind"', b'"kinD"')],
        lambda lines: [*lines[:-1], b"{}"],
        lambda lines: [lines[0], b"[" * 100_000, *lines[1:]],
        lambda lines: [],
    ],
    ids=[
        "dropped",
        "swapped",
        "doubled",
        "headless",
        "ended-twice",
        "begun-twice",
        "answer",
        "plan",
        "report",
        "field",
        "empty",
        "deep",
        "nothing",
    ],
)
def test_any_change_is_refused(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = write(tmp_path / "t")
    rewrite(path, change)
    with pytest.raises(TranscriptError):
        check_transcript(path, signer())


def test_cut_before_the_verdict_it_is_unfinished(tmp_path: Path) -> None:
    path = write(tmp_path / "t")
    rewrite(path, lambda lines: lines[:-1])
    assert read_transcript(path).report is None
    with pytest.raises(TranscriptError, match="no verdict"):
        check_transcript(path, signer())


def test_another_signer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t", owner=OTHER)
    with pytest.raises(TranscriptError, match="is signed by"):
        check_transcript(path, signer())


def test_a_chain_made_anew_does_not_fit_the_signature(tmp_path: Path) -> None:
    path = write(tmp_path / "t")

    def forge(lines: list[bytes]) -> list[bytes]:
        values = [json.loads(line) for line in lines]
        values[1]["text"] = "another answer"
        for i in range(1, len(values)):
            values[i]["prev"] = hash_line(canonical_json(values[i - 1]))
        return [canonical_json(value) for value in values]

    rewrite(path, forge)
    assert read_transcript(path).asked[0].text == "another answer"
    with pytest.raises(TranscriptError, match="signature does not match"):
        check_transcript(path, signer())
    with pytest.raises(TranscriptError, match="signature does not match"):
        Transcript(path, PLAN, OWNER)


def test_a_signature_for_something_else_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t")

    def resign(lines: list[bytes]) -> list[bytes]:
        value = json.loads(lines[-1])
        del value["signature"]
        signature = make_signature(canonical_json(value), VERDICT_TYPE + "x", OWNER.signing_key())
        return [*lines[:-1], canonical_json(value | {"signature": encode_base64(signature)})]

    rewrite(path, resign)
    with pytest.raises(TranscriptError, match="signature does not match"):
        check_transcript(path, signer())


def test_what_is_longer_than_any_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Transcript(path, PLAN, OWNER) as transcript, pytest.raises(UsageError, match="bytes"):
        transcript.append(Asked(prompt="x" * MAX_LINE_BYTES))
    with Transcript(path, PLAN, OWNER) as transcript:
        transcript.append(Asked(prompt="x", text="y" * 20_000))
    with pytest.raises(TranscriptError, match="longer than any"):
        read_transcript(path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with Transcript(path, PLAN, OWNER), pytest.raises(UsageError, match="another process"):
        Transcript(path, PLAN, OWNER)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_link_a_folder_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("link", "."):
        with pytest.raises(EnvironmentFault):
            Transcript(tmp_path / name, PLAN, OWNER)
    with pytest.raises(EnvironmentFault, match="no folder"):
        Transcript(tmp_path / "none" / "t", PLAN, OWNER)
    with Transcript(tmp_path / "t", PLAN, OWNER) as transcript:
        monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
        with pytest.raises(EnvironmentFault, match="disk full"):
            transcript.append(Asked(prompt="x"))
