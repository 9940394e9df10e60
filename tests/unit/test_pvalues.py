"""p-values: against exact arithmetic, closed forms and simulation, and out to 1e-100000."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_wmguard.watermark.pvalues import (
    log10_binomial_tail,
    log10_bonferroni,
    log10_fuse,
    log10_p_correlation,
    log10_p_weighted,
    log10_poisson_binomial_tail,
    log10_tally_tail,
    tally_of,
)

LN10 = math.log(10.0)


def log10_fraction(value: Fraction) -> float:
    """Return log10 of an exact positive fraction, accurate also close to 1 and far below float64's range."""
    if value > Fraction(9, 10):
        return math.log1p(-float(1 - value)) / LN10
    return (math.log(value.numerator) - math.log(value.denominator)) / LN10


def exact_tail(matches: int, asked: int, rate: float) -> float:
    p = Fraction(rate)
    hit, total = p.numerator, p.denominator
    terms = (math.comb(asked, k) * hit**k * (total - hit) ** (asked - k) for k in range(matches, asked + 1))
    return log10_fraction(Fraction(sum(terms), total**asked))


def test_one_term_is_bounded_by_the_arc_cosine() -> None:
    for level in torch.linspace(0.001, 1.0, 500, dtype=torch.float64).tolist():
        exact = math.acos(level) / math.pi
        assert exact <= 10 ** log10_p_correlation(level, 1)


def test_two_terms_are_bounded() -> None:
    grid = torch.linspace(0, math.pi, 20_001, dtype=torch.float64).cos()
    for level in torch.linspace(0.01, 1.999, 200, dtype=torch.float64).tolist():
        exact = ((level - grid).clamp(-1, 1).acos() / math.pi).mean().item()
        assert exact <= 10 ** log10_p_correlation(level, 2) * (1 + 1e-3)


