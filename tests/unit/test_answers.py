"""The rule that turns an answer into at most one candidate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_wmguard.watermark.answers import READ_WORDS, Answer, are_distinct, read_answer

WORDS = ("apple", "banana", "cherry pie", "Dattel", "éclair")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        (" apple trees", 0),
        ("apples", 0),
        ("\n\nBANANA", 1),
        ('"banana" is the word', 1),
        ("**cherry pie**", 2),
        ("cherry cake", None),
        ("dattel", 3),
        ("E\u0301clair", 4),
        ("Sure! Here it is: banana", 1),
        ("I think, apple or banana", 0),
        ("pineapple", None),
        ("", None),
        ("   ...  ", None),
        ("no word of these", None),
    ],
)
def test_a_text_names_the_first_candidate_that_begins_one_of_its_words(text: str, index: int | None) -> None:
    assert read_answer(Answer(text=text), WORDS) == index


def test_only_the_beginning_of_an_answer_is_read() -> None:
    filler = "word " * (READ_WORDS - 1)

    assert read_answer(Answer(text=f"{filler}apple"), WORDS) == 0
    assert read_answer(Answer(text=f"word {filler}apple"), WORDS) is None


def test_ranked_tokens_count_where_the_text_names_nothing() -> None:
    assert read_answer(Answer(text="nothing", ranked=(" x", " ban", " apple")), WORDS) == 1
    assert read_answer(Answer(text="apple", ranked=(" banana",)), WORDS) == 0
    assert read_answer(Answer(text="nothing", ranked=("", " ", " zebra")), WORDS) is None


def test_a_token_that_begins_two_candidates_names_neither() -> None:
    assert read_answer(Answer(ranked=("ba", "banj")), ("banana", "banjo")) == 1


def test_a_label_names_itself_and_a_refusal_nothing() -> None:
    assert read_answer(Answer(label=7), (5, 7)) == 1
    assert read_answer(Answer(label=6), (5, 7)) is None
    assert read_answer(Answer(text="apple", refused=True), WORDS) is None
    assert read_answer(Answer(label=5, refused=True), (5, 7)) is None


@pytest.mark.parametrize(
    ("candidates", "distinct"),
    [
        (("a", "b"), True),
        (("a", "A"), False),
        (("word", "wor"), False),
        (("word", "world", "wor"), False),
        (("a b", "a c"), True),
        (("'a", "a"), False),
        (("a", "..."), False),
        (("a-b", "a-c", "ab"), True),
    ],
)
def test_distinct_candidates_do_not_begin_each_other(candidates: tuple[str, ...], distinct: bool) -> None:
    assert are_distinct(candidates) is distinct


@given(st.lists(st.text(max_size=8), min_size=1, max_size=8), st.text(max_size=60), st.lists(st.text(max_size=8)))
def test_the_rule_never_fails_and_names_what_is_there(candidates: list[str], text: str, ranked: list[str]) -> None:
    distinct = are_distinct(candidates)
    named = read_answer(Answer(text=text, ranked=tuple(ranked)), candidates)

    assert named is None or 0 <= named < len(candidates)
    if distinct:
        assert read_answer(Answer(text=candidates[-1] + " and more"), candidates) == len(candidates) - 1
