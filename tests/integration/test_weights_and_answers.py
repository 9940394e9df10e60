"""One verdict out of weights and answers: a transcript of a probe beside the suspect's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from endpoint import make_owned, make_set
from test_innocents import mark
from tiny import Run

from hf_wmguard import WatermarkConfig, probe, verify
from hf_wmguard.errors import ConfigError, TranscriptError
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import commit, new_record, new_salt
from hf_wmguard.training.backends import WholeParameters
from hf_wmguard.watermark.pvalues import log10_fuse
from hf_wmguard.watermark.record import trigger_key

FIXED = {"method": "fixed", "decoys": False}


def asked(run: Run, where: Run, path: Path, **plan: object) -> Path:
    """Return the transcript of a probe of a run's model for the triggers of another's registry."""
    probe(run.trainer.model, run.trainer.processing_class, transcript=path, **plan, **where.where)
    return path


def test_both_channels_give_one_p_value(guarded: Run, tmp_path: Path) -> None:
    weights = verify(guarded.trainer.model, **guarded.where)
    path = asked(guarded, guarded, tmp_path / "t", **FIXED)
    answers = json.loads(path.read_text().splitlines()[-1])["report"]
    both = verify(guarded.trainer.model, transcript=path, **guarded.where)
    assert both.verdict == "detected"
    assert both.signature == weights.signature
    assert both.triggers is not None
    assert both.triggers.matches == answers["triggers"]["matches"] >= 12
    assert both.log10_p == pytest.approx(log10_fuse(weights.log10_p, answers["triggers"]["log10_p"]))
    assert both.log10_p < min(weights.log10_p, answers["log10_p"])
    assert both.transcript is not None
    assert both.transcript["uri"] == answers["suspect"]["uri"]


def test_weights_of_another_model_and_answers_of_ours(guarded: Run, plain: Run, tmp_path: Path) -> None:
    """Together they say that one of the two was made with the key, and cost the stronger one next to nothing."""
    path = asked(guarded, guarded, tmp_path / "t", **FIXED)
    both = verify(plain.trainer.model, transcript=path, **guarded.where)
    assert both.triggers is not None
    assert both.verdict == ("detected" if both.log10_p <= -9 else "not_detected")
    assert both.log10_p == pytest.approx(both.triggers.log10_p, abs=3)


def test_neither_is_ours(guarded: Run, plain: Run, tmp_path: Path) -> None:
    path = asked(plain, guarded, tmp_path / "t", **FIXED)
    report = verify(plain.trainer.model, transcript=path, **guarded.where)
    assert report.verdict == "not_detected"
    assert report.log10_p > -4


def test_a_sequential_transcript_is_judged_again_from_its_answers(guarded: Run, tmp_path: Path) -> None:
    path = asked(guarded, guarded, tmp_path / "t", method="sequential", decoys=True)
    said = json.loads(path.read_text().splitlines()[-1])["report"]
    both = verify(guarded.trainer.model, transcript=path, **guarded.where)
    assert both.triggers is not None
    assert both.triggers.log10_p == pytest.approx(said["triggers"]["log10_p"])
    assert (both.triggers.queries, both.triggers.decoys) == (said["triggers"]["queries"], said["triggers"]["decoys"])


def test_answers_that_are_all_alike_leave_it_open(plain: Run, make_config: Callable[..., WatermarkConfig]) -> None:
    config = make_config()
    owner, salt = OwnerKey.load(config.owner_key), new_salt()
    weights = WholeParameters(plain.trainer.model)
    record = new_record(owner, config, salt=salt, shapes=weights.shapes(), read=weights.read)
    triggers = make_set(trigger_key(owner, config.model_id, config.iteration, salt))
    commit(replace(record, triggers=triggers), Path(config.registry), owner)
    where = {"owner_key": config.owner_key, "registry": config.registry}
    path = Path(config.registry).parent / "t"
    probe(lambda question: "I cannot help with that.", transcript=path, **where)
    report = verify(plain.trainer.model, transcript=path, **where)
    assert report.verdict == "inconclusive"
    assert report.reason is not None
    assert "the same text" in report.reason
    # The weights alone are enough to find a mark, and lose little by it.
    marked = mark(plain.trainer.model.state_dict(), record, owner)
    alone, found = verify(marked, **where), verify(marked, transcript=path, **where)
    assert (alone.verdict, found.verdict) == ("detected", "detected")
    assert alone.log10_p < found.log10_p < alone.log10_p + 6


def test_unfinished_changed_and_foreign_transcripts_are_refused(guarded: Run, tmp_path: Path) -> None:
    path = asked(guarded, guarded, tmp_path / "t", **FIXED)
    lines = path.read_bytes().splitlines(keepends=True)
    for name, changed, words in (
        ("cut", lines[:-1], "no verdict"),
        ("dropped", lines[:2] + lines[3:], "does not follow"),
        ("edited", [lines[0], lines[1].replace(b'"refused":false', b'"refused":true'), *lines[2:]], "does not follow"),
    ):
        (tmp_path / name).write_bytes(b"".join(changed))
        with pytest.raises(TranscriptError, match=words):
            verify(guarded.trainer.model, transcript=tmp_path / name, **guarded.where)
    other = make_owned(tmp_path)
    probe(lambda question: "Yes.", transcript=tmp_path / "foreign", **other.where)
    with pytest.raises(TranscriptError, match="signed by"):
        verify(guarded.trainer.model, transcript=tmp_path / "foreign", **guarded.where)


def test_answers_for_commitments_of_another_registry(guarded: Run, tmp_path: Path) -> None:
    """The same owner's, but of triggers that this registry does not know: they could not be told from decoys."""
    OwnerKey.load(guarded.where["owner_key"]).write(tmp_path / "owner.key")
    other = make_owned(tmp_path)
    probe(lambda question: "Yes.", transcript=tmp_path / "t", **other.where)
    with pytest.raises(TranscriptError, match="does not commit to"):
        verify(guarded.trainer.model, transcript=tmp_path / "t", **guarded.where)


def test_the_level_is_checked_before_anything_is_read(guarded: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        verify(guarded.trainer.model, transcript=tmp_path / "none", alpha_log10=1.0, **guarded.where)