@pytest.mark.parametrize("n", [5, 50, 400])
def test_simulated_tail_stays_below_the_bound_and_not_far(n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    trials = 200_000
    sums = torch.zeros(trials)
    for _ in range(n):
        sums += torch.rand(trials, generator=draw).mul_(2 * math.pi).cos_()
    for deviations in (1.0, 2.0, 3.0, 3.1):
        level = deviations * math.sqrt(n / 2)
        hits = int((sums >= level).sum())
        log10_p = log10_p_correlation(level, n)
        assert log10_binomial_tail(hits, trials, 10**log10_p) > -6
        # Chernoff gives away about sqrt(2 pi) times the deviations; 12 leaves room for sampling noise.
        assert hits < 20 or 10**log10_p < 12 * hits / trials


def test_large_n_approaches_the_normal_tail() -> None:
    n = 100_000
    for deviations in (6.0, 12.0, 20.0):
        level = deviations * math.sqrt(n / 2)
        normal = math.log10(math.erfc(deviations / math.sqrt(2)) / 2)
        loss = log10_p_correlation(level, n) - normal
        assert 0.0 < loss < math.log10(math.sqrt(2 * math.pi) * deviations) + 0.1


def test_bound_is_the_minimum_over_a_fine_grid_of_tilts() -> None:
    tilts = torch.logspace(-4, 5, 200_001, dtype=torch.float64)
    log_i0e = torch.special.i0e(tilts).log()
    for mean in (1e-3, 0.03, 0.3, 0.7, 0.98, 0.999, 0.9999):
        n = 2304
        best = n * (log_i0e + tilts * (1 - mean)).min().item() / LN10
        assert log10_p_correlation(mean * n, n) == pytest.approx(best, rel=1e-6)
        assert log10_p_correlation(mean * n, n) <= best * (1 - 1e-12)


@pytest.mark.parametrize("n", [1, 64, 2304, 100_000])
def test_falls_with_the_statistic_and_stays_finite(n: int) -> None:
    means = [0.0, 1e-12, 1e-6, *(k / 200 for k in range(1, 200)), *(1 - 10.0**-k for k in range(3, 12)), 1.0]
    values = [log10_p_correlation(mean * n, n) for mean in means]
    assert all(math.isfinite(value) and value <= 0.0 for value in values)
    assert all(low >= high for low, high in itertools.pairwise(values))


def test_extremes() -> None:
    assert -4e5 < log10_p_correlation(100_000.0, 100_000) < -1e5
    assert log10_p_correlation(100_000.0 * (1 + 1e-6), 100_000) == log10_p_correlation(100_000.0, 100_000)
    assert log10_p_correlation(0.98 * 2304, 2304) < -1500
    assert log10_p_correlation(0.0, 0) == 0.0
    assert log10_p_correlation(0.0, 500) == 0.0
    assert log10_p_correlation(-500.0, 500) == 0.0


@pytest.mark.parametrize(
    ("statistic", "n"), [(math.nan, 10), (math.inf, 10), (10.1, 10), (-10.1, 10), (0.1, 0), (0.0, -1)]
)
def test_impossible_correlations(statistic: float, n: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        log10_p_correlation(statistic, n)


WEIGHTED = [
    ((1.0, 0.5), (30, 30)),
    ((1.0, 0.1), (5, 200)),
    ((1.0, 0.6, 0.02), (20, 150, 150)),
    ((1.0, 1.0), (8, 12)),
    ((3.0, 0.0), (40, 1000)),
    ((0.25,), (64,)),
]


@pytest.mark.parametrize("weight", [1e-3, 0.3, 1.0, 7.0])
def test_one_weighted_term_is_bounded_by_the_arc_cosine(weight: float) -> None:
    for level in torch.linspace(0.001, 1.0, 100, dtype=torch.float64).tolist():
        exact = math.acos(level) / math.pi
        bound = 10 ** log10_p_weighted(level * weight, (weight,), (1,))
        # Tight within a factor of 6 down to chances of 1%, for a single term too.
        assert exact <= bound
        assert exact < 0.01 or bound < 6 * max(exact, 1 / 6)


@pytest.mark.parametrize("small", [0.01, 0.3, 0.7, 1.0])
def test_two_weighted_terms_are_bounded(small: float) -> None:
    grid = (math.pi * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).cos()
    for level in torch.linspace(0.01, 1 + small - 0.001, 50, dtype=torch.float64).tolist():
        exact = ((level - small * grid).clamp(-1, 1).acos() / math.pi).mean().item()
        assert exact <= 10 ** log10_p_weighted(level, (1.0, small), (1, 1)) * (1 + 1e-3)


@pytest.mark.parametrize(("weights", "counts"), WEIGHTED)
def test_simulated_weighted_tail_stays_below_the_bound_and_not_far(
    weights: tuple[float, ...], counts: tuple[int, ...]
) -> None:
    draw, trials = torch.Generator().manual_seed(sum(counts)), 100_000
    sums = torch.zeros(trials)
    for weight, count in zip(weights, counts, strict=True):
        for _ in range(count if weight else 0):
            sums += torch.rand(trials, generator=draw).mul_(2 * math.pi).cos_().mul_(weight)
    sigma = math.sqrt(sum(n * w**2 for w, n in zip(weights, counts, strict=True)) / 2)
    for deviations in (0.5, 1.0, 2.0, 3.0):
        hits = int((sums >= deviations * sigma).sum())
        log10_p = log10_p_weighted(deviations * sigma, weights, counts)
        assert log10_binomial_tail(hits, trials, 10**log10_p) > -6
        # Never further than a factor of 12 above what happens: at three deviations Chernoff gives away 8.
        assert hits < 20 or 10**log10_p < 12 * hits / trials


def test_the_scale_of_the_weights_is_irrelevant() -> None:
    for scale in (1e-3, 0.1, 1e6):
        for statistic in (0.1, 20.0, 44.0, 45.0):
            expected = log10_p_weighted(statistic, (1.0, 0.5), (30, 30))
            got = log10_p_weighted(scale * statistic, (scale, scale / 2), (30, 30))
            # At the very end the cap of the tilt shows where weights are small: less is claimed, never more.
            assert got == pytest.approx(expected, rel=1e-6) if statistic < 45 else got < -20


def test_splitting_and_merging_equal_weights_changes_nothing() -> None:
    whole = log10_p_weighted(25.0, (1.0, 0.5), (30, 30))
    assert log10_p_weighted(25.0, (0.5, 1.0, 0.5), (10, 30, 20)) == pytest.approx(whole, rel=1e-12)
    assert log10_p_weighted(25.0, (1.0, 0.5, 0.0, 0.9), (30, 30, 500, 0)) == pytest.approx(whole, rel=1e-12)


def test_the_weighted_bound_is_the_minimum_over_a_fine_grid_of_tilts() -> None:
    tilts = torch.logspace(-4, 5, 100_001, dtype=torch.float64)
    for (weights, counts), share in itertools.product(WEIGHTED, (0.01, 0.3, 0.9, 0.999)):
        statistic = share * sum(w * n for w, n in zip(weights, counts, strict=True))
        best = -tilts * statistic
        for weight, count in zip(weights, counts, strict=True):
            best = best + count * (torch.special.i0e(tilts * weight).log() + tilts * weight)
        value = log10_p_weighted(statistic, weights, counts)
        assert value == pytest.approx(best.min().item() / LN10, rel=1e-5, abs=1e-9)
        assert value <= best.min().item() / LN10 + 1e-9


@pytest.mark.parametrize(
    ("statistic", "weights", "counts"),
    [
        (math.nan, (1.0,), (1,)),
        (15.1, (1.0, 0.5), (10, 10)),
        (0.5, (1.0, -0.5), (10, 10)),
        (0.5, (1.0, math.nan), (10, 10)),
        (0.5, (1.0,), (10, 10)),
        (0.5, (1.0, 0.5), (10, -1)),
        (0.5, (0.0,), (10,)),
    ],
)
def test_impossible_weighted_sums(statistic: float, weights: tuple[float, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        log10_p_weighted(statistic, weights, counts)


def test_no_weight_is_no_evidence() -> None:
    assert log10_p_weighted(0.0, (), ()) == 0.0
    assert log10_p_weighted(0.0, (0.0, 1.0), (10, 0)) == 0.0


@pytest.mark.parametrize("rate", [1e-9, 0.022, 0.25, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("asked", [1, 2, 7, 64, 300])
def test_binomial_tail_is_exact(asked: int, rate: float) -> None:
    for matches in sorted({0, 1, asked // 4, asked // 2, int(rate * asked), asked - 1, asked}):
        assert log10_binomial_tail(matches, asked, rate) == pytest.approx(
            exact_tail(matches, asked, rate), rel=1e-9, abs=0
        )


@pytest.mark.parametrize("matches", [49_000, 49_900, 50_000, 50_001, 50_500, 60_000, 100_000])
def test_binomial_tail_of_100000(matches: int) -> None:
    """With rate 1/2 the tail is a plain integer over 2^100000."""
    asked = 100_000
    short = min(matches - 1, asked - matches)
    term = total = 1
    for k in range(short):
        term = term * (asked - k) // (k + 1)
        total += term
    tail = Fraction(total, 1 << asked)
    expected = log10_fraction(tail if short == asked - matches else 1 - tail)
    assert log10_binomial_tail(matches, asked, 0.5) == pytest.approx(expected, rel=1e-9, abs=0)


def test_binomial_extremes() -> None:
    assert log10_binomial_tail(0, 0, 0.5) == 0.0
    assert log10_binomial_tail(0, 10, 0.5) == 0.0
    assert log10_binomial_tail(10, 10, 1.0) == 0.0
    assert log10_binomial_tail(100_000, 100_000, 0.1) == pytest.approx(-100_000, rel=1e-12)
    assert log10_binomial_tail(100, 100, 1e-300) == pytest.approx(-30_000, rel=1e-12)
    assert math.copysign(1.0, log10_binomial_tail(1, 100_000, 0.5)) == 1.0  # 0.0 in JSON, never -0.0


@pytest.mark.parametrize(
    ("matches", "asked", "rate"),
    [(-1, 10, 0.5), (11, 10, 0.5), (1, 10, 0.0), (1, 10, -0.1), (1, 10, 1.1), (1, 10, math.nan)],
)
def test_impossible_binomials(matches: int, asked: int, rate: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        log10_binomial_tail(matches, asked, rate)
    with pytest.raises(ValueError, match="expected"):
        log10_poisson_binomial_tail(matches, [rate] * asked)


def test_poisson_binomial_is_exact() -> None:
    rates = [0.5, 1 / 3, 0.022, 0.9, 1.0, 1e-6, 0.25, 0.7, 1 / 50_000, 0.5]
    for matches in range(len(rates) + 1):
        exact = Fraction(0)
        for outcome in itertools.product((True, False), repeat=len(rates)):
            if sum(outcome) >= matches:
                exact += math.prod(
                    Fraction(rate) if hit else 1 - Fraction(rate) for rate, hit in zip(rates, outcome, strict=True)
                )
        expected = log10_fraction(exact)
        assert log10_poisson_binomial_tail(matches, rates) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("matches", [1, 30, 44, 45, 60, 500, 2000])
def test_poisson_binomial_of_equal_rates_is_binomial(matches: int) -> None:
    assert log10_poisson_binomial_tail(matches, [0.022] * 2000) == pytest.approx(
        log10_binomial_tail(matches, 2000, 0.022), rel=1e-9, abs=0
    )


def test_poisson_binomial_extremes() -> None:
    assert log10_poisson_binomial_tail(0, []) == 0.0
    assert log10_poisson_binomial_tail(3, [1.0] * 3) == 0.0
    assert log10_poisson_binomial_tail(400, [1e-250] * 400) == pytest.approx(-100_000, rel=1e-12)


def exact_tally_tail(matches: int, tallies: Sequence[tuple[int, dict[int, int]]]) -> float:
    chances = [Fraction(1)]
    for k, counts in tallies:
        grown = [Fraction(0)] * (len(chances) + max(counts.values(), default=0))
        for candidate in range(k):
            for total, chance in enumerate(chances):
                grown[total + counts.get(candidate, 0)] += chance / k
        chances = grown
    return log10_fraction(sum(chances[matches:], Fraction(0)))


@st.composite
def some_tallies(draw: st.DrawFn) -> list[tuple[int, dict[int, int]]]:
    tallies = []
    for k in draw(st.lists(st.integers(1, 9), max_size=6)):
        named = draw(st.lists(st.none() | st.integers(0, k - 1), max_size=5))
        tallies.append((k, {index: named.count(index) for index in named if index is not None}))
    return tallies


@settings(deadline=None)
@given(some_tallies())
def test_tally_tail_is_exact(tallies: list[tuple[int, dict[int, int]]]) -> None:
    for matches in range(1 + sum(max(counts.values(), default=0) for _, counts in tallies)):
        expected = exact_tally_tail(matches, tallies)
        assert log10_tally_tail(matches, tallies) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("k", [2, 16, 45, 256])
def test_single_tries_are_poisson_binomial(k: int) -> None:
    answered, silent = [tally_of([7 % k], k)] * 60, [tally_of([None], k)] * 4
    for matches in (0, 1, 2, 10, 40, 60):
        expected = log10_poisson_binomial_tail(matches, [1 / k] * 60)
        assert log10_tally_tail(matches, answered) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        # A try that names none cannot match, whatever the key: it is as if it had not been asked.
        assert log10_tally_tail(matches, [*answered, *silent]) == log10_tally_tail(matches, answered)
        assert log10_tally_tail(matches, answered) <= log10_poisson_binomial_tail(matches, [1 / k] * 64) + 1e-12


def test_tries_that_all_say_the_same_are_no_more_evidence_than_one() -> None:
    once, often = [tally_of([3], 16)] * 64, [tally_of([3] * 5, 16)] * 64
    for matches in (1, 10, 64):
        assert log10_tally_tail(5 * matches, often) == pytest.approx(log10_tally_tail(matches, once), rel=1e-12)


def test_tally_extremes() -> None:
    assert log10_tally_tail(0, []) == 0.0
    assert log10_tally_tail(2, [(1, {0: 2})]) == 0.0
    assert log10_tally_tail(800, [(10**250, {5: 2, 6: 1})] * 400) == pytest.approx(-100_000, rel=1e-12)
    assert log10_tally_tail(1, [(10**9, {5: 1})]) == pytest.approx(-9, rel=1e-15)


def test_a_tally_counts_what_was_named() -> None:
    assert tally_of([3, None, 3, 0], 4) == (4, {3: 2, 0: 1})
    assert tally_of([None, None], 4) == (4, {})


@pytest.mark.parametrize("tally", [(4, {4: 1}), (4, {-1: 1}), (0, {}), (4, {0: -1})])
def test_impossible_tallies(tally: tuple[int, dict[int, int]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        log10_tally_tail(0, [tally])


@pytest.mark.parametrize("matches", [-1, 3])
def test_impossible_numbers_of_matching_tries(matches: int) -> None:
    # Two tries named the one candidate and two the other: three cannot have matched.
    with pytest.raises(ValueError, match="expected 0 to 2"):
        log10_tally_tail(matches, [(4, {0: 2, 1: 2})])


@pytest.mark.parametrize("index", [-1, 4])
def test_no_candidate_has_that_index(index: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        tally_of([0, index], 4)


def test_bonferroni() -> None:
    assert log10_bonferroni(-12.0, 1) == -12.0
    assert log10_bonferroni(-12.0, 1000) == pytest.approx(-9.0)
    assert log10_bonferroni(-2.0, 1000) == 0.0


def exact_fuse(a: float, b: float) -> Decimal:
    """Return log10 of x (1 - ln x) to 60 digits; 10^(a + b) itself is out of reach."""
    with localcontext(prec=60):
        exponent = Decimal(a) + Decimal(b)
        return exponent + (1 - exponent * Decimal(10).ln()).log10()


P_VALUES = st.floats(-1e6, 0.0) | st.floats(-1.0, 0.0) | st.floats(-12.0, 0.0).map(lambda x: -(10.0**x))


@settings(deadline=None)
@given(P_VALUES, P_VALUES)
def test_fused_p_is_fishers_and_never_too_small(a: float, b: float) -> None:
    fused, exact = log10_fuse(a, b), exact_fuse(a, b)

    assert exact - Decimal("1e-55") <= Decimal(fused) <= exact + Decimal(1e-12 + 2e-15 * abs(a + b))
    assert fused == log10_fuse(b, a)
    assert fused <= 0.0


@settings(deadline=None)
@given(P_VALUES, P_VALUES, st.integers(1, 1000))
def test_fused_p_is_monotone(a: float, b: float, ulps: int) -> None:
    assert log10_fuse(a, b) <= log10_fuse(min(a + ulps * math.ulp(a), 0.0), b)


def test_fuse() -> None:
    assert log10_fuse(-241.9, -77.1) == pytest.approx(-319 + math.log10(1 + 319 * LN10))
    assert log10_fuse(-241.9, None) == log10_fuse(None, -241.9) == -241.9
    assert log10_fuse(None, None) == log10_fuse(0.0, 0.0) == log10_fuse(0.0, None) == 0.0
    # A channel that was asked and gave nothing costs something.
    assert -9.0 < log10_fuse(-9.0, 0.0) < -7.6


@pytest.mark.parametrize("p", [0.1, math.nan, math.inf, -math.inf])
def test_impossible_p_values(p: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        log10_bonferroni(p, 1)
    for pair in ((p, None), (None, p), (p, -300.0), (-300.0, p)):
        with pytest.raises(ValueError, match="expected"):
            log10_fuse(*pair)


@pytest.mark.parametrize("tests", [0, -1])
def test_no_test_at_all(tests: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        log10_bonferroni(-3.0, tests)
