"""For any weights, key, code bits and step: what is embedded is read, and reading has the lattice's symmetries."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.planner import MAX_PROJECTIONS, Mix, choose_mix
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
    left, right = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rows, columns = draw(st.integers(8 * left, 96)), draw(st.integers(8 * right, 96))
    start = draw(st.integers(0, 20))
    rms = draw(st.floats(1e-4, 1e2))
    return Carrier(
        name=draw(st.text(min_size=1, max_size=20)),
        shape=(start + rows + draw(st.integers(0, 9)), columns),
        row_start=start,
        rows=rows,
        sides=(left, right),
        rms=rms,
    )


def gaussian(carrier: Carrier, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return carrier.rms * torch.randn(carrier.rows, carrier.shape[1], generator=draw)


def derive(key: bytes, carrier: Carrier, seed: int) -> CarrierKey:
    """Return a key with steps all over the range that a config takes."""
    draw = torch.Generator().manual_seed(seed + 1)
    bits = torch.randint(0, 2, (carrier.projections,), generator=draw)
    steps = 0.1 + 15.9 * torch.rand(carrier.projections, generator=draw, dtype=torch.float64)
    return CarrierKey.derive(key, carrier, bits, steps)


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
    scale = max(float(one.step.max()), carrier.rms)
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
    torch.testing.assert_close(soft_bits(projections + whole_steps * one.step, one), soft, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft_bits(projections + 0.5 * one.step, one), -soft, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(key=keys, carrier=carriers(), seed=seeds, exponent=st.integers(-6, 6))
def test_only_the_ratio_of_weights_and_step_counts(key: bytes, carrier: Carrier, seed: int, exponent: int) -> None:
    factor = 2.0**exponent
    scaled = replace(carrier, rms=factor * carrier.rms)
    tile = gaussian(carrier, seed)
    one, other = derive(key, carrier, seed), derive(key, scaled, seed)
    soft = soft_bits(read_projections(tile, one), one)
    torch.testing.assert_close(soft_bits(read_projections(factor * tile, other), other), soft, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(key=keys, seed=seeds, present=st.lists(st.booleans(), min_size=2, max_size=6))
def test_any_carriers_may_be_missing(key: bytes, seed: int, present: list[bool]) -> None:
    plan = [
        Carrier(name=f"h.{i}.w", shape=(24, 24), row_start=0, rows=24, sides=(2 + i % 2, 3), rms=1.0)
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


@settings(max_examples=40, deadline=None)
@given(key=keys, carrier=carriers(), seed=seeds, spread=st.floats(0, 1))
def test_what_was_measured_before_undoes_mark_and_scaling(
    key: bytes, carrier: Carrier, seed: int, spread: float
) -> None:
    one, tile = derive(key, carrier, seed), gaussian(carrier, seed)
    baseline = Baseline.from_json(json.loads(json.dumps(Baseline.measure(tile, one).to_json())))
    assert baseline.fits(carrier)
    marked = tile.clone()
    move_(marked, one, residual(read_projections(marked, one), one))
    baseline.unmark_(marked, one)
    torch.testing.assert_close(marked, tile, atol=1e-3 * carrier.rms, rtol=0)
    draw = torch.Generator().manual_seed(seed + 2)
    scaled = tile * torch.exp(spread * torch.randn(carrier.rows, 1, generator=draw))
    torch.testing.assert_close(baseline.rescale(scaled, carrier), tile, atol=0.01 * carrier.rms, rtol=0.01)


@settings(max_examples=100, deadline=None)
@given(cost=st.floats(0, 1e6), total=st.integers(0, 20_000), room=st.integers(1, MAX_PROJECTIONS))
def test_any_mix_keeps_what_it_was_given(cost: float, total: int, room: int) -> None:
    mix = choose_mix(cost, room=room)
    assert mix.projections <= room
    assert mix.projections * mix.mean_square <= cost * (1 + 1e-9)
    if mix.parts:
        assert mix.of(total).projections == total
    assert Mix.from_json(json.loads(json.dumps([list(part) for part in mix.parts]))) == mix


@settings(max_examples=100, deadline=None)
@given(carrier=carriers())
def test_records_of_carriers_come_back(carrier: Carrier) -> None:
    assert Carrier.from_json(json.loads(json.dumps(carrier.to_json()))) == carrier
