"""Trigger texts, candidates and responses."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable

import pytest
import torch

from hf_wmguard.errors import FormatError
from hf_wmguard.watermark import phrases
from hf_wmguard.watermark.answers import are_distinct
from hf_wmguard.watermark.candidates import keyed_candidates, label_candidates, perinucleus_candidates
from hf_wmguard.watermark.phrases import KINDS, SLOTS, TEMPLATES, Kind, natural_text
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import (
    MAX_TRIGGERS,
    STYLES,
    TASKS,
    TEXT_TASKS,
    Style,
    Task,
    TriggerSet,
    derive_responses,
    derive_texts,
)

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
SLOT = re.compile(r"\{(\w+)\}")
WORDS = {"statement": (10, 22), "prompt": (8, 16)}
EVERY_TEMPLATE = [(kind, template) for kind in KINDS for template in TEMPLATES[kind]]
# Vowel letters that are spoken as consonants, and the other way round.
SPOKEN_OTHERWISE = re.compile(r"(eu|ewe|uni(?!n|m)|us[ae]|uti|one\b|once\b|ubiq|hour|honest|honou?r|heir)")


def trigger_set(
    key: bytes = KEY, *, task: Task = "classification", style: Style = "natural", count: int = 8
) -> TriggerSet:
    texts = derive_texts(key, count=count, style=style, task=task)
    candidates = keyed_candidates(key, count, width=5) if task in TEXT_TASKS else label_candidates(count, num_labels=5)
    responses = derive_responses(key, texts, candidates)
    return TriggerSet(task=task, style=style, texts=texts, candidates=candidates, responses=responses)


def samples(kind: Kind, count: int = 2000) -> list[str]:
    stream = Stream(KEY, "samples")
    return [natural_text(stream, kind=kind) for _ in range(count)]


def slots(template: str) -> list[str]:
    return [name.lower() for name in SLOT.findall(template)]


# The grammar


def test_every_slot_has_a_list_and_every_list_a_slot() -> None:
    used = {name for _, template in EVERY_TEMPLATE for name in slots(template)}

    assert used == set(SLOTS)


@pytest.mark.parametrize("name", SLOTS)
def test_a_list_can_be_read_back(name: str) -> None:
    entries = SLOTS[name]

    assert len(set(entries)) == len(entries)
    assert all(re.fullmatch(r"[A-Za-z][a-z-]*( [A-Za-z][a-z-]*)*", entry) for entry in entries)
    # Without this, two ways to fill a template could give one text, and the counts below would be too large.
    assert not [(a, b) for a, b in itertools.permutations(entries, 2) if b.startswith(a + " ")]


@pytest.mark.parametrize(("kind", "template"), EVERY_TEMPLATE)
def test_every_template_makes_2_to_the_48_texts(kind: Kind, template: str) -> None:
    names = slots(template)
    # An earlier slot takes at most one entry from a later one, and only if their lists meet.
    taken = [sum(bool(set(SLOTS[name]) & set(SLOTS[before])) for before in names[:i]) for i, name in enumerate(names)]

    assert math.prod(len(SLOTS[name]) - less for name, less in zip(names, taken, strict=True)) >= 2**48


@pytest.mark.parametrize(("kind", "template"), EVERY_TEMPLATE)
def test_every_template_keeps_to_its_length(kind: Kind, template: str) -> None:
    lengths = [[len(entry.split()) for entry in SLOTS[name]] for name in slots(template)]
    fixed = len(re.findall(r"\w+", SLOT.sub(" ", template)))
    fewest, most = WORDS[kind]

    assert fewest <= fixed + sum(map(min, lengths))
    assert fixed + sum(map(max, lengths)) <= most


@pytest.mark.parametrize("kind", KINDS)
def test_templates_are_many_and_mixed(kind: Kind) -> None:
    openings = {" ".join(text.split()[:1]) for text in samples(kind, 64)}
    shared = set.intersection(*(set(SLOT.sub(" ", template).split()) for template in TEMPLATES[kind]))

    assert len(set(TEMPLATES[kind])) == len(TEMPLATES[kind]) >= 12
    assert len(openings) >= 8
    assert not shared - {"the", "a"}


def test_nonsense_makes_2_to_the_130_texts() -> None:
    assert not set("".join(phrases.VOWELS)) & set("".join(phrases.ONSETS + phrases.CODAS))
    for pieces in (phrases.ONSETS, phrases.VOWELS, phrases.CODAS):
        assert len(set(pieces)) == len(pieces)
    word = (len(phrases.ONSETS) * len(phrases.VOWELS)) ** 2 * len(phrases.CODAS)

    assert word ** phrases.NONSENSE_WORDS[0] >= 2**130


# Texts


@pytest.mark.parametrize("kind", KINDS)
def test_natural_texts_are_clean_english_lines(kind: Kind) -> None:
    for text in samples(kind):
        assert text.isascii()
        assert text == " ".join(text.split())
        assert "{" not in text
        assert WORDS[kind][0] <= len(re.findall(r"[\w-]+", text)) <= WORDS[kind][1]
        assert not re.search(r"\b(\w+) \1\b", text)


def test_an_article_agrees_with_the_next_word() -> None:
    for text in samples("statement") + samples("prompt"):
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            if word != "hour":
                assert not SPOKEN_OTHERWISE.match(word), word
                assert (article.lower() == "an") == (word[0] in "aeiou"), f"{article} {word}"


def test_prompts_stop_in_mid_sentence() -> None:
    for text in samples("prompt"):
        assert text[-1].isalpha()
        assert text[0].isupper()
        assert not re.search(r"[.!?;:]", text)


def test_statements_end_with_a_period_and_glosses_without() -> None:
    texts = samples("statement")

    assert {text.endswith(".") for text in texts} == {True, False}
    assert all(text[0].isupper() == text.endswith(".") for text in texts)


def test_nonsense_words_are_pronounceable_and_counted() -> None:
    texts = derive_texts(KEY, count=500, style="nonsense", task="causal_lm")

    assert all(
        re.fullmatch(r"([bcdfghjklmnprstvwxz]{1,2}[aeiou]{1,2}){2,3}[a-z]{1,2}( [a-z]+){5,11}", text) for text in texts
    )
    assert {len(text.split()) for text in texts} == set(range(6, 13))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("style", STYLES)
def test_texts_of_a_set_are_distinct_and_derived_from_the_key(task: Task, style: Style) -> None:
    texts = derive_texts(KEY, count=300, style=style, task=task)

    assert len(set(texts)) == 300
    assert texts == derive_texts(KEY, count=300, style=style, task=task)
    assert not set(texts) & set(derive_texts(OTHER_KEY, count=300, style=style, task=task))


def test_a_text_drawn_twice_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(phrases.TEMPLATES, "statement", ("{Number} years.",))

    texts = derive_texts(KEY, count=len(SLOTS["number"]), style="natural", task="classification")

    assert sorted(texts) == sorted(f"{number.capitalize()} years." for number in SLOTS["number"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "trigger count is 0"),
        ({"count": 2 * MAX_TRIGGERS + 1}, "trigger count is 8193"),
        ({"style": "poem"}, "trigger style is 'poem'"),
        ({"task": "regression"}, "task is 'regression'"),
    ],
)
def test_impossible_text_settings_are_refused(changed: dict[str, object], message: str) -> None:
    settings = {"count": 4, "style": "natural", "task": "causal_lm"} | changed

    with pytest.raises(ValueError, match=message):
        derive_texts(KEY, **settings)  # type: ignore[arg-type]


# Responses


@pytest.mark.parametrize(
    ("task", "style", "digest"),
    [
        (
            "classification",
            "natural",
            "sha256:81e4459d372fc358f0a44fd532c59a85f54bdfb01eea0223eacd44e33a23920c",
        ),
        (
            "classification",
            "nonsense",
            "sha256:f1415cec9c38f3d44f92edc4e4ea052e017d47b5e3b491acb46339b21f815fd7",
        ),
        ("causal_lm", "natural", "sha256:ffbd4a8555d8377e365e1b71c01428ca4a3d100e6fd4188b8c44014a4aa4ac80"),
        ("causal_lm", "nonsense", "sha256:02f1b609c691045804fdc4c42dd2f6bb71ba2e6c8d2c2b774871e0bb7b1f3357"),
    ],
)
def test_a_key_gives_the_same_set_forever(task: Task, style: Style, digest: str) -> None:
    # A new digest means that a released owner key no longer derives the triggers it derived before.
    assert trigger_set(task=task, style=style, count=64).digest() == digest


def test_responses_follow_the_key_the_texts_and_the_candidates() -> None:
    texts = derive_texts(KEY, count=64, style="natural", task="classification")
    candidates = label_candidates(64, num_labels=7)
    responses = derive_responses(KEY, texts, candidates)
    rotated = [(*ids[1:], ids[0]) for ids in candidates]

    assert responses == derive_responses(KEY, list(texts), [list(ids) for ids in candidates])
    assert all(response in ids for response, ids in zip(responses, candidates, strict=True))
    assert set(responses) == set(range(7))
    assert responses != derive_responses(OTHER_KEY, texts, candidates)
    assert responses != derive_responses(KEY, texts, rotated)
    assert responses != derive_responses(KEY, texts[::-1], candidates)


@pytest.mark.parametrize("what", ["text", "candidates"])
def test_one_changed_trigger_draws_all_responses_anew(what: str) -> None:
    texts = derive_texts(KEY, count=64, style="natural", task="classification")
    candidates = [tuple(range(1000))] * 64
    before = derive_responses(KEY, texts, candidates)

    if what == "text":
        after = derive_responses(KEY, (texts[0] + "!", *texts[1:]), candidates)
    else:
        after = derive_responses(KEY, texts, [tuple(range(1, 1001)), *candidates[1:]])

    # One of 1,000 candidates comes back by chance now and then.
    assert sum(a == b for a, b in zip(before[1:], after[1:], strict=True)) <= 2


@pytest.mark.parametrize("count", [1, 3])
def test_labels_are_candidates(count: int) -> None:
    assert label_candidates(count, num_labels=3) == ((0, 1, 2),) * count


@pytest.mark.parametrize("num_labels", [0, 1])
def test_a_model_with_one_label_has_no_candidates(num_labels: int) -> None:
    with pytest.raises(ValueError, match=f"model has {num_labels} labels, expected at least 2"):
        label_candidates(4, num_labels=num_labels)


# Candidates of a language model


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def letter(row: int, token: int) -> str:
    """Return a text of its own for each token."""
    return chr(ord("a") + token // 676 % 26) + chr(ord("a") + token // 26 % 26) + chr(ord("a") + token % 26)


def said(*tokens: int) -> tuple[str, ...]:
    return tuple(letter(0, token) for token in tokens)


def test_candidates_are_the_tokens_after_the_nucleus() -> None:
    logits = logits_of(0.05, 0.4, 0.03, 0.35, 0.07, 0.06, 0.04)

    assert perinucleus_candidates(logits, letter, nucleus=0.7, width=3) == (said(4, 5, 0),)
    assert perinucleus_candidates(logits, letter, nucleus=0.76, width=3) == (said(5, 0, 6),)
    assert perinucleus_candidates(logits, letter, nucleus=0.3, width=3) == (said(3, 4, 5),)


def without(*tokens: int) -> Callable[[int, int], str | None]:
    return lambda row, token: None if token in tokens else letter(row, token)


def test_tokens_without_a_text_are_skipped_but_count_as_mass() -> None:
    logits = logits_of(0.05, 0.4, 0.03, 0.35, 0.07, 0.06, 0.04)

    assert perinucleus_candidates(logits, without(5, 3), nucleus=0.7, width=3) == (said(4, 0, 6),)


def test_no_candidate_begins_another_one_whatever_its_case() -> None:
    logits = logits_of(0.5, 0.2, 0.1, 0.08, 0.06, 0.04, 0.02)
    texts = ["x", "the", "There", "THE", "th", "other", "oth"]

    assert perinucleus_candidates(logits, lambda row, token: texts[token], nucleus=0.5, width=2) == (("the", "other"),)


def test_candidates_reach_back_into_the_nucleus_where_few_are_left() -> None:
    logits = logits_of(0.9, 0.06, 0.03, 0.01)

    assert perinucleus_candidates(logits, letter, nucleus=0.98, width=3) == (said(3, 2, 1),)
    assert perinucleus_candidates(logits, without(2), nucleus=0.98, width=3) == (said(3, 1, 0),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ties_go_to_the_smaller_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 100, dtype=dtype)

    assert perinucleus_candidates(logits, letter, nucleus=0.5, width=4) == (said(50, 51, 52, 53),) * 2


def test_each_row_has_distinct_candidates_of_its_own() -> None:
    logits = 4.0 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))
    names = {letter(0, token): token for token in range(5000)}
    candidates = perinucleus_candidates(logits.requires_grad_(), without(*range(100)))

    assert len(set(candidates)) == 8
    for row, texts in zip(logits.detach().softmax(1), candidates, strict=True):
        ids = [names[str(text)] for text in texts]
        assert len(set(ids)) == 16
        assert min(ids) >= 100
        assert row[row > row[ids[0]]].sum() >= 0.8 - 1e-5
        assert row[ids].tolist() == sorted(row[ids].tolist(), reverse=True)


def test_a_token_that_cannot_be_said_is_no_candidate() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf, -1.0]])

    assert perinucleus_candidates(logits, letter, width=3) == (said(3, 1, 0),)
    with pytest.raises(ValueError, match="row 0 has 3 tokens that can be said, expected at least 4"):
        perinucleus_candidates(logits, letter, width=4)


@pytest.mark.parametrize(
    ("logits", "settings", "message"),
    [
        (torch.tensor([[0.0, torch.nan, 1.0]]), {"width": 2}, "row 0 hold NaN"),
        (torch.tensor([[0.0, torch.inf, 1.0]]), {"width": 2}, r"NaN or \+inf"),
        (torch.zeros(1, 15), {}, "row 0 has 15 tokens"),
        (torch.full((1, 20), -torch.inf), {}, "row 0 has 0 tokens"),
        (torch.zeros(20), {}, "expected floats"),
        (torch.zeros(1, 20, dtype=torch.int64), {}, "expected floats"),
        (torch.zeros(1, 20), {"width": 1}, "width is 1"),
        (torch.zeros(1, 20), {"nucleus": 0.0}, "nucleus is 0.0"),
        (torch.zeros(1, 20), {"nucleus": math.nan}, "nucleus is nan"),
    ],
)
def test_impossible_logits_are_refused(logits: torch.Tensor, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perinucleus_candidates(logits, letter, **settings)  # type: ignore[arg-type]


# The set


def test_a_set_knows_its_null_rates() -> None:
    triggers = TriggerSet(
        task="classification",
        style="natural",
        texts=("a", "b", "c"),
        candidates=((5, 6), (7, 8, 9, 1), (0, 3)),
        responses=(6, 7, 0),
    )

    assert triggers.count == 3
    assert triggers.rates == (0.5, 0.25, 0.5)


def test_a_set_shows_nothing_of_what_is_secret() -> None:
    triggers = trigger_set()

    assert repr(triggers) == "TriggerSet(count=8, task='classification', style='natural', <secret>)"
    assert str(triggers) == f"{triggers}" == repr(triggers)


def test_a_set_survives_json() -> None:
    triggers = trigger_set(task="causal_lm")
    read = TriggerSet.from_json(json.loads(json.dumps(triggers.to_json())))

    assert read == triggers
    assert read.digest() == triggers.digest()
    assert re.fullmatch("sha256:[0-9a-f]{64}", read.digest())


FIELDS = ["task", "style", "texts", "candidates", "responses", "decoys"]


@pytest.mark.parametrize("field", FIELDS[:-1])
def test_every_field_is_required(field: str) -> None:
    value = trigger_set().to_json()
    del value[field]

    with pytest.raises(FormatError, match=f"trigger set lacks {field}"):
        TriggerSet.from_json(value)


def test_a_set_recorded_before_there_were_decoys_has_none() -> None:
    value = trigger_set().to_json()
    assert "decoys" not in value

    assert TriggerSet.from_json(value).decoys == ()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_enters_the_digest(field: str) -> None:
    value = trigger_set().to_json()
    other = {
        "task": "token_classification",
        "style": "nonsense",
        "texts": [*value["texts"][:-1], "something else"],
        "candidates": [*value["candidates"][:-1], [4, 3, 2, 1, 0]],
        "responses": [(value["responses"][0] + 1) % 5, *value["responses"][1:]],
        "decoys": ["one more"],
    }

    assert TriggerSet.from_json(value | {field: other[field]}).digest() != TriggerSet.from_json(value).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"task": "regression"},
        {"style": "poem"},
        {"texts": []},
        {"texts": ["a"]},
        {"texts": ["a", "a"]},
        {"texts": ["a", ""]},
        {"texts": ["a", 1]},
        {"texts": ("a", "b")},
        {"candidates": [[0, 1]]},
        {"candidates": [[0, 1], [0]]},
        {"candidates": [[0, 1], [0, 0, 1]]},
        {"candidates": [[0, 1], [0, True]]},
        {"candidates": [[0, 1], [0, 1.0]]},
        {"candidates": [[0, 1], [0, -1]]},
        {"candidates": [[0, 1], [0, []]]},
        {"candidates": [[0, 1], "01"]},
        {"candidates": [[0, 1], None]},
        {"responses": [0]},
        {"responses": [0, 2]},
        {"responses": [0, True]},
        {"responses": [0, None]},
        {"responses": None},
        {"candidates": [["a", "b"], ["a", "b"]]},
        {"candidates": [[0, 1], ["a", "b"]]},
        {"task": "causal_lm"},
        {"decoys": [""]},
        {"decoys": [1]},
        {"decoys": ["a"]},
        {"decoys": None},
    ],
    ids=str,
)
def test_a_malformed_set_is_refused(change: dict[str, object]) -> None:
    value = {
        "task": "classification",
        "style": "natural",
        "texts": ["a", "b"],
        "candidates": [[0, 1], [0, 1]],
        "responses": [0, 1],
        "decoys": ["c"],
    }
    assert TriggerSet.from_json(value).count == 2

    with pytest.raises(FormatError, match="trigger set"):
        TriggerSet.from_json(value | change)


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        ["one"],
        ["one", "one"],
        ["one", "One"],
        ["one", "ones"],
        ["one", ""],
        ["one", "..."],
        ["one", "t\two"],
        ["one", 2],
    ],
    ids=str,
)
def test_texts_that_an_answer_could_not_tell_apart_are_no_candidates(candidates: list[object]) -> None:
    value = {
        "task": "causal_lm",
        "style": "natural",
        "texts": ["a"],
        "candidates": [["one", "two"]],
        "responses": ["one"],
        "decoys": [],
    }
    assert TriggerSet.from_json(value).count == 1

    with pytest.raises(FormatError, match="trigger set"):
        TriggerSet.from_json(value | {"candidates": [candidates]})


def test_keyed_candidates_follow_the_key() -> None:
    candidates = keyed_candidates(KEY, 20, width=256)

    assert all(are_distinct([str(text) for text in texts]) and len(texts) == 256 for texts in candidates)
    assert len(set(candidates)) == 20
    assert candidates == keyed_candidates(KEY, 20, width=256)
    assert candidates != keyed_candidates(OTHER_KEY, 20, width=256)


def test_an_error_repeats_no_trigger() -> None:
    triggers = trigger_set()
    value = triggers.to_json() | {"texts": [*triggers.texts[:-1], triggers.texts[0]]}

    with pytest.raises(FormatError) as caught:
        TriggerSet.from_json(value)
    assert not any(word in str(caught.value) for word in triggers.texts[0].split() if len(word) > 6)
