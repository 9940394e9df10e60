"""Matches of models that were made without the key follow the distribution that the p-value assumes.

A model is a fixed function of the text and the keys are drawn. Every key makes its own texts, so that what
the model answers depends on the key too: the responses must be independent of it all the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

from hf_wmguard.keys import OwnerKey
from hf_wmguard.watermark.answers import Answer, Response, read_answer
from hf_wmguard.watermark.candidates import keyed_candidates, label_candidates
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import (
    log10_binomial_tail,
    log10_fuse,
    log10_p_correlation,
    log10_poisson_binomial_tail,
    log10_tally_tail,
    tally_of,
)
from hf_wmguard.watermark.sequential import SequentialTest
from hf_wmguard.watermark.triggers import Candidates, Task, TriggerSet, derive_responses, derive_texts

TRIGGERS = 64
LABELS = 4
KEYS = 400
# The count itself is a statistic: below this p-value the distribution would be another one, and not bad luck.
BROKEN_LOG10 = -6.0


def drawn(number: int, candidates: Candidates, task: Task = "classification") -> TriggerSet:
    key = number.to_bytes(32, "big")
    texts = derive_texts(key, count=len(candidates), style="natural", task=task)
    responses = derive_responses(key, texts, candidates)
    return TriggerSet(task=task, style="natural", texts=texts, candidates=candidates, responses=responses)


def named_by(answers: Sequence[Answer], triggers: TriggerSet) -> list[int | None]:
    return [read_answer(answer, ids) for answer, ids in zip(answers, triggers.candidates, strict=True)]


def wanted(triggers: TriggerSet) -> list[int]:
    return [ids.index(response) for ids, response in zip(triggers.candidates, triggers.responses, strict=True)]


def count_matches(labels: Sequence[Response], triggers: TriggerSet) -> int:
    named = named_by([Answer(label=int(label)) for label in labels], triggers)
    return sum(one == response for one, response in zip(named, wanted(triggers), strict=True))


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


# Several tries


def at(text: str, attempt: int, width: int) -> int:
    """Return a number that looks random, of a text and a try."""
    return int.from_bytes(hashlib.sha256(f"{attempt} {text}".encode()).digest()[:4], "big") % width


Speaker = Callable[[str, int, Sequence[str]], str]
"""What a model says to a text at the n-th try. It may know the candidates, which an attacker would not."""

# Answers of the tries depend on each other, are skewed, or follow the candidates; none depends on a response.
SPEAKERS: dict[str, Speaker] = {
    "every prompt alike at every try": lambda text, attempt, ids: ids[at(text, 0, len(ids))],
    "everything alike": lambda text, attempt, ids: "quiet garden",
    "always the first candidate": lambda text, attempt, ids: ids[0],
    "mostly the first candidate": lambda text, attempt, ids: ids[max(0, at(text, attempt, 2 * len(ids)) - len(ids))],
    "every try another candidate": lambda text, attempt, ids: ids[(at(text, 0, len(ids)) + attempt) % len(ids)],
    "all tries alike for half of the prompts": lambda text, attempt, ids: ids[
        at(text, attempt * (len(text) % 2), len(ids))
    ],
    "the more tries the surer": lambda text, attempt, ids: ids[at(text, attempt, len(ids) // (1 + attempt))],
    "silent now and then": lambda text, attempt, ids: ids[at(text, attempt, 3)] if at(text, attempt, 5) else "",
}
WIDTH = 6
TRIES = 3
SHORT = 12


@pytest.fixture(scope="module")
def spoken() -> list[TriggerSet]:
    sets = []
    for number in range(KEYS):
        candidates = keyed_candidates(number.to_bytes(32, "big"), SHORT, width=WIDTH)
        # The answer that is the same for everything is a candidate of every trigger, at one place or another.
        candidates = tuple(
            (*ids[: i % WIDTH], "quiet garden", *ids[i % WIDTH + 1 :]) for i, ids in enumerate(candidates)
        )
        sets.append(drawn(number, candidates, task="causal_lm"))
    return sets


def asked(triggers: TriggerSet, speaker: Speaker, tries: int) -> list[list[int | None]]:
    """Return what each try of each trigger named."""
    pairs = zip(triggers.texts, triggers.candidates, strict=True)
    return [
        [read_answer(Answer(text=speaker(text, attempt, [str(one) for one in ids])), ids) for attempt in range(tries)]
        for text, ids in pairs
    ]


def fixed_log10_p(triggers: TriggerSet, named: list[list[int | None]]) -> float:
    matches = sum(tries.count(response) for tries, response in zip(named, wanted(triggers), strict=True))
    pairs = zip(named, triggers.candidates, strict=True)
    return log10_tally_tail(matches, [tally_of(tries, len(ids)) for tries, ids in pairs])


def sequential_log10_p(triggers: TriggerSet, named: list[list[int | None]]) -> float:
    """Return the p-value at its best moment: it never rises, so that this is the last one."""
    test = SequentialTest()
    for tries, response, ids in zip(named, wanted(triggers), triggers.candidates, strict=True):
        test.update(tries, response, len(ids))
    return test.log10_p


def assert_super_uniform(values: Sequence[float]) -> None:
    """As many or fewer values at or below each level as the level says."""
    for log10_alpha in (-0.1, -0.3, -0.5, -1.0, -1.5, -2.0, -3.0):
        count = sum(value <= log10_alpha for value in values)
        assert log10_binomial_tail(count, len(values), 10.0**log10_alpha) > BROKEN_LOG10, (log10_alpha, count)


def assert_reached(values: Sequence[float]) -> None:
    """A test that nobody ever comes near would be valid too."""
    assert min(values) < -1.0


@pytest.mark.parametrize("tries", [1, TRIES])
@pytest.mark.parametrize("speaker", SPEAKERS.values(), ids=SPEAKERS.keys())
def test_a_fixed_number_of_tries(spoken: list[TriggerSet], speaker: Speaker, tries: int) -> None:
    values = [fixed_log10_p(triggers, asked(triggers, speaker, tries)) for triggers in spoken]

    assert_super_uniform(values)
    assert_reached(values)


@pytest.mark.parametrize(("name", "tally"), [("everything alike", (3,)), ("every try another candidate", (1, 1, 1))])
def test_the_tail_of_several_tries_is_exact(spoken: list[TriggerSet], name: str, tally: tuple[int, ...]) -> None:
    """For each number of matching tries: as many keys reach it as its p-value says."""
    counts = [
        sum(tries.count(one) for tries, one in zip(asked(each, SPEAKERS[name], TRIES), wanted(each), strict=True))
        for each in spoken
    ]
    for threshold in range(1, SHORT * max(tally) + 1):
        p = 10.0 ** log10_tally_tail(threshold, [(WIDTH, dict(enumerate(tally)))] * SHORT)
        assert_rate(sum(count >= threshold for count in counts), KEYS, p)


@pytest.mark.parametrize("tries", [1, TRIES])
@pytest.mark.parametrize("speaker", SPEAKERS.values(), ids=SPEAKERS.keys())
def test_sequentially_at_the_best_moment(spoken: list[TriggerSet], speaker: Speaker, tries: int) -> None:
    values = [sequential_log10_p(triggers, asked(triggers, speaker, tries)) for triggers in spoken]

    assert_super_uniform(values)
    assert_reached(values)


def test_sequentially_in_an_order_that_matches_decide(spoken: list[TriggerSet]) -> None:
    """After a match the next trigger comes from the front and is tried three times, else from the back and once."""
    values = []
    for triggers in spoken:
        left, responses, test, matched = list(range(SHORT)), wanted(triggers), SequentialTest(), True
        named = asked(triggers, SPEAKERS["mostly the first candidate"], TRIES)
        while left and test.log10_p > -2.0:
            index = left.pop(0 if matched else -1)
            tries = named[index] if matched else named[index][:1]
            test.update(tries, responses[index], WIDTH)
            matched = responses[index] in tries
        values.append(test.log10_p)

    assert_super_uniform(values)
    assert_reached(values)


def test_stopping_at_the_best_moment_would_break_the_exact_tail(equal: Draws) -> None:
    """Why there are two methods: the tail after every trigger, at its smallest, is no p-value."""
    best = []
    for triggers in equal.sets[:200]:
        named = [hashed(text) == response for text, response in zip(triggers.texts, triggers.responses, strict=True)]
        best.append(min(log10_binomial_tail(sum(named[:asked]), asked, 1 / LABELS) for asked in range(1, TRIGGERS + 1)))

    assert log10_binomial_tail(sum(value <= -1.0 for value in best), len(best), 0.1) < 2 * BROKEN_LOG10


def test_leaving_out_what_did_not_match_would_break_it(spoken: list[TriggerSet]) -> None:
    """Why everything that was asked counts: triggers chosen by their matches are not the key's."""
    values = []
    for triggers in spoken[:100]:
        named = asked(triggers, SPEAKERS["always the first candidate"], 1)
        kept = [(tries, one) for tries, one in zip(named, wanted(triggers), strict=True) if one in tries]
        values.append(log10_tally_tail(len(kept), [tally_of(tries, WIDTH) for tries, _ in kept]))

    assert log10_binomial_tail(sum(value <= -1.0 for value in values), len(values), 0.1) < 2 * BROKEN_LOG10


