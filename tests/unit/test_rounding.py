"""Stochastic rounding: one of the two neighbours, unbiased, and the only write that brings a ramp into 16 bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.rounding import add_rounded_, round_stochastic
from hf_wmguard.watermark.signature import CarrierKey, Reading, project, residual

HALVES = [torch.bfloat16, torch.float16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest value and the one on the other side of each, found by counting through all 65536."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    every = torch.unique(every[torch.isfinite(every)])
    above = every[torch.searchsorted(every, values).clamp(max=len(every) - 1)]
    below = every[(torch.searchsorted(every, values, right=True) - 1).clamp(min=0)]
    return below, above


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-9, 3e-8, 1e-5, 0.02, 1.0, 900.0])
def test_result_is_a_neighbour(dtype: torch.dtype, scale: float) -> None:
    values = scale * torch.randn(20_000)
    rounded = round_stochastic(values, dtype, generator())
    assert rounded.dtype == dtype
    below, above = neighbours(values, dtype)
    assert bool(((rounded.float() == below) | (rounded.float() == above)).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_of_the_type_stays(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    for seed in range(3):
        assert torch.equal(round_stochastic(every.float(), dtype, generator(seed)), every)


@pytest.mark.parametrize("dtype", HALVES)
def test_largest_value_is_not_left(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest * 1.0001, -largest * 1.0001, 3e38, -3e38]).clamp(-3.4e38, 3.4e38)
    rounded = round_stochastic(values, dtype, generator()).float()
    assert bool(torch.isfinite(rounded).all())
    assert rounded[0] == largest
    assert rounded[1] == -largest


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("share", [0.001, 0.25, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_expected_value_is_the_value(dtype: torch.dtype, share: float, sign: float) -> None:
    low, unit, count = 0.0156250, torch.finfo(dtype).eps * 0.0156250, 400_000
    rounded = round_stochastic(torch.full((count,), sign * (low + share * unit)), dtype, generator())
    ups = float((rounded.float().abs() > low).float().mean())
    assert ups == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


@pytest.mark.parametrize("dtype", HALVES)
def test_same_seed_same_bits_and_no_other_generator_is_touched(dtype: torch.dtype) -> None:
    values = torch.randn(1000)
    state = torch.get_rng_state()
    first, second, other = (round_stochastic(values, dtype, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def _ramp(dtype: torch.dtype, steps: int, *, naive: bool) -> Reading:
    """Bring a mark into a 16-bit matrix over a ramp and read it back."""
    weights = (0.05 * torch.randn(128, 256)).to(dtype)
    count = 12
    carrier = Carrier(
        name="model.layers.0.a.weight", shape=(128, 256), row_start=0, rows=128, sides=(count, count), rms=0.05
    )
    bits = torch.randint(2, (count**2,))
    key = CarrierKey.derive(b"k" * 32, carrier, bits, torch.full((count**2,), 1.0, dtype=torch.float64))
    noise = generator()
    # The way is laid down once: a last step that saw what is still missing would bring all of it in at once.
    shift = residual(project(weights, key), key) / steps
    change = key.left @ key.spread(shift) @ key.right.T
    for _ in range(steps):
        if naive:
            weights = (weights.float() + change).to(dtype)
        else:
            add_rounded_(weights, change, noise)
    return Reading.of([key], [project(weights, key)])


@pytest.mark.parametrize("dtype", HALVES)
def test_naive_write_embeds_nothing_where_ours_embeds(dtype: torch.dtype) -> None:
    # float16 has eight times as many values, and needs a longer ramp to show the same.
    steps = 200 if dtype == torch.bfloat16 else 1600
    naive, ours = _ramp(dtype, steps, naive=True), _ramp(dtype, steps, naive=False)
    assert 0.4 < naive.bit_error_rate < 0.6
    assert ours.bit_error_rate == 0.0
    assert ours.correlation > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_are_rounded_as_the_whole(dtype: torch.dtype) -> None:
    weights = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    change = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) * 1e-3
    whole = weights.clone()
    add_rounded_(whole, change, torch.Generator().manual_seed(3))
    for row, column in ((0, 0), (0, 5), (4, 0), (4, 5)):
        part = (slice(row, row + (4 if row == 0 else 2)), slice(column, column + (5 if column == 0 else 3)))
        own = weights[part].clone()
        add_rounded_(own, change[part], torch.Generator().manual_seed(3), whole=(6, 8), at=(row, column))
        assert torch.equal(own, whole[part])
