"""A merge with what the model was before marking draws the whole fine-tuning back; the reader undoes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.reader import open_suspect
from hf_wmguard.suspects.signature import OWNER_WEIGHTS, Attempt, read_attempts
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.planner import Mix
from hf_wmguard.watermark.pvalues import log10_bonferroni
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import move_, read_projections, residual

OWNER = OwnerKey(bytes(range(32)))
SIZE = 96
RMS = 0.15
CARRIERS = tuple(
    Carrier(name=f"h.{i}.w", shape=(SIZE, SIZE), row_start=0, rows=SIZE, sides=(24, 23), rms=RMS) for i in range(2)
)
Tiles = dict[str, Tensor]


def drawn(seed: int, share: float = 1.0) -> Tiles:
    draw = torch.Generator().manual_seed(seed)
    return {one.name: share * RMS * torch.randn(SIZE, SIZE, generator=draw) for one in CARRIERS}


def plus(one: Tiles, other: Tiles, weight: float = 1.0) -> Tiles:
    return {name: tile + weight * other[name] for name, tile in one.items()}


def merged(one: Tiles, other: Tiles, weight: float) -> Tiles:
    return {name: weight * tile + (1 - weight) * other[name] for name, tile in one.items()}


BASE = drawn(1)
RECORD = WatermarkRecord.create(
    OWNER,
    model_id="acme/merged",
    iteration="1",
    salt=bytes(32),
    carriers=CARRIERS,
    steps=Mix(((0.75, 700), (2.0, 300), (5.0, 104))),
    tile_of=lambda carrier: BASE[carrier.name],
)
KEYS = RECORD.carrier_keys(OWNER)
# As far along the mark's directions as an adapter goes, whose mark lies where it trains.
TRAINED = plus(BASE, drawn(2))


def marked() -> Tiles:
    tiles = {name: tile.clone() for name, tile in TRAINED.items()}
    for key in KEYS:
        tile = tiles[key.carrier.name]
        move_(tile, key, residual(read_projections(tile, key), key))
    return tiles


def attempts(tiles: Tiles) -> list[Attempt]:
    with open_suspect(tiles) as suspect:
        return read_attempts(RECORD, KEYS, suspect)


def best(tiles: Tiles) -> tuple[Attempt, float]:
    scored = [(one, one.reading.score()) for one in attempts(tiles)]
    attempt, score = min(scored, key=lambda pair: pair[1].log10_p)
    return attempt, log10_bonferroni(score.log10_p, sum(one.tests * s.tests for one, s in scored))


@pytest.mark.parametrize("weight", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("apart", [0.0, 0.03], ids=["base", "other fine-tune"])
def test_a_merge_is_undone(weight: float, apart: float) -> None:
    suspect = merged(marked(), plus(BASE, drawn(3), apart), weight)
    blind = attempts(suspect)[0].reading
    attempt, log10_p = best(suspect)
    assert blind.score().log10_p > log10_p / 2
    assert log10_p < -100
    nearest = min(OWNER_WEIGHTS, key=lambda one: abs(one / weight - 1))
    assert attempt.alignment == f"merge at {nearest:.2f}"
    payload = RECORD.decode_payload(OWNER, attempt.reading.soft * attempt.reading.score().weights)
    assert payload == RECORD.payload


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.1])
def test_an_innocent_merge_proves_nothing(weight: float) -> None:
    assert best(merged(TRAINED, BASE, weight))[1] > -3


def test_every_weight_that_is_tried_is_counted() -> None:
    tried = [one.alignment for one in attempts(marked())]
    assert tried[: 1 + len(OWNER_WEIGHTS)] == ["none", *(f"merge at {weight:.2f}" for weight in OWNER_WEIGHTS)]
    assert best(marked())[0].alignment == "none"


def test_weights_leave_no_gap_in_the_range_that_is_promised() -> None:
    for weight in torch.linspace(0.1, 0.9, 200).tolist():
        assert min(abs(one / weight - 1) for one in (1.0, *OWNER_WEIGHTS)) <= 0.126
