"""For any weights, key, code bits and step: what is embedded is read, and reading has the lattice's symmetries."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.signature import (
    CarrierKey,
    change_norm,
    move_,
    read_projections,
    read_signature,
    residual,
    soft_bits,
)

keys = st.binary(min_size=32, max_size=32)
seeds = st.integers(0, 2**31)


@st.composite
def carriers(draw: st.DrawFn) -> Carrier:
    """Carriers as `select_carriers` makes them, and tiles that begin further down."""
    side = draw(st.integers(1, 6))
    rows, columns = draw(st.integers(8 * side, 96)), draw(st.integers(8 * side, 96))
    start = draw(st.integers(0, 20))
    rms = draw(st.floats(1e-4, 1e2))
    return Carrier(
        name=draw(st.text(min_size=1, max_size=20)),
        shape=(start + rows + draw(st.integers(0, 9)), columns),
        row_start=start,
        rows=rows,
        side=side,
        step=rms * draw(st.floats(0.1, 16)),
        rms=rms,
    )


def gaussian(carrier: Carrier, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return carrier.rms * torch.randn(carrier.rows, carrier.shape[1], generator=draw)


def derive(key: bytes, carrier: Carrier, seed: int) -> CarrierKey:
    draw = torch.Generator().manual_seed(seed + 1)
    return CarrierKey.derive(key, carrier, torch.randint(0, 2, (carrier.projections,), generator=draw))


@settings(max_examples=60, deadline=None)
@given(key=keys, carrier=carriers(), seed=seeds)
def test_a_full_step_is_read_back(key: bytes, carrier: Carrier, seed: int) -> None:
    one, tile = derive(key, carrier, seed), gaussian(carrier, seed)
    move_(tile, one, residual(read_projections(tile, one), one))
    reading = read_signature([one], lambda carrier: tile)
    assert reading.bit_error_rate == 0.0
    # float32 weights: at the smallest step, a tenth of the rms, rounding is 1e-5 of D.
    assert reading.loss < 1e-6
    assert reading.projections == carrier.projections


@settings(max_examples=60, deadline=None)
@given(key=keys, carrier=carriers(), seed=seeds, strength=st.floats(-2, 2))
def test_a_move_does_what_it_says_at_the_norm_it_says(key: bytes, carrier: Carrier, seed: int, strength: float) -> None:
    one, tile = derive(key, carrier, seed), gaussian(carrier, seed)
    before, whole = read_projections(tile, one), tile.clone()
    shift = strength * residual(before, one)
    move_(tile, one, shift)
    scale = max(carrier.step, carrier.rms)
    torch.testing.assert_close(read_projections(tile, one), before + shift, atol=1e-4 * scale, rtol=0)
    norm = float((tile - whole).norm())
    assert abs(change_norm(one, shift) - norm) <= 1e-3 * norm + 1e-5 * carrier.rms * tile.numel() ** 0.5


@settings(max_examples=40, deadline=None)
@given(key=keys, carrier=carriers(), seed=seeds, whole_steps=st.integers(-1000, 1000))
def test_whole_steps_are_invisible_and_half_steps_flip(
    key: bytes, carrier: Carrier, seed: int, whole_steps: int
) -> None:
    one = derive(key, carrier, seed)
    projections = read_projections(gaussian(carrier, seed), one)
    soft = soft_bits(projections, one)
    torch.testing.assert_close(soft_bits(projections + whole_steps * carrier.step, one), soft, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft_bits(projections + 0.5 * carrier.step, one), -soft, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(key=keys, carrier=carriers(), seed=seeds, exponent=st.integers(-6, 6))
def test_only_the_ratio_of_weights_and_step_counts(key: bytes, carrier: Carrier, seed: int, exponent: int) -> None:
    factor = 2.0**exponent
    scaled = replace(carrier, step=factor * carrier.step, rms=factor * carrier.rms)
    tile = gaussian(carrier, seed)
    one, other = derive(key, carrier, seed), derive(key, scaled, seed)
    soft = soft_bits(read_projections(tile, one), one)
    torch.testing.assert_close(soft_bits(read_projections(factor * tile, other), other), soft, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(key=keys, seed=seeds, present=st.lists(st.booleans(), min_size=2, max_size=6))
def test_any_carriers_may_be_missing(key: bytes, seed: int, present: list[bool]) -> None:
    plan = [
        Carrier(name=f"h.{i}.w", shape=(24, 24), row_start=0, rows=24, side=2 + i % 2, step=2.0, rms=1.0)
        for i in range(len(present))
    ]
    derived = [derive(key, carrier, seed) for carrier in plan]
    tiles = {}
    for one, there in zip(derived, present, strict=True):
        if there:
            tile = gaussian(one.carrier, seed)
            move_(tile, one, residual(read_projections(tile, one), one))
            tiles[one.carrier.name] = tile
    reading = read_signature(derived, lambda carrier: tiles.get(carrier.name))
    assert reading.carriers_read == sum(present)
    assert reading.carriers_missing == len(present) - sum(present)
    assert reading.projections == sum(c.projections for c, there in zip(plan, present, strict=True) if there)
    assert reading.bit_error_rate == (0.0 if any(present) else 0.5)
    assert len(reading.soft) == len(reading.bits) == sum(carrier.projections for carrier in plan)


@settings(max_examples=100, deadline=None)
@given(carrier=carriers())
def test_records_of_carriers_come_back(carrier: Carrier) -> None:
    assert Carrier.from_json(json.loads(json.dumps(carrier.to_json()))) == carrier
