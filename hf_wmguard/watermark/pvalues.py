"""p-values, as base-10 logarithms: exact, or proven upper bounds, never estimates.

Every function takes what was seen and returns log10 of (a bound on) the probability to see as much or more
under H0, "this model was made without knowledge of this key". Values reach below 1e-100000, hence the
logarithms; they are never above 0, and an argument that cannot occur is an error and not a p-value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_LN10 = math.log(10.0)
# Beyond this tilt the bound would claim more than float32 phases hold: an error of 6e-8 in one cosine moves
# its share of the exponent by 0.06 nats here. The cap also keeps the bound finite at a perfect correlation.
_MAX_TILT = 1e6
# A sum of n cosines that were rounded to float32 may pass n by this fraction; anything above is a mistake.
_ROUNDING = 1e-5
_EXPONENT_GRID = 2.0**-40

Tally = tuple[int, Mapping[int, int]]
"""k, and for each of the candidates 0 to k - 1 that were named the number of tries that named it."""


def log10_p_correlation(statistic: float, n: int) -> float:
    """Return an upper bound on log10 P(cos U_1 + ... + cos U_n >= statistic), U_j independent uniform phases.

    Args and errors as `log10_p_weighted`, with all weights 1.
    """
    return log10_p_weighted(statistic, (1.0,), (n,))


def log10_p_weighted(statistic: float, weights: Sequence[float], counts: Sequence[int]) -> float:
    """Return an upper bound on log10 P(sum of w_j cos U_j >= statistic), U_j independent uniform phases.

    The dithers are uniform, secret and independent, so that this is H0 *whatever the suspect's weights are*.
    Chernoff's bound sum_j log I0(t w_j) - t statistic holds for every t >= 0; the best t only makes it tight. A t
    that is a little off can therefore never make the p-value too small.

    Args:
        statistic: Sum of the weighted, sign-corrected cosines.
        weights: The distinct weights, each at least 0.
        counts: Projections that were read with each weight. One that could not be read is left out of all arguments.
    Returns:
        log10 of the bound, at most 0; finite, and falling with the statistic. 0.0 where nothing was read or
        the statistic is not positive.
    Raises:
        ValueError: The statistic is NaN or exceeds its largest possible value by more than rounding, or a weight or a
            count is negative.
    Source: Chernoff 1952, theorem 1. sum w I1(t w) / I0(t w) = statistic at the best t is the maximum likelihood
        equation of the von Mises distribution (Mardia & Jupp 2000, sec. 5.3).
    """
    w = torch.tensor(list(weights), dtype=torch.float64)
    n = torch.tensor(list(counts), dtype=torch.float64)
    if w.shape != n.shape or not bool((w >= 0).all() & (n >= 0).all()):
        raise ValueError(f"weights {list(weights)} and counts {list(counts)}, expected as many of each, at least 0")
    largest = float(w @ n)
    if math.isnan(statistic) or abs(statistic) > largest * (1.0 + _ROUNDING):
        raise ValueError(f"statistic is {statistic}, expected -{largest} to {largest}")
    if statistic <= 0.0:
        return 0.0
    statistic = min(statistic, largest)
    tilt = _best_tilt(statistic, w, n)
    # log I0(t w) - t w, by i0e(t) = exp(-t) I0(t): I0 itself overflows at t = 714.
    scaled = torch.special.i0e(tilt * w).log()
    return _log10(float(n @ scaled) + tilt * (largest - statistic))


def _best_tilt(statistic: float, weights: Tensor, counts: Tensor) -> float:
    """Return t with sum n w I1(t w) / I0(t w) = statistic to 1e-9, at most `_MAX_TILT`, by bisection."""

    def mean(tilt: float) -> float:
        phases = tilt * weights
        return float((counts * weights) @ (torch.special.i1e(phases) / torch.special.i0e(phases)))

    low, high = 0.0, 1.0
    while high < _MAX_TILT and mean(high) < statistic:
        low, high = high, min(2 * high, _MAX_TILT)
    # The bound is flat at its minimum: an error of 1e-9 in t moves it by less than a double resolves.
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        if mean(middle) < statistic:
            low = middle
        else:
            high = middle
    return high


def log10_binomial_tail(matches: int, asked: int, rate: float) -> float:
    """Return log10 P(X >= matches) for X ~ Binomial(asked, rate), exact to 1e-9 of its value.

    Args:
        matches: Triggers that were answered as the key says, 0 to ``asked``.
        asked: Triggers that were asked. The exact coefficient takes up to 0.1 s at 100,000, 2 ms at 10,000.
        rate: Chance that a model made without the key matches one trigger, in (0, 1].
    Raises:
        ValueError: An argument outside its range, or NaN.
    """
    _check_matches(matches, asked)
    _check_rate(rate)
    if matches == 0 or rate == 1.0:
        return 0.0
    odds = rate / (1.0 - rate)
    # The sum starts at its largest term and only falls, so it needs no logarithms. On the near side of the
    # mode the other tail is summed: 1 - p keeps its digits there while p is close to 1.
    if matches > (asked + 1) * rate:
        ratios = ((asked - k) / (k + 1) * odds for k in range(matches, asked))
        return _log10(_log_binomial_term(matches, asked, rate) + math.log(_falling_sum(ratios)))
    ratios = (k / ((asked - k + 1) * odds) for k in range(matches - 1, 0, -1))
    return _log10(_log_complement(_log_binomial_term(matches - 1, asked, rate) + math.log(_falling_sum(ratios))))


def _log_binomial_term(k: int, asked: int, rate: float) -> float:
    """Return log P(X = k) in nats."""
    # The integer coefficient and not lgamma: three numbers near 1e6 would cancel to what is asked for.
    return math.log(math.comb(asked, k)) + k * math.log(rate) + (asked - k) * math.log1p(-rate)


def _falling_sum(ratios: Iterable[float]) -> float:
    """Return 1 + r1 + r1 r2 + ..., for ratios of at most 1 that fall, to the last digit of a float64."""
    total = term = 1.0
    for ratio in ratios:
        term *= ratio
        total += term
        if term < 1e-20 * total:
            break
    return total


def log10_poisson_binomial_tail(matches: int, rates: Sequence[float]) -> float:
    """Return log10 P(X >= matches) for X a sum of independent unequal coins, exact to 1e-9 of its value.

    Args:
        matches: Triggers that were answered as the key says, 0 to ``len(rates)``.
        rates: For each trigger that was asked, the chance that a model made without the key matches it, in
            (0, 1]. Time grows with the square of their number: 2,000 take about 0.1 s.
    Raises:
        ValueError: An argument outside its range, or NaN.
    """
    _check_matches(matches, len(rates))
    for rate in rates:
        _check_rate(rate)
    return _log10_sum_tail(matches, ({0: 1.0 - rate, 1: rate} for rate in rates))


def tally_of(named: Iterable[int | None], k: int) -> Tally:
    """Return how often the tries of one trigger named each of its k candidates.

    Args:
        named: For each try the index of the candidate that its answer named, None where it named none or was refused.
        k: Number of candidates.
    Raises:
        ValueError: An index outside 0 to k - 1.
    """
    tally = k, Counter(index for index in named if index is not None)
    _check_tally(tally)
    return tally


def log10_tally_tail(matches: int, tallies: Sequence[Tally]) -> float:
    """Return log10 P(sum_i n_i(Y_i) >= matches), Y_i independent and uniform over k_i candidates, exact to 1e-9 of it.

    This is the p-value of several tries per trigger. n_i(c) is the number of tries of trigger i that named candidate
    c; tries of one trigger are answered by one model and depend on each other in an unknown way. Nothing is assumed of
    that: the answers are given, and only the responses are drawn, as the key draws them. Everything that was asked
    enters, and when to stop must not have been decided by matches (`SequentialTest` allows that). With one try that
    names a candidate it is `log10_poisson_binomial_tail` at rates 1/k_i; a try that names none adds nothing.

    Args:
        matches: Tries that named the response of their trigger.
        tallies: For each trigger that was asked k and, for each candidate, the number of tries that named it. Time
            grows with triggers times tries: 1,000 of 4 take about 0.1 s.
    Raises:
        ValueError: A number of matches that no responses can give, or a tally that is none.
    """
    for tally in tallies:
        _check_tally(tally)
    _check_matches(matches, sum(max(counts.values(), default=0) for _, counts in tallies))
    return _log10_sum_tail(matches, map(_law, tallies))


def _law(tally: Tally) -> dict[int, float]:
    """Return the chances of each number of tries that a uniformly drawn candidate was named by."""
    k, counts = tally
    drawn = Counter(counts.values())
    drawn[0] = k - sum(n for tries, n in drawn.items() if tries)
    return {tries: n / k for tries, n in drawn.items()}


def _log10_sum_tail(matches: int, laws: Iterable[Mapping[int, float]]) -> float:
    """Return log10 P(X_1 + ... + X_n >= matches), X_i independent with chance laws[i][v] of the value v."""
    if matches == 0:
        return 0.0
    # log P(sum so far). Logarithms, because 64 chances of 1e-6 pass float64's range.
    pmf = torch.zeros(1, dtype=torch.float64)
    for law in laws:
        grown = torch.full((len(pmf) + max(law),), -torch.inf, dtype=torch.float64)
        for value, chance in law.items():
            if chance > 0.0:
                part = grown[value : value + len(pmf)]
                torch.logaddexp(part, pmf + math.log(chance), out=part)
        pmf = grown
    tail = pmf[matches:].logsumexp(0).item()
    # On the near side of the median the other tail is summed: 1 - p keeps its digits there while p is close to 1.
    return _log10(tail if tail < -1.0 else _log_complement(pmf[:matches].logsumexp(0).item()))


def log10_bonferroni(log10_p: float, tests: int) -> float:
    """Return the p-value of the best of several tests, however they depend on each other.

    Args:
        log10_p: The smallest p-value that any of them gave, as log10.
        tests: Every key, slot, alignment and layer choice that was tried, looked at or not.
    Raises:
        ValueError: No test, or a p-value that is none.
    """
    _check_log10_p(log10_p)
    if tests < 1:
        raise ValueError(f"tests is {tests}, expected at least 1")
    return min(log10_p + math.log10(tests), 0.0)


def log10_fuse(a: float | None, b: float | None) -> float:
    """Return one p-value for two independent channels of one commitment: Fisher's product x (1 - ln x), x = p_a p_b.

    Weights and triggers are independent under H0: carriers and trigger responses come from two HKDF subkeys of the
    commitment, "carriers" and "triggers", that are independent of each other and, under H0, of the suspect. Given
    suspect and carriers, so for each value of p_a, the responses are still uniform and P(p_b <= u) <= u. Hence
    P(p_a p_b <= x) <= E min(1, x / p_a) <= x (1 - ln x), also where a p-value is discrete or a bound. Each channel is
    corrected for the tests within it before, the result for the number of commitments after. Where the two suspects
    are not the same, a small p says that one of them at least was made with the key.

    Args:
        a: log10 p-value of one channel, None where it was not asked. That choice must be made before either
            is read; a channel that was asked and could not be read is 0.0, not None.
        b: The other channel, alike.
    Returns:
        log10 of the fused p-value, at most 0, monotone in both, rounded up by less than 1e-12 + 2e-15 |log10 x|; the
        only channel's own where one was asked, 0.0 where none was.
    Raises:
        ValueError: A p-value that is none.
    Source: Fisher 1932, "Statistical methods for research workers", sec. 21.1.
    """
    asked = [p for p in (a, b) if p is not None]
    for p in asked:
        _check_log10_p(p)
    if len(asked) < 2:
        return sum(asked, 0.0)
    # Rounded up to a multiple of 2^-40: two sums are equal or further apart than what rounding does below, so that the
    # result is monotone. From 2^12 on, doubles are no closer than that anyway.
    exponent = math.nextafter(sum(asked), 0.0)
    nats = (math.fmod(exponent, _EXPONENT_GRID) - exponent) * _LN10
    # -ln x; what follows is off by less than 1e-15 of it, which is given away.
    return _log10(math.log1p(nats) - nats + 1e-15 * nats)


def _log10(nats: float) -> float:
    """Return nats as log10, at most 0.0 (adding 0.0 turns -0.0 into it)."""
    return min(nats / _LN10, 0.0) + 0.0


def _log_complement(nats: float) -> float:
    """Return log(1 - exp(nats))."""
    return math.log1p(-math.exp(nats))


def _check_matches(matches: int, most: int) -> None:
    if not 0 <= matches <= most:
        raise ValueError(f"matches is {matches}, expected 0 to {most} (the most that can match)")


def _check_rate(rate: float) -> None:
    # Written so that NaN fails too. A rate of 0 would make one match a proof, which no model can promise.
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate is {rate}, expected above 0 and at most 1")


def _check_tally(tally: Tally) -> None:
    k, counts = tally
    if k < 1 or not all(0 <= index < k for index in counts) or not all(n >= 0 for n in counts.values()):
        raise ValueError(f"tally of {k} candidates names {dict(counts)}, expected indices below it and counts from 0")


def _check_log10_p(log10_p: float) -> None:
    if not -math.inf < log10_p <= 0.0:
        raise ValueError(f"log10 p is {log10_p}, expected a finite value of at most 0")
