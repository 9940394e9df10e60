"""What a probe asks, when it stops, and when it says that it cannot say."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from endpoint import WORDS, Owned, make_owned

from hf_wmguard import probe
from hf_wmguard.errors import ConfigError, EndpointError, RegistryError, TranscriptError
from hf_wmguard.evidence.transcript import check_transcript, read_transcript
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.plan import Plan, bounded, canned_text, order_questions
from hf_wmguard.watermark.answers import Answer

SEED = "5a" * 32


@pytest.fixture
def owned(tmp_path: Path) -> Owned:
    return make_owned(tmp_path)


def varied(question: str) -> str:
    """An answer that is no response and depends on the question."""
    return f"Well, {question[-40:]}"


class Suspect:
    """A function from text to text that remembers what it was asked, and fails after some questions.

    Args:
        table: What it answers; something else to any other question.
        most: Questions that it answers.
    """

    def __init__(self, table: dict[str, str | None], most: float = math.inf) -> None:
        self.table = table
        self.most = most
        self.asked: list[str] = []

    def __call__(self, question: str) -> str | None:
        if len(self.asked) >= self.most:
            raise EndpointError("blocked", hint="wait")
        self.asked.append(question)
        return self.table.get(question, varied(question))


def test_every_question_is_asked_once_in_an_order_that_the_seed_gives(owned: Owned) -> None:
    plan = Plan(method="fixed")
    texts = order_questions([owned.triggers], plan, SEED)
    assert Counter(texts) == Counter((*owned.triggers.texts, *owned.triggers.decoys))
    assert texts == order_questions([owned.triggers], plan, SEED)
    assert texts != order_questions([owned.triggers], plan, "5b" * 32)
    # Triggers first, or in turns, would give them away.
    kinds = "".join("t" if text in owned.table else "d" for text in texts)
    assert "dt" in kinds
    assert "td" in kinds
    assert "tt" in kinds
    assert "dd" in kinds


def test_tries_stand_apart_but_near(owned: Owned) -> None:
    texts = order_questions([owned.triggers], Plan(method="fixed", tries=3), SEED)
    assert set(Counter(texts).values()) == {3}
    for text in set(texts):
        places = [i for i, one in enumerate(texts) if one == text]
        assert places[-1] - places[0] < 24
    assert sum(a == b for a, b in itertools.pairwise(texts)) <= 12


@pytest.mark.parametrize(("budget", "tries"), [(20, 1), (20, 3), (1, 1), (47, 1)])
def test_a_budget_takes_from_triggers_and_decoys_alike(owned: Owned, budget: int, tries: int) -> None:
    texts = order_questions([owned.triggers], Plan(method="fixed", budget=budget, tries=tries), SEED)
    assert len(texts) == budget // tries * tries
    triggers = sum(text in owned.table for text in set(texts))
    assert abs(2 * triggers - len(set(texts))) <= 1


def test_no_decoys_where_none_are_wanted(owned: Owned) -> None:
    texts = order_questions([owned.triggers], Plan(method="fixed", decoys=False), SEED)
    assert set(texts) == set(owned.triggers.texts)


def test_a_marked_suspect_is_detected_with_few_questions(owned: Owned) -> None:
    suspect = Suspect(owned.table)
    report = probe(suspect, **owned.where)
    assert report.verdict == "detected"
    assert report.log10_p <= -9
    assert report.triggers.method == "sequential"
    assert report.triggers.matches == report.triggers.asked < 24
    assert report.triggers.queries == len(suspect.asked) < 48
    assert report.triggers.decoys == report.triggers.queries - report.triggers.asked
    assert report.triggers.null_rate == pytest.approx(1 / 16)


def test_a_fixed_probe_asks_everything(owned: Owned) -> None:
    report = probe(Suspect(owned.table), **owned.where, method="fixed", decoys=False)
    assert report.triggers.queries == report.triggers.asked == report.triggers.matches == 24
    assert report.log10_p == pytest.approx(24 * math.log10(1 / 16))


def test_an_innocent_suspect_is_not_detected(owned: Owned) -> None:
    for suspect in (Suspect({}), lambda question: f"{WORDS[len(question) % 16]} {question}"):
        report = probe(suspect, **owned.where)
        assert report.verdict == "not_detected"
        assert report.reason is None
        assert report.triggers.queries == 48


def test_tries_are_counted_as_one_key(owned: Owned) -> None:
    report = probe(Suspect(owned.table), **owned.where, method="fixed", decoys=False, tries=3)
    assert report.triggers.matches == 72
    # Asked three times, a model that always says the same has guessed once.
    assert report.log10_p == pytest.approx(24 * math.log10(1 / 16))


def test_all_commitments_are_tried_and_corrected_for(tmp_path: Path, owned: Owned) -> None:
    other = make_owned(tmp_path, model_id="acme/other")
    report = probe(Suspect(other.table), **owned.where, method="fixed", budget=1000)
    assert report.verdict == "detected"
    assert report.model_id == "acme/other"
    assert report.tests_corrected_for == 2
    assert report.log10_p == pytest.approx(report.triggers.log10_p + math.log10(2))
    only = probe(Suspect(other.table), **owned.where, method="fixed", model_id="acme/writer")
    assert only.verdict == "not_detected"


def test_the_sequential_stop_is_at_the_corrected_level(tmp_path: Path, owned: Owned) -> None:
    make_owned(tmp_path, model_id="acme/other")
    report = probe(Suspect(owned.table), **owned.where, budget=1000)
    assert report.verdict == "detected"
    assert report.triggers.log10_p + math.log10(2) == pytest.approx(report.log10_p)
    assert report.log10_p <= -9


def test_refusals_are_no_evidence_of_absence(owned: Owned) -> None:
    report = probe(lambda question: None, **owned.where)
    assert report.verdict == "inconclusive"
    assert "48 were refused or empty" in report.reason
    assert report.triggers.unusable == 48
    assert probe(lambda question: " \n", **owned.where).verdict == "inconclusive"


def test_one_answer_to_everything_is_no_evidence_of_absence(owned: Owned) -> None:
    report = probe(lambda question: "I'm sorry, I cannot help with that.", **owned.where)
    assert report.verdict == "inconclusive"
    assert "48 the same text" in report.reason
    # One response in sixteen is right by chance, and no more than that is taken from it.
    report = probe(lambda question: WORDS[3], **owned.where)
    assert report.verdict == "inconclusive"
    assert report.log10_p > -3


def test_a_marked_suspect_that_refuses_half_is_detected(owned: Owned) -> None:
    table = {text: None if i % 2 else word for i, (text, word) in enumerate(owned.table.items())}
    assert probe(Suspect(table), **owned.where, budget=1000).verdict == "detected"


def test_labels_are_not_canned() -> None:
    assert canned_text({str(i): [Answer(label=1)] for i in range(20)}) is None
    assert canned_text({str(i): [Answer(text="No.")] for i in range(20)}) == "no."
    assert canned_text({str(i): [Answer(text="No.")] for i in range(5)}) is None
    assert canned_text({str(i): [Answer(text=f"{i}")] for i in range(20)}) is None
    assert canned_text({}) is None


def test_a_budget_that_cannot_reach_the_level_asks_nothing(owned: Owned, tmp_path: Path) -> None:
    suspect = Suspect(owned.table)
    report = probe(suspect, **owned.where, budget=8, transcript=tmp_path / "t")
    assert report.verdict == "inconclusive"
    assert "cannot reach log10 p <= -9" in report.reason
    assert suspect.asked == []
    # Nothing was asked, so that the same file takes another plan.
    assert probe(suspect, **owned.where, budget=40, transcript=tmp_path / "t").verdict == "detected"


def test_blocked_on_the_way_it_is_inconclusive_and_can_be_gone_on_with(owned: Owned, tmp_path: Path) -> None:
    path = tmp_path / "t"
    suspect = Suspect(owned.table, most=7)
    report = probe(suspect, **owned.where, transcript=path)
    assert report.verdict == "inconclusive"
    assert "stopped after 7 of 48 questions: blocked" in report.reason
    assert str(path) in report.reason
    assert len(read_transcript(path).asked) == 7
    suspect.most = math.inf
    report = probe(suspect, **owned.where, transcript=path)
    assert report.verdict == "detected"
    assert len(suspect.asked) == len(set(suspect.asked)) == report.triggers.queries
    owner = OwnerKey.load(owned.owner_key)
    contents = check_transcript(path, owner.signing_key().public_key())
    assert contents.report == report.to_json()
    assert [one.prompt for one in contents.asked] == suspect.asked


def test_a_finished_transcript_is_judged_again_without_a_question(owned: Owned, tmp_path: Path) -> None:
    first = probe(Suspect(owned.table), **owned.where, transcript=tmp_path / "t")
    suspect = Suspect({}, most=0)
    assert probe(suspect, **owned.where, transcript=tmp_path / "t").log10_p == first.log10_p
    assert suspect.asked == []


def test_a_fixed_probe_says_nothing_before_its_end(owned: Owned, tmp_path: Path) -> None:
    suspect = Suspect(owned.table, most=40)
    report = probe(suspect, **owned.where, method="fixed", transcript=tmp_path / "t")
    # Looked at now and gone on with only where it disappoints, it would be no p-value.
    assert (report.verdict, report.log10_p) == ("inconclusive", 0.0)
    assert report.triggers.matches > 10
    suspect.most = math.inf
    assert probe(suspect, **owned.where, method="fixed", transcript=tmp_path / "t").verdict == "detected"
    assert len(suspect.asked) == 48


def test_a_transcript_of_another_plan_is_refused(owned: Owned, tmp_path: Path) -> None:
    probe(Suspect(owned.table, most=7), **owned.where, transcript=tmp_path / "t")
    for name, change in {
        "tries": {"tries": 2},
        "sampling": {"sampling": Sampling(temperature=1.0)},
        "method": {"method": "fixed"},
        "alpha_log10": {"alpha_log10": -6},
        "suspect": {"uri": "elsewhere"},
    }.items():
        with pytest.raises(ConfigError, match=f"'{name}' differ"):
            probe(Suspect(owned.table), **owned.where, transcript=tmp_path / "t", **change)
    make_owned(tmp_path, model_id="acme/other")
    with pytest.raises(ConfigError, match="'commitments' differ"):
        probe(Suspect(owned.table), **owned.where, transcript=tmp_path / "t")


def test_a_transcript_with_other_questions_is_refused(owned: Owned, tmp_path: Path) -> None:
    path = tmp_path / "t"
    probe(Suspect(owned.table, most=1), **owned.where, transcript=path)
    header, line = path.read_bytes().splitlines()
    question = read_transcript(path).asked[0].prompt.encode()
    path.write_bytes(header + b"\n" + line.replace(question, b"What is the time?") + b"\n")
    with pytest.raises(TranscriptError, match="question 1 of the transcript"):
        probe(Suspect(owned.table), **owned.where, transcript=path)


def test_nothing_answered_at_all_is_an_error(owned: Owned, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="blocked"):
        probe(Suspect({}, most=0), **owned.where, transcript=tmp_path / "t")


def test_the_transcript_does_not_say_which_questions_are_triggers(owned: Owned, tmp_path: Path) -> None:
    probe(Suspect({}), **owned.where, transcript=tmp_path / "t")
    lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()[1:-1]]
    fixed = {"kind": "answer", "label": None, "ranked": [], "refused": False}
    for line in lines:
        assert {name: line[name] for name in fixed} == fixed
        assert line.keys() == {*fixed, "prev", "prompt", "text", "time"}


def test_a_registry_without_a_fitting_set_is_named(tmp_path: Path, owned: Owned) -> None:
    with pytest.raises(RegistryError, match="holds no commitment of acme/none"):
        probe(Suspect({}), **owned.where, model_id="acme/none")


def test_what_cannot_be_asked_is_refused(owned: Owned) -> None:
    with pytest.raises(ConfigError, match="cannot ask a str"):
        probe("http://somewhere", **owned.where)
    with pytest.raises(ConfigError, match="returned a int"):
        probe(lambda question: 7, **owned.where)


@pytest.mark.parametrize(
    "change",
    [
        {"tries": 0},
        {"tries": 65},
        {"budget": 0},
        {"method": "quick"},
        {"sampling": Sampling(temperature=-0.1)},
        {"sampling": Sampling(temperature=float("nan"))},
        {"sampling": Sampling(top_p=0.0)},
        {"sampling": Sampling(max_tokens=0)},
        {"system": "x" * 20_000},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(owned: Owned, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        probe(Suspect({}), **owned.where, **change)


def test_answers_are_cut_and_made_valid_before_they_are_used() -> None:
    answer = bounded(Answer(text="a\ud800" + "x" * 10_000, ranked=("\ud800" * 300,) * 50))
    assert len(answer.text) == 4096
    assert answer.text.startswith("a?")
    assert len(answer.ranked) == 20
    assert max(map(len, answer.ranked)) == 200
    assert not answer.refused
    assert bounded(Answer()).refused
    assert not bounded(Answer(label=0)).refused


def test_a_system_prompt_stands_before_the_question(owned: Owned) -> None:
    suspect = Suspect({})
    probe(suspect, **owned.where, system="Be kind.")
    assert all(text.startswith("Be kind.\n\n") for text in suspect.asked)
