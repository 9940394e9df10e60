"""An anytime-valid test of matches: ask key after key, look after each, stop whenever the p-value is small enough.

For a trigger with k candidates whose tries named candidate c n(c) times, and a tilt t >= 0, the e-value is

    E(t) = exp(t n(y)) / mean over c of exp(t n(c))

where y is the response. Under H0 y is uniform over the k candidates given everything that was asked and answered up to
and including this trigger, and given the responses of the triggers before it (`derive_responses`). So E(t) has mean 1
given that past, whatever n is: the product over the triggers is a nonnegative martingale that starts at 1, and so is
the mixture of the products over fixed tilts with fixed weights. By Ville's inequality it ever reaches 1/p with a
chance of at most p. The reciprocal of its largest value is therefore a p-value at *every* time, also at one that was
chosen because it looked best, and also where there is no end.

What the proof needs is that n does not depend on y other than through the past, and no more:

* **Stopping** at any time for any reason, and going on afterwards, is covered by "ever".
* **Order**: random, or chosen by past matches (which trigger next, how many tries it is to get): the next y is uniform
  given the past all the same.
* **Refused answers** and answers outside the candidates: they are no part of n; a trigger without any has E(t) = 1.
* **Unequal k**, answers that depend on earlier questions, a server that answers all alike or blocks after a while: n is
  an arbitrary function of the past and of randomness without the key.
* **Blocks**: the tries of one trigger are one step. Once its response has been compared with an answer it is no longer
  unknown, and for whoever sees whether it matched, the product over single tries is no martingale: a model that
  answers every try alike matches again and again after the first. So all tries of a trigger are completed, or given up
  because of what the answers are, before any of them is compared; whether to try again must not depend on a match.

Source: Ville 1939, "Etude critique de la notion de collectif"; Shafer & Vovk 2019, "Game-theoretic foundations for
    probability and finance", ch. 2; Ramdas, Grunwald, Vovk & Shafer 2023, "Game-theoretic statistics and safe
    anytime-valid inference", Statistical Science 38(4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from hf_wmguard.watermark.pvalues import Tally, tally_of

TILTS: Final = tuple(0.25 * 2 ** (j / 4) for j in range(23))
"""0.25 to 11.3, all of the same weight. For one try per trigger, a match rate of q and k candidates, the tilt
t = ln(q (k - 1) / (1 - q)) grows fastest; for m tries that are answered alike, t / m (docs/adr/0010-sequential.md)."""

_LN10 = math.log(10.0)


def log_e_value(tally: Tally, response: int, tilt: float) -> float:
    """Return ln E(t) of one trigger, all its tries as one block.

    Args:
        tally: What its tries named.
        response: Index of its response.
        tilt: t, at least 0.
    """
    k, counts = tally
    # Divided by the largest term, so that nothing overflows.
    most = max(counts.values(), default=0)
    terms = [math.exp(tilt * (n - most)) for n in counts.values()]
    mean = (math.fsum(terms) + (k - len(terms)) * math.exp(-tilt * most)) / k
    return tilt * (counts.get(response, 0) - most) - math.log(mean)


class SequentialTest:
    """The running p-value of one trigger set.

    Every trigger enters once, in the order in which they were asked; leaving one out because of what it showed would
    break the test. Whether this test or `log10_tally_tail` judges is settled before the first question.
    """

    __slots__ = ("_best", "_log_e")

    def __init__(self) -> None:
        self._log_e = [0.0] * len(TILTS)
        self._best = 0.0

    def update(self, named: Sequence[int | None], response: int, k: int) -> None:
        """Take in one trigger, all its tries at once.

        Args:
            named: For each try the index of the candidate that its answer named, None where it named none or was
                refused.
            response: Index of the trigger's response among its candidates.
            k: Number of its candidates.
        Raises:
            ValueError: An index outside 0 to k - 1.
        """
        tally = tally_of(named, k)
        if not 0 <= response < k:
            raise ValueError(f"response is candidate {response}, expected 0 to {k - 1}")
        self._log_e = [
            total + log_e_value(tally, response, tilt) for total, tilt in zip(self._log_e, TILTS, strict=True)
        ]
        most = max(self._log_e)
        mixed = most + math.log(math.fsum(math.exp(total - most) for total in self._log_e) / len(TILTS))
        self._best = max(self._best, mixed)

    @property
    def log10_p(self) -> float:
        """log10 of the p-value after what was asked so far, at most 0; it never rises."""
        return -self._best / _LN10 + 0.0

    def __repr__(self) -> str:
        return f"SequentialTest(log10_p={self.log10_p:.1f})"
