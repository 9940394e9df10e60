"""The sequential test: its e-values against exact arithmetic, Ville's bound by enumeration, and bad input."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_wmguard.watermark.pvalues import log10_tally_tail, tally_of
from hf_wmguard.watermark.sequential import TILTS, SequentialTest, log_e_value


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int | None], int]:
    k = draw(st.integers(1, 9))
    return draw(st.lists(st.none() | st.integers(0, k - 1), max_size=6)), k


@settings(deadline=None)
@given(blocks(), st.sampled_from(TILTS) | st.floats(0.0, 1e4))
def test_an_e_value_has_mean_1_over_the_responses(block: tuple[list[int | None], int], tilt: float) -> None:
    named, k = block
    tally = tally_of(named, k)

    assert math.fsum(math.exp(log_e_value(tally, response, tilt)) for response in range(k)) == pytest.approx(k)


@settings(deadline=None)
@given(blocks(), st.sampled_from(TILTS))
def test_an_e_value_is_what_it_is_defined_as(block: tuple[list[int | None], int], tilt: float) -> None:
    named, k = block
    counts = Counter(named)
    mean = math.fsum(math.exp(tilt * counts[c]) for c in range(k)) / k

    for response in range(k):
        expected = tilt * counts[response] - math.log(mean)
        assert log_e_value(tally_of(named, k), response, tilt) == pytest.approx(expected, abs=1e-12)


def whole(blocks: Sequence[tuple[Sequence[int | None], int, int]]) -> float:
    test = SequentialTest()
    for block in blocks:
        test.update(*block)
    return test.log10_p


def test_p_is_valid_at_the_best_moment_for_every_way_the_responses_can_fall() -> None:
    """Ville's inequality by enumeration: over all 4,096 responses of six triggers, the smallest p over time."""
    transcript: list[list[int | None]] = [[0, 0], [1, None], [2, 3], [None], [0, 1], [3, 3, 3]]
    values = sorted(
        whole([(named, response, 4) for named, response in zip(transcript, responses, strict=True)])
        for responses in itertools.product(range(4), repeat=6)
    )

    assert values[0] < -1.0
    for rank, value in enumerate(values, start=1):
        assert rank / len(values) <= 10**value * (1 + 1e-12)


def test_p_is_valid_where_the_next_question_depends_on_matches() -> None:
    """Once more, with the next trigger chosen by whether the last one matched: another k, other answers, or the end."""
    outcomes: list[tuple[float, float]] = []

    def play(history: list[tuple[list[int | None], int, int]], chance: float, matched: bool) -> None:
        if len(history) == 6 or (len(history) > 2 and not matched):
            outcomes.append((whole(history), chance))
            return
        named, k = ([0, 0, 1], 5) if matched else ([2], 3)
        for response in range(k):
            play([*history, (list[int | None](named), response, k)], chance / k, response in named)

    play([], 1.0, True)

    assert math.fsum(chance for _, chance in outcomes) == pytest.approx(1.0)
    for value, _ in outcomes:
        assert math.fsum(chance for other, chance in outcomes if other <= value) <= 10**value * (1 + 1e-12)


def test_single_tries_of_an_opened_key_would_be_no_test() -> None:
    """Why tries are blocks: entered one by one, eight equal answers to one trigger look like eight matches."""
    block, opened = SequentialTest(), SequentialTest()
    block.update([3] * 8, 3, 16)
    for _ in range(8):
        opened.update([3], 3, 16)

    assert -math.log10(16) <= block.log10_p < -1.1
    assert opened.log10_p < -8


@pytest.mark.parametrize("k", [2, 16, 256])
@pytest.mark.parametrize("tries", [1, 4])
def test_the_price_of_looking_is_small(k: int, tries: int) -> None:
    test = SequentialTest()
    for _ in range(64):
        test.update([1] * tries, 1, k)
    exact = log10_tally_tail(64 * tries, [tally_of([1] * tries, k)] * 64)

    assert exact <= test.log10_p <= exact + math.log10(len(TILTS))


def test_p_starts_at_1_and_never_rises() -> None:
    test = SequentialTest()
    values = [test.log10_p]
    for step in range(60):
        test.update([step % 4], 0 if step < 30 else 3 - step % 4, 4)
        values.append(test.log10_p)

    assert values[0] == 0.0
    assert math.copysign(1.0, values[0]) == 1.0
    assert all(later <= sooner for sooner, later in itertools.pairwise(values))


def test_what_names_no_candidate_changes_nothing() -> None:
    test = SequentialTest()
    test.update([1, 1], 1, 16)
    before = test.log10_p
    for _ in range(1000):
        test.update([None, None], 3, 16)
        test.update([], 3, 16)
    test.update([1], 1, 16)

    assert test.log10_p < before < 0.0
    assert test.log10_p == pytest.approx(whole([([1, 1], 1, 16), ([1], 1, 16)]), rel=1e-12)


def test_extremes() -> None:
    test = SequentialTest()
    for _ in range(4096):
        test.update([5] * 200, 5, 10**9)
    assert test.log10_p == pytest.approx(-9 * 4096 + math.log10(len(TILTS)), rel=1e-3)

    test = SequentialTest()
    for _ in range(4096):
        test.update([5] * 200, 6, 10**9)
    assert test.log10_p == 0.0


@pytest.mark.parametrize(("named", "response", "k"), [([4], 0, 4), ([-1], 0, 4), ([0], 4, 4), ([0], -1, 4), ([], 0, 0)])
def test_impossible_updates(named: list[int | None], response: int, k: int) -> None:
    test = SequentialTest()

    with pytest.raises(ValueError, match="expected"):
        test.update(named, response, k)
    assert test.log10_p == 0.0


def test_it_shows_its_p_value_and_no_response() -> None:
    test = SequentialTest()
    test.update([1], 1, 1000)

    assert repr(test) == f"SequentialTest(log10_p={test.log10_p:.1f})"
