"""False positives over many wrong keys: whatever the suspect is, p <= alpha happens at most alpha often.

A suspect is fixed and the keys are drawn, as in the claim that the p-value makes. Each suspect here is one
that a scheme with an empirical threshold would get wrong: wide, constant, quantised to the step itself, or
marked with somebody else's key.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.signature import read_attempts
from hf_wmguard.suspects.sources import InMemory
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.payload import MIN_CODE_BITS, encode
from hf_wmguard.watermark.planner import Mix
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import log10_binomial_tail, log10_bonferroni, log10_p_correlation
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections, residual

STEP = 2.0
KEYS = 20_000
PROJECTIONS = 128
# The count itself is a statistic: below this p-value the bound would be broken, and not unlucky.
BROKEN_LOG10 = -6.0


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def threshold(log10_alpha: float, n: int) -> float:
    """Return the smallest statistic whose p-value is at most alpha, by bisection on the monotone bound."""
    low, high = 0.0, float(n)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if log10_p_correlation(middle, n) <= log10_alpha else (middle, high)
    return high


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Return the dithers and the code signs of 20,000 keys, float64 [keys, projections] each."""
    dithers, signs = [], []
    for number in range(KEYS):
        stream = Stream(key(number), "null")
        dithers.append(STEP * stream.uniform(PROJECTIONS))
        signs.append(1.0 - 2.0 * stream.bits(PROJECTIONS).double())
    return torch.stack(dithers), torch.stack(signs)


def suspects() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    marked = STEP * Stream(key(KEYS), "null").uniform(PROJECTIONS)
    return {
        "gaussian": 3.0 * torch.randn(PROJECTIONS, generator=draw, dtype=torch.float64),
        "constant": torch.full((PROJECTIONS,), 0.4, dtype=torch.float64),
        "zero": torch.zeros(PROJECTIONS, dtype=torch.float64),
        "grid of the step": STEP * torch.randint(-5, 6, (PROJECTIONS,), generator=draw).double(),
        "grid of half a step": STEP / 2 * torch.randint(-5, 6, (PROJECTIONS,), generator=draw).double(),
        "huge": 1e6 * torch.randn(PROJECTIONS, generator=draw, dtype=torch.float64),
        "marked with another key": marked + STEP * torch.randint(-3, 4, (PROJECTIONS,), generator=draw),
    }


@pytest.mark.parametrize("name", suspects())
def test_false_positives_stay_within_the_exact_bound(name: str, drawn: tuple[Tensor, Tensor]) -> None:
    dithers, signs = drawn
    statistics = (signs * torch.cos(2 * math.pi * (suspects()[name] - dithers) / STEP)).sum(dim=1)
    for log10_alpha in (-2.0, -3.0):
        count = int((statistics >= threshold(log10_alpha, PROJECTIONS)).sum())
        assert log10_binomial_tail(count, KEYS, 10**log10_alpha) > BROKEN_LOG10
        # A bound that nothing ever comes near would pass the line above and detect no mark either.
        assert log10_alpha < -2.0 or count > 0


def test_whole_codewords_of_wrong_keys() -> None:
    """The same with the interleaved and masked code bits of one payload that everybody knows."""
    keys, n = 1_000, MIN_CODE_BITS
    projections = 3.0 * torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count = 0
    for number in range(keys):
        dithers = STEP * Stream(key(number), "dither").uniform(n)
        signs = 1.0 - 2.0 * encode(bytes(32), n, Stream(key(number), "payload")).double()
        statistic = (signs * torch.cos(2 * math.pi * (projections - dithers) / STEP)).sum().item()
        count += log10_p_correlation(statistic, n) <= -1.0
    assert count > 0
    assert log10_binomial_tail(count, keys, 0.1) > BROKEN_LOG10


OWNERS = 400


@pytest.mark.parametrize("suspect", ["unmarked", "marked by another owner", "scaled"])
def test_whole_verdicts_of_wrong_owners(suspect: str) -> None:
    """Owner keys through the product: record, derivation, baselines, attempts, weightings and their correction."""
    carriers = tuple(
        Carrier(name=f"h.{i}.w", shape=(48, 40), row_start=0, rows=48, sides=(24, 23), rms=0.15) for i in range(2)
    )
    mix = Mix(((0.75, 500), (1.5, 500), (5.0, 104)))
    draw = torch.Generator().manual_seed(5)
    original = {carrier.name: 0.15 * torch.randn(48, 40, generator=draw) for carrier in carriers}
    tiles = {name: tile.clone() for name, tile in original.items()}

    def record_of(number: int) -> tuple[WatermarkRecord, tuple[CarrierKey, ...]]:
        owner = OwnerKey(key(number))
        record = WatermarkRecord.create(
            owner,
            model_id="acme/null",
            iteration="1",
            salt=bytes(32),
            carriers=carriers,
            steps=mix,
            tile_of=lambda carrier: original[carrier.name],
        )
        return record, record.carrier_keys(owner)

    def judge(number: int) -> float:
        record, keys = record_of(number)
        scores = [attempt.reading.score() for attempt in read_attempts(record, keys, InMemory(tiles))]
        return log10_bonferroni(min(score.log10_p for score in scores), sum(score.tests for score in scores))

    if suspect == "marked by another owner":
        for one in record_of(KEYS)[1]:
            tile = tiles[one.carrier.name]
            move_(tile, one, residual(read_projections(tile, one), one))
        assert judge(KEYS) < -50
    if suspect == "scaled":
        for tile in tiles.values():
            tile *= torch.exp(0.5 * torch.randn(48, 1, generator=draw))
    values = [judge(number) for number in range(1, 1 + OWNERS)]
    assert any(value < -0.3 for value in values)
    for log10_alpha in (-0.5, -1.0, -2.0, -3.0):
        count = sum(value <= log10_alpha for value in values)
        assert log10_binomial_tail(count, len(values), 10**log10_alpha) > BROKEN_LOG10


def test_the_right_key_is_found() -> None:
    """The same reading with the key that wrote the mark: the counts above are not a broken reader's."""
    stream = Stream(key(7), "null")
    dithers, bits = STEP * stream.uniform(PROJECTIONS), stream.bits(PROJECTIONS).double()
    draw = torch.Generator().manual_seed(2)
    noise = 0.1 * STEP * torch.randn(PROJECTIONS, generator=draw, dtype=torch.float64)
    projections = dithers + bits * STEP / 2 + STEP * torch.randint(-3, 4, (PROJECTIONS,), generator=draw) + noise
    statistic = ((1.0 - 2.0 * bits) * torch.cos(2 * math.pi * (projections - dithers) / STEP)).sum().item()
    assert log10_p_correlation(statistic, PROJECTIONS) < -30
