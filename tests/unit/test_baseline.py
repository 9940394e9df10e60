"""What is noted of a tile before it is marked, and what may be undone on the strength of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_wmguard.canonical import encode_base64
from hf_wmguard.errors import FormatError, NonFiniteWeightError
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import log10_binomial_tail
from hf_wmguard.watermark.signature import CarrierKey, Reading, move_, read_projections, residual, try_projections

ROWS, COLUMNS = 96, 64
CARRIER = Carrier(name="h.0.w", shape=(ROWS, COLUMNS), row_start=0, rows=ROWS, sides=(6, 5), rms=0.15)


def derive(number: int, carrier: Carrier = CARRIER) -> CarrierKey:
    key = number.to_bytes(32, "big")
    steps = torch.full((carrier.projections,), 1.5, dtype=torch.float64)
    return CarrierKey.derive(key, carrier, Stream(key, "bits").bits(carrier.projections), steps)


def gaussian(seed: int = 3) -> Tensor:
    return 0.15 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def mark(tile: Tensor, key: CarrierKey) -> Tensor:
    marked = tile.clone()
    move_(marked, key, residual(read_projections(marked, key), key))
    return marked


def scaled(tile: Tensor, seed: int = 5, spread: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(ROWS, 1, generator=draw))
    return rows * tile * torch.exp(spread * torch.randn(COLUMNS, generator=draw))


@pytest.fixture(scope="module")
def key() -> CarrierKey:
    return derive(1)


@pytest.fixture(scope="module")
def tile() -> Tensor:
    return gaussian()


@pytest.fixture(scope="module")
def baseline(tile: Tensor, key: CarrierKey) -> Baseline:
    return Baseline.measure(tile, key)


def read(tile: Tensor | None, key: CarrierKey) -> Reading:
    return Reading.of([key], [try_projections(tile, key)])


def test_what_is_measured(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    assert baseline.fits(CARRIER)
    torch.testing.assert_close(baseline.projections_of(key), read_projections(tile, key), atol=1e-7, rtol=1e-6)
    assert baseline.stretch(tile, CARRIER)[0] < 1e-3
    assert baseline.likeness(read_projections(tile, key), key) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_measured(tile: Tensor, key: CarrierKey, dtype: torch.dtype) -> None:
    assert Baseline.measure(tile.to(dtype), key).likeness(read_projections(tile, key), key) > 0.999


def test_a_damaged_tile_is_not_measured(tile: Tensor, key: CarrierKey) -> None:
    for bad in (math.nan, math.inf):
        damaged = tile.clone()
        damaged[3, 4] = bad
        with pytest.raises(NonFiniteWeightError):
            Baseline.measure(damaged, key)


def test_the_same_tile_is_known_again_and_another_is_not(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    marked = mark(tile, key) + 0.05 * gaussian(9)
    assert baseline.likeness(read_projections(marked, key), key) > 0.8
    others = [baseline.likeness(read_projections(gaussian(seed), key), key) for seed in range(20, 40)]
    assert max(map(abs, others)) < 0.7
    assert baseline.likeness(torch.zeros(6, 5, dtype=torch.float64), key) == 0.0


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_a_diagonal_scaling_is_undone(tile: Tensor, key: CarrierKey, baseline: Baseline, spread: float) -> None:
    marked = mark(tile, key)
    attacked = scaled(marked, spread=spread)
    assert baseline.stretch(attacked, CARRIER)[0] > 0.2
    assert read(attacked, key).correlation < 0.5
    assert read(baseline.rescale(attacked, CARRIER), key).correlation > 0.75
    # Norms of the marked tile would be exact; those from before marking are near.
    torch.testing.assert_close(baseline.rescale(attacked, CARRIER), marked, atol=0.2, rtol=0.3)


def test_a_gain_is_a_scaling_too(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    attacked = 7.0 * mark(tile, key)
    assert baseline.stretch(attacked, CARRIER)[0] == pytest.approx(math.log(7), rel=0.02)
    assert read(baseline.rescale(attacked, CARRIER), key).correlation > 0.75


def test_training_is_no_scaling(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    assert baseline.stretch(mark(tile, key) + 0.1 * gaussian(9), CARRIER)[0] < 0.1


def test_rescaling_leaves_its_argument_alone(tile: Tensor, baseline: Baseline) -> None:
    before = tile.clone()
    baseline.rescale(tile, CARRIER)
    assert torch.equal(tile, before)


def test_wiped_rows_and_columns(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    wiped = tile.clone()
    wiped[:7] = 0
    wiped[:, 11] = 0
    assert math.isfinite(baseline.stretch(wiped, CARRIER)[0])
    assert bool(torch.isfinite(baseline.rescale(wiped, CARRIER)).all())
    nothing = torch.zeros_like(tile)
    assert baseline.stretch(nothing, CARRIER)[0] > 1
    assert torch.equal(baseline.rescale(nothing, CARRIER), nothing)


def test_the_mark_is_taken_out(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    marked = mark(tile, key)
    baseline.unmark_(marked, key)
    torch.testing.assert_close(marked, tile, atol=1e-5, rtol=0)


def test_a_second_marking_starts_from_a_marked_tile(tile: Tensor, key: CarrierKey) -> None:
    """The second baseline holds the first mark: it takes the second one out, and leaves the first as it was."""
    once = mark(tile, key)
    second = derive(2)
    baseline = Baseline.measure(once, second)
    twice = mark(once, second)
    baseline.unmark_(twice, second)
    assert read(twice, key).bit_error_rate == 0.0
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=0)


def test_rescaling_an_innocent_tile_is_dither_blind(tile: Tensor) -> None:
    """Also where the norms come from a tile that another key had marked: over many keys p stays within its bound."""
    marked_before = mark(tile, derive(0))
    innocent = scaled(gaussian(11))
    trials, hits = 800, {0.1: 0, 0.01: 0}
    for number in range(1, trials + 1):
        key = derive(number)
        baseline = Baseline.measure(marked_before, key)
        log10_p = read(baseline.rescale(innocent, CARRIER), key).log10_p
        for alpha in hits:
            hits[alpha] += log10_p <= math.log10(alpha)
    assert hits[0.1] > 0
    for alpha, count in hits.items():
        assert log10_binomial_tail(count, trials, alpha) > -6


def test_sizes_must_be_the_carriers(baseline: Baseline) -> None:
    assert not baseline.fits(replace(CARRIER, sides=(5, 5)))
    assert not baseline.fits(replace(CARRIER, rows=ROWS - 1))
    assert not baseline.fits(replace(CARRIER, shape=(ROWS, COLUMNS + 1)))


def test_json_round_trip(baseline: Baseline) -> None:
    assert Baseline.from_json(json.loads(json.dumps(baseline.to_json()))) == baseline


def test_nothing_of_it_is_printed(baseline: Baseline) -> None:
    assert len(repr(baseline)) < 100


def damaged(name: str, *values: float) -> str:
    dtype = torch.float32 if name == "projections" else torch.float16
    return encode_base64(torch.tensor(values, dtype=dtype).numpy().tobytes())


def test_a_merge_with_the_baseline_is_undone(tile: Tensor, key: CarrierKey, baseline: Baseline) -> None:
    trained = tile + 2 * tile.std() * torch.randn(tile.shape, generator=torch.Generator().manual_seed(7))
    merged = read_projections(0.3 * trained + 0.7 * tile, key)
    torch.testing.assert_close(
        baseline.unmerge(merged, key, 0.3), read_projections(trained, key), rtol=0, atol=1e-5 * key.carrier.rms * 100
    )


@pytest.mark.parametrize("name", ["projections", "row_norms", "column_norms"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(baseline: Baseline, name: str, bad: float) -> None:
    with pytest.raises(FormatError, match="baseline"):
        Baseline.from_json(baseline.to_json() | {name: damaged(name, 1.0, bad)})


@pytest.mark.parametrize("name", ["row_norms", "column_norms"])
def test_negative_norms_are_refused(baseline: Baseline, name: str) -> None:
    with pytest.raises(FormatError, match="baseline"):
        Baseline.from_json(baseline.to_json() | {name: damaged(name, -0.5)})


@pytest.mark.parametrize("name", ["projections", "row_norms", "column_norms"])
@pytest.mark.parametrize("bad", ["A", "AA", "AAAA", "QQ==", "QR==", "?", None, 5, [], "é"])
def test_malformed_fields_are_refused(baseline: Baseline, name: str, bad: Any) -> None:
    with pytest.raises(FormatError):
        Baseline.from_json(baseline.to_json() | {name: bad})


def test_missing_and_unknown_fields_are_refused(baseline: Baseline) -> None:
    value = baseline.to_json()
    for name in value:
        with pytest.raises(FormatError):
            Baseline.from_json({key: item for key, item in value.items() if key != name})
    with pytest.raises(FormatError):
        Baseline.from_json(value | {"extra": ""})
    with pytest.raises(FormatError):
        Baseline.from_json([])  # type: ignore[arg-type]


@pytest.mark.parametrize(("factor", "expected"), [(1, True), (3, True), (5, False), (0.2, False), (1e30, False)])
def test_a_tile_far_from_its_norm_is_out_of_proportion(
    tile: Tensor, baseline: Baseline, factor: float, expected: bool
) -> None:
    stretch, in_proportion = baseline.stretch(factor * tile, CARRIER)
    assert in_proportion is expected
    assert stretch == pytest.approx(abs(math.log(factor)), abs=1e-2)