# Both channels


@pytest.mark.parametrize("method", [fixed_log10_p, sequential_log10_p])
def test_fused_p_of_a_continuous_and_a_discrete_channel(
    spoken: list[TriggerSet], method: Callable[[TriggerSet, list[list[int | None]]], float]
) -> None:
    """The triggers' few values beside uniform ones: the conditional argument needs no continuous p."""
    speaker = SPEAKERS["every try another candidate"]
    discrete = [method(triggers, asked(triggers, speaker, TRIES)) for triggers in spoken]
    uniform = Stream(bytes(32), "weights").uniform(KEYS).clamp_min(1e-300).log10().tolist()
    values = [log10_fuse(a, b) for a, b in zip(uniform, discrete, strict=True)]

    assert len(set(discrete)) < KEYS // 2
    assert_super_uniform(values)
    assert_reached(values)


def test_fused_p_of_two_uniform_channels_is_uniform() -> None:
    count = 20_000
    a, b = Stream(bytes(32), "fused").uniform(2 * count).clamp_min(1e-300).log10().view(2, count).tolist()
    values = [log10_fuse(x, y) for x, y in zip(a, b, strict=True)]

    for log10_alpha in (-0.1, -0.5, -1.0, -2.0, -3.0):
        assert_rate(sum(value <= log10_alpha for value in values), count, 10.0**log10_alpha)


def test_fused_p_follows_from_the_subkeys_of_one_owner() -> None:
    """Both channels of one record, drawn by one owner key each time, against one suspect."""
    projections = 3.0 * torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = []
    for number in range(1, KEYS + 1):
        owner = OwnerKey(number.to_bytes(32, "big"))
        carriers, triggers = (
            owner.derive(use, model_id="acme/null", iteration="1", slot=0) for use in ("carriers", "triggers")
        )
        stream = Stream(carriers, "carrier")
        cosines = torch.cos(2 * math.pi * (projections - stream.uniform(32))) * (1.0 - 2.0 * stream.bits(32).double())
        texts = derive_texts(triggers, count=SHORT, style="natural", task="classification")
        responses = derive_responses(triggers, texts, label_candidates(SHORT, num_labels=LABELS))
        matches = sum(hashed(text) == response for text, response in zip(texts, responses, strict=True))
        values.append(
            log10_fuse(log10_p_correlation(float(cosines.sum()), 32), log10_binomial_tail(matches, SHORT, 1 / LABELS))
        )

    assert_super_uniform(values)
    assert_reached(values)
