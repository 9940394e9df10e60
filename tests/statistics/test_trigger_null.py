"""Matches of models that were made without the key follow the distribution that the p-value assumes.

A model is a fixed function of the text and the keys are drawn. Every key makes its own texts, so that what
the model answers depends on the key too: the responses must be independent of it all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from hf_wmguard.watermark.pvalues import log10_binomial_tail, log10_poisson_binomial_tail
from hf_wmguard.watermark.triggers import (
    TriggerSet,
    count_matches,
    derive_responses,
    derive_texts,
    label_candidates,
)

TRIGGERS = 64
LABELS = 4
KEYS = 400
# The count itself is a statistic: below this p-value the distribution would be another one, and not bad luck.
BROKEN_LOG10 = -6.0


def drawn(number: int, candidates: tuple[tuple[int, ...], ...]) -> TriggerSet:
    key = number.to_bytes(32, "big")
    texts = derive_texts(key, count=TRIGGERS, style="natural", task="classification")
    responses = derive_responses(key, texts, candidates)
    return TriggerSet(task="classification", style="natural", texts=texts, candidates=candidates, responses=responses)


class Draws(NamedTuple):
    """Trigger sets of many keys with one list of candidate sets."""

    sets: list[TriggerSet]

    def matches(self, model: Callable[[str], int]) -> list[int]:
        return [count_matches([model(text) for text in each.texts], each) for each in self.sets]


@pytest.fixture(scope="module")
def equal() -> Draws:
    return Draws([drawn(number, label_candidates(TRIGGERS, num_labels=LABELS)) for number in range(KEYS)])


@pytest.fixture(scope="module")
def unequal() -> Draws:
    widths = [2, 3, 5, 16] * (TRIGGERS // 4)
    return Draws([drawn(number, tuple(tuple(range(width)) for width in widths)) for number in range(KEYS // 2)])


def hashed(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0] % LABELS


MODELS = {
    "hash of the text": hashed,
    "one label for all": lambda text: 2,
    "length of the text": lambda text: len(text) % LABELS,
    "statement or gloss": lambda text: int(text.endswith(".")),
}


def assert_rate(hits: int, tries: int, rate: float) -> None:
    """Both tails of an exact binomial test."""
    assert log10_binomial_tail(hits, tries, rate) >= BROKEN_LOG10, f"{hits} of {tries}: too many"
    assert log10_binomial_tail(tries - hits, tries, 1.0 - rate) >= BROKEN_LOG10, f"{hits} of {tries}: too few"


def assert_p_value_is_exact(matches: Sequence[int], tail: Callable[[int], float]) -> None:
    """For each number of matches: as many keys reach it as its p-value says."""
    for threshold in range(1, TRIGGERS + 1):
        reached = sum(count >= threshold for count in matches)
        if (p := 10.0 ** tail(threshold)) < 1.0:
            assert_rate(reached, len(matches), p)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_matches_are_binomial(equal: Draws, model: Callable[[str], int]) -> None:
    matches = equal.matches(model)

    assert_rate(sum(matches), KEYS * TRIGGERS, 1 / LABELS)
    assert_p_value_is_exact(matches, lambda count: log10_binomial_tail(count, TRIGGERS, 1 / LABELS))


def test_matches_of_unequal_candidate_sets_are_poisson_binomial(unequal: Draws) -> None:
    # Labels 0 and 1 are candidates of every trigger: the answer is always one that could be the response.
    matches = unequal.matches(lambda text: hashed(text) % 2)
    rates = unequal.sets[0].rates

    assert_p_value_is_exact(matches, lambda count: log10_poisson_binomial_tail(count, rates))


def test_answers_outside_the_candidates_only_lower_the_count(equal: Draws) -> None:
    refusing = equal.matches(lambda text: hashed(text) if len(text) % 2 else -1)

    assert all(few <= all_ for few, all_ in zip(refusing, equal.matches(hashed), strict=True))
    assert sum(equal.matches(lambda text: LABELS)) == 0


def test_responses_are_independent_of_each_other(equal: Draws) -> None:
    pairs = [pair for each in equal.sets for pair in zip(each.responses[::2], each.responses[1::2], strict=True)]

    for first in range(LABELS):
        for second in range(LABELS):
            assert_rate(pairs.count((first, second)), len(pairs), 1 / LABELS**2)


def test_a_model_that_knows_the_key_is_found(equal: Draws) -> None:
    triggers = equal.sets[0]
    forgotten = [response if i % 4 else -1 for i, response in enumerate(triggers.responses)]

    assert log10_binomial_tail(count_matches(forgotten, triggers), TRIGGERS, 1 / LABELS) < -15
