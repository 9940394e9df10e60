"""The weight signature on Gaussian weights: embed, read, attack, and what a wrong key sees."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_wmguard.errors import FormatError, NonFiniteWeightError
from hf_wmguard.robustness.attacks import cast, prune_magnitude, quantize_int8
from hf_wmguard.watermark.carriers import Carrier, select_carriers
from hf_wmguard.watermark.payload import MIN_CODE_BITS
from hf_wmguard.watermark.planner import ERROR_LEVELS, Mix
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import (
    log10_binomial_tail,
    log10_bonferroni,
    log10_p_correlation,
    log10_p_weighted,
)
from hf_wmguard.watermark.signature import (
    CarrierKey,
    Reading,
    _orthonormal,
    change_norm,
    move_,
    read_projections,
    read_signature,
    residual,
    soft_bits,
)

Weights = dict[str, Tensor]
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
SHAPES = {f"layers.{i}.w{j}": shape for i in range(3) for j, shape in enumerate([(192, 192), (384, 192), (192, 384)])}


def gaussian(seed: int = 0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {name: 0.02 * (1 + i % 3) * torch.randn(s, generator=draw) for i, (name, s) in enumerate(SHAPES.items())}


def plan(weights: Weights, *, budget: float = 0.03, step: float | None = 2.0) -> tuple[tuple[Carrier, ...], Mix]:
    return select_carriers(
        SHAPES,
        lambda tile: float(weights[tile.name].norm()) / math.sqrt(weights[tile.name].numel()),
        budget=budget,
        step=step,
        min_projections=MIN_CODE_BITS,
        stream=Stream(KEY, "tiles"),
    )


def derive(key: bytes, carriers: tuple[Carrier, ...], mix: Mix, bits_of: bytes | None = None) -> tuple[CarrierKey, ...]:
    levels = torch.tensor([step for step, count in mix.parts for _ in range(count)], dtype=torch.float64)
    levels, position, keys = levels[Stream(KEY, "order").permutation(len(levels))], 0, []
    for carrier in carriers:
        steps = levels[position : (position := position + carrier.projections)]
        bits = Stream(bits_of or key, "bits", carrier.name).bits(carrier.projections)
        keys.append(CarrierKey.derive(key, carrier, bits, steps))
    return tuple(keys)


def embed(weights: Weights, keys: tuple[CarrierKey, ...], strength: float = 1.0) -> Weights:
    marked = copy.deepcopy(weights)
    for key in keys:
        tile = marked[key.carrier.name]
        move_(tile, key, strength * residual(read_projections(tile, key), key))
    return marked


def reader(weights: Weights) -> Callable[[Carrier], Tensor | None]:
    return lambda carrier: weights.get(carrier.name)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return gaussian()


@pytest.fixture(scope="module")
def keys(weights: Weights) -> tuple[CarrierKey, ...]:
    return derive(KEY, *plan(weights))


@pytest.fixture(scope="module")
def mixed(weights: Weights) -> tuple[CarrierKey, ...]:
    """The same with several steps."""
    return derive(KEY, *plan(weights, step=None))


@pytest.fixture(scope="module")
def marked(weights: Weights, keys: tuple[CarrierKey, ...]) -> Weights:
    return embed(weights, keys)


@pytest.fixture(scope="module")
def one() -> CarrierKey:
    """A single small carrier."""
    carrier = Carrier(name="h.0.w", shape=(48, 40), row_start=0, rows=48, sides=(5, 4), rms=0.15)
    steps = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(10)
    return CarrierKey.derive(KEY, carrier, Stream(KEY, "bits").bits(20), steps)


@pytest.fixture
def tile() -> Tensor:
    return 0.15 * torch.randn(48, 40, generator=torch.Generator().manual_seed(3))


def test_a_key_is_what_the_design_says(one: CarrierKey) -> None:
    assert one.left.shape == (48, 5)
    assert one.right.shape == (40, 4)
    for columns in (one.left, one.right):
        torch.testing.assert_close(columns.norm(dim=0), torch.ones(columns.shape[1]))
        assert len(columns.abs().unique()) == 1
    assert one.step.flatten().tolist() == [0.15, 0.3] * 10
    assert one.dither.dtype == one.step.dtype == torch.float64
    assert one.dither.shape == one.step.shape == one.bits.shape == (5, 4)
    assert bool(((one.dither >= 0) & (one.dither < one.step)).all())
    assert set(one.bits.unique().tolist()) == {0.0, 1.0}
    for columns, inverse in ((one.left, one.left_gram_inverse), (one.right, one.right_gram_inverse)):
        wide = columns.double()
        torch.testing.assert_close(wide.T @ wide @ inverse, torch.eye(len(inverse), dtype=torch.float64))
    for device in ("cpu", torch.device("cpu")):
        moved = one.to(torch.device(device))
        assert torch.equal(moved.left, one.left)
        assert torch.equal(moved.dither, one.dither)
        assert torch.equal(moved.step, one.step)


def test_nothing_secret_is_shown(one: CarrierKey) -> None:
    assert "tensor" not in repr(one)


def test_projections_are_those_of_the_formula(one: CarrierKey, tile: Tensor) -> None:
    expected = torch.tensor(
        [
            [float(one.left[:, u].double() @ tile.double() @ one.right[:, v].double()) for v in range(4)]
            for u in range(5)
        ],
        dtype=torch.float64,
    )
    got = read_projections(tile, one)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_float_dtype_can_be_read(one: CarrierKey, tile: Tensor, dtype: torch.dtype) -> None:
    low = tile.to(dtype)
    torch.testing.assert_close(read_projections(low, one), read_projections(low.float(), one))


def test_a_full_step_reads_without_error(weights: Weights, marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    reading = read_signature(keys, reader(marked))
    assert reading.projections == sum(key.carrier.projections for key in keys) == len(reading.bits)
    assert reading.bit_error_rate == 0.0
    assert reading.loss < 1e-6
    assert reading.correlation > 1 - 1e-6
    assert reading.log10_p < -3 * MIN_CODE_BITS
    assert (reading.carriers_read, reading.carriers_missing) == (len(keys), 0)
    change = math.sqrt(sum(float((marked[name] - weights[name]).norm()) ** 2 for name in weights))
    assert change / math.sqrt(sum(float(tile.norm()) ** 2 for tile in weights.values())) < 0.03


def test_unmarked_weights_read_as_chance(weights: Weights, keys: tuple[CarrierKey, ...]) -> None:
    reading = read_signature(keys, reader(weights))
    assert 0.4 < reading.bit_error_rate < 0.6
    assert abs(reading.correlation) < 0.1
    assert reading.log10_p > -3


def test_a_second_full_step_changes_nothing(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    again = embed(marked, keys)
    for key in keys:
        name = key.carrier.name
        assert float((again[name] - marked[name]).norm()) < 1e-5 * float(marked[name].norm())


def test_the_residual_is_the_shortest_way(one: CarrierKey, tile: Tensor) -> None:
    projections = read_projections(tile, one)
    way = residual(projections, one)
    assert bool((way.abs() <= one.step / 2 + 1e-12).all())
    places = (projections + way - one.dither - one.bits * one.step / 2) / one.step
    torch.testing.assert_close(places, places.round(), atol=1e-9, rtol=0)


def test_a_step_moves_the_projections_and_by_the_smallest_change(one: CarrierKey, tile: Tensor) -> None:
    """Against the least-norm solution of the 20 linear equations in 1,920 weights, solved without structure."""
    shift = residual(read_projections(tile, one), one)
    changed = tile.clone()
    move_(changed, one, shift)
    torch.testing.assert_close(read_projections(changed, one), read_projections(tile, one) + shift, atol=1e-6, rtol=0)
    equations = torch.einsum("ou,iv->uvoi", one.left.double(), one.right.double()).reshape(20, -1)
    least = (torch.linalg.pinv(equations) @ shift.flatten()).reshape(48, 40)
    torch.testing.assert_close((changed - tile).double(), least, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_the_norm_of_a_change_is_known_without_making_it(one: CarrierKey, tile: Tensor, strength: float) -> None:
    shift = strength * residual(read_projections(tile, one), one)
    changed = tile.clone()
    move_(changed, one, shift)
    assert change_norm(one, shift) == pytest.approx(float((changed - tile).norm()), rel=1e-4, abs=1e-12)


def test_half_steps_halve_the_way(one: CarrierKey, tile: Tensor) -> None:
    way = residual(read_projections(tile, one), one)
    for _ in range(4):
        move_(tile, one, 0.5 * residual(read_projections(tile, one), one))
        way = 0.5 * way
        torch.testing.assert_close(residual(read_projections(tile, one), one), way, atol=1e-6, rtol=0)


def test_the_loss_falls_with_the_strength(weights: Weights, keys: tuple[CarrierKey, ...]) -> None:
    losses = [read_signature(keys, reader(embed(weights, keys, strength))).loss for strength in (0, 0.25, 0.5, 0.75, 1)]
    assert losses == sorted(losses, reverse=True)
    # With a uniform rest of width (1 - s) D, the correlation is sinc(1 - s).
    assert losses[2] == pytest.approx((1 - 2 / math.pi) / 2, abs=0.02)


def test_other_keys_read_nothing(weights: Weights, marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    carriers, mix = plan(weights)
    assert carriers == tuple(key.carrier for key in keys)
    assert read_signature(derive(OTHER, carriers, mix), reader(marked)).log10_p > -3
    # The right directions and dithers with the wrong code bits are no better.
    assert read_signature(derive(KEY, carriers, mix, bits_of=OTHER), reader(marked)).log10_p > -3


def test_two_marks_stand_side_by_side(weights: Weights, marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    second = derive(OTHER, *plan(weights))
    both = embed(marked, second)
    assert read_signature(second, reader(both)).bit_error_rate == 0.0
    assert read_signature(keys, reader(both)).log10_p < -500


def test_directions_depend_on_name_place_and_sides(one: CarrierKey) -> None:
    carrier = replace(one.carrier, rows=40)
    others = [replace(carrier, name="h.1.w"), replace(carrier, row_start=8), replace(carrier, sides=(4, 5))]
    bits, steps = torch.zeros(20), torch.ones(20, dtype=torch.float64)
    first = CarrierKey.derive(KEY, carrier, bits, steps)
    for other in others:
        key = CarrierKey.derive(KEY, other, bits, steps)
        assert not torch.equal(key.left[:, 0], first.left[:, 0])
        assert float(key.dither[0, 0]) != float(first.dither[0, 0])
    # The step is a scale of the dither, and nothing else.
    wide = CarrierKey.derive(KEY, carrier, bits, 2 * steps)
    assert torch.equal(wide.left, first.left)
    assert torch.equal(wide.dither, 2 * first.dither)


def adapter_key(key: bytes, basis: Tensor, right: int = 3) -> CarrierKey:
    """Return the key of a carrier in the row space of ``basis``, orthonormal columns [40, rank]."""
    unit = (basis / basis.abs().max() * 127).round().to(torch.int8)
    carrier = Carrier(
        name="h.0.w", shape=(48, 40), row_start=0, rows=48, sides=(5, right), rms=0.15, basis=unit.numpy().tobytes()
    )
    bits = Stream(key, "bits").bits(carrier.projections)
    return CarrierKey.derive(key, carrier, bits, torch.ones(carrier.projections, dtype=torch.float64))


def test_directions_of_an_adapter_lie_in_its_row_space_and_are_keyed() -> None:
    draw = torch.Generator().manual_seed(6)
    basis = torch.linalg.qr(torch.randn(40, 6, generator=draw, dtype=torch.float64)).Q
    one, other = adapter_key(KEY, basis), adapter_key(OTHER, basis)
    for key in (one, other):
        assert key.right.shape == (40, 3)
        torch.testing.assert_close(key.right.T @ key.right, torch.eye(3), atol=1e-6, rtol=0)
        # Up to the rounding of the basis to 8 bits.
        inside = basis.float() @ (basis.float().T @ key.right)
        assert float((key.right - inside).norm(dim=0).max()) < 0.02
    assert float((one.right.T @ other.right).abs().max()) < 0.99
    # Gram-Schmidt gives the one basis that no library's choice of signs changes.
    columns = torch.frombuffer(bytearray(one.carrier.basis), dtype=torch.int8).reshape(40, 6).double()
    assert bool(((_orthonormal(columns).T @ columns).diagonal() > 0).all())
    torch.testing.assert_close(_orthonormal(columns), _orthonormal(columns * torch.arange(1.0, 7.0)))
    tile = 0.15 * torch.randn(48, 40, generator=draw)
    move_(tile, one, residual(read_projections(tile, one), one))
    assert read_signature([one], lambda carrier: tile).bit_error_rate == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(one: CarrierKey, tile: Tensor, bad: float) -> None:
    tile[7, 3] = bad
    with pytest.raises(NonFiniteWeightError, match=r"h\.0\.w") as caught:
        read_projections(tile, one)
    assert caught.value.hint
    reading = read_signature([one], lambda carrier: tile)
    assert (reading.carriers_read, reading.carriers_missing, reading.projections) == (0, 1, 0)


@pytest.mark.parametrize("shape", [(40, 48), (48, 41), (47, 40), (48,), (1, 48, 40), (0, 40)])
def test_a_tile_of_another_shape(one: CarrierKey, shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"expected \(48, 40\)"):
        read_projections(torch.ones(shape), one)
    assert read_signature([one], lambda carrier: torch.ones(shape)).carriers_missing == 1


def test_reading_and_moving_leave_no_gradient(one: CarrierKey, tile: Tensor) -> None:
    parameter = torch.nn.Parameter(tile)
    projections = read_projections(parameter, one)
    assert not projections.requires_grad
    assert not soft_bits(projections, one).requires_grad
    move_(parameter.data, one, residual(projections, one))
    assert parameter.grad is None
    assert parameter.grad_fn is None


def test_reading_changes_nothing(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    before = copy.deepcopy(marked)
    read_signature(keys, reader(marked))
    assert all(torch.equal(before[name], marked[name]) for name in marked)


@pytest.mark.parametrize(
    ("attack", "log10_p", "errors"),
    [
        (lambda w: cast(w, torch.bfloat16), -2500, 0.0),
        (lambda w: cast(w, torch.float16), -3500, 0.0),
        (lambda w: cast(w, torch.float8_e4m3fn), -1200, 0.005),
        (quantize_int8, -1800, 0.0),
        (lambda w: prune_magnitude(w, 0.3), -550, 0.005),
        (lambda w: prune_magnitude(w, 0.5), -200, 0.12),
        (lambda w: prune_magnitude(quantize_int8(cast(w, torch.float16)), 0.3), -550, 0.005),
    ],
)
def test_the_mark_survives(
    marked: Weights,
    weights: Weights,
    keys: tuple[CarrierKey, ...],
    attack: Callable[[Weights], Weights],
    log10_p: float,
    errors: float,
) -> None:
    reading = read_signature(keys, reader(attack(marked)))
    assert reading.log10_p < log10_p
    assert reading.bit_error_rate <= errors
    # And what survives is the mark, not an artefact of the attack.
    assert read_signature(keys, reader(attack(weights))).log10_p > -3


def test_noise_lowers_the_correlation_as_predicted(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    """exp(-2 pi^2 sigma^2 / D^2), with D = 2 rms and sigma in units of the rms."""
    draw = torch.Generator().manual_seed(5)
    for sigma in (0.2, 0.5):
        noisy = {
            key.carrier.name: marked[key.carrier.name]
            + sigma * key.carrier.rms * torch.randn(key.carrier.shape, generator=draw)
            for key in keys
        }
        expected = math.exp(-2 * math.pi**2 * sigma**2 / 4)
        assert read_signature(keys, reader(noisy)).correlation == pytest.approx(expected, abs=0.03)


def test_the_order_of_the_carriers_is_irrelevant(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    order = [keys[index] for index in Stream(KEY, "order").permutation(len(keys))]
    noisy = quantize_int8(marked)
    one, other = read_signature(keys, reader(noisy)), read_signature(order, reader(noisy))
    assert other.statistic == pytest.approx(one.statistic)
    assert other.bit_error_rate == one.bit_error_rate
    assert other.log10_p == pytest.approx(one.log10_p)


def test_missing_carriers_cost_their_share(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    half = {key.carrier.name: marked[key.carrier.name] for key in keys[::2]}
    whole, reading = read_signature(keys, reader(marked)), read_signature(keys, reader(half))
    assert (reading.carriers_read, reading.carriers_missing) == (5, 4)
    assert reading.projections == sum(key.carrier.projections for key in keys[::2])
    assert len(reading.soft) == len(reading.bits) == whole.projections
    assert reading.bit_error_rate == 0.0
    assert reading.correlation == pytest.approx(1.0)
    assert reading.log10_p == pytest.approx(whole.log10_p * reading.projections / whole.projections, rel=1e-3)
    assert int((reading.soft == 0).sum()) == whole.projections - reading.projections


def test_nothing_read_is_no_evidence(keys: tuple[CarrierKey, ...]) -> None:
    reading = read_signature(keys, lambda carrier: None)
    assert reading.projections == 0
    assert reading.bit_error_rate == 0.5
    assert reading.correlation == 0.0
    assert reading.log10_p == 0.0
    assert reading.carriers_missing == len(keys)


def test_a_reading_by_hand() -> None:
    reading = Reading(
        soft=torch.tensor([1.0, -1.0, -0.5, 0.0, 0.5], dtype=torch.float64),
        bits=torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64),
        steps=torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64),
        carriers_read=1,
        carriers_missing=1,
    )
    assert reading.projections == 4
    assert reading.statistic == pytest.approx(1.0)
    assert reading.correlation == pytest.approx(0.25)
    assert reading.loss == pytest.approx(0.375)
    assert reading.bit_error_rate == pytest.approx(0.5)
    # One projection was read at step 1, with cosine 1, and three at step 2, with cosines 1, -1/2 and -1/2.
    expected = []
    for error in ERROR_LEVELS:
        weight = math.exp(-2 * math.pi**2 * error**2 * (1 - 1 / 4))
        expected.append(log10_p_weighted(weight * 1.0 + 0.0, (weight, 1.0), (1, 3)))
    score = reading.score()
    assert score.tests == len(ERROR_LEVELS)
    assert score.log10_p == pytest.approx(min(expected))
    assert reading.log10_p == log10_bonferroni(score.log10_p, score.tests)


def test_one_step_is_one_test(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    """Every weighting is the same there, and a correction for four would be given away."""
    score = read_signature(keys, reader(marked)).score()
    assert score.tests == 1
    assert score.weights.tolist() == [1.0] * len(score.weights)


def test_equal_steps_stay_equal_in_tiles_of_any_rms(mixed: tuple[CarrierKey, ...], weights: Weights) -> None:
    reading = read_signature(mixed, reader(weights))
    steps = {step for step, _ in plan(weights, step=None)[1].parts}
    assert set(reading.steps.tolist()) == steps
    assert len(steps) > 1


def test_the_weighting_follows_the_attack(mixed: tuple[CarrierKey, ...], weights: Weights) -> None:
    """Noise leaves the large steps only: weighted, they prove what is lost in the plain sum."""
    marked, draw = embed(weights, mixed), torch.Generator().manual_seed(8)
    clean = read_signature(mixed, reader(marked)).score()
    assert (clean.tests, clean.weights.tolist()) == (len(ERROR_LEVELS), [1.0] * len(clean.weights))
    rms = {key.carrier.name: key.carrier.rms for key in mixed}
    noisy = {name: tile + 1.0 * rms[name] * torch.randn(tile.shape, generator=draw) for name, tile in marked.items()}
    reading = read_signature(mixed, reader(noisy))
    steps = torch.unique(reading.steps)
    by_step = [float(reading.score().weights[reading.steps == step].mean()) for step in steps]
    assert by_step == sorted(by_step)
    assert by_step[0] < 0.1 < by_step[-1] == 1.0
    assert reading.log10_p < log10_p_correlation(reading.statistic, reading.projections) - 3


def test_weightings_see_only_what_was_read(mixed: tuple[CarrierKey, ...], weights: Weights) -> None:
    marked = embed(weights, mixed)
    half = {key.carrier.name: marked[key.carrier.name] for key in mixed[::2]}
    reading = read_signature(mixed, reader(half))
    alone = read_signature(mixed[::2], reader(half))
    assert reading.score().tests == alone.score().tests
    assert reading.log10_p == pytest.approx(alone.log10_p)
    nothing = read_signature(mixed, lambda carrier: None).score()
    assert (nothing.log10_p, nothing.tests) == (0.0, len(ERROR_LEVELS))


def test_wiped_matrices_are_no_evidence_either(keys: tuple[CarrierKey, ...], weights: Weights) -> None:
    """Zeros, and one value everywhere, are the suspects for which a careless statistic fires."""
    for fill in (0.0, 1.0, 1e6):
        reading = read_signature(keys, reader({name: torch.full_like(w, fill) for name, w in weights.items()}))
        assert reading.log10_p > -3


def test_false_positives_of_wrong_keys_stay_within_the_exact_bound() -> None:
    """600 keys, derived as real ones are, on weights marked with yet another key."""
    trials = 600
    carrier = Carrier(name="h.0.w", shape=(48, 48), row_start=0, rows=48, sides=(6, 6), rms=0.15)
    bits, steps = Stream(KEY, "bits").bits(36), torch.tensor([0.75, 1.5, 5.0], dtype=torch.float64).repeat(12)
    tile = 0.15 * torch.randn(48, 48, generator=torch.Generator().manual_seed(4))
    right = CarrierKey.derive(KEY, carrier, bits, steps)
    move_(tile, right, residual(read_projections(tile, right), right))
    assert read_signature([right], lambda carrier: tile).log10_p < -25
    readings = [
        read_signature([CarrierKey.derive(number.to_bytes(32, "big"), carrier, bits, steps)], lambda carrier: tile)
        for number in range(trials)
    ]
    found = [reading.log10_p for reading in readings]
    for log10_alpha in (-1.0, -2.0, -3.0):
        count = sum(log10_p <= log10_alpha for log10_p in found)
        assert log10_binomial_tail(count, trials, 10**log10_alpha) > -6
        assert count > 0 or log10_alpha < -1.0  # a bound that nothing comes near would detect no mark either
    rate = sum(reading.bit_error_rate for reading in readings) / trials
    assert rate == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(36 * trials))


@pytest.mark.gpu
def test_weights_on_a_gpu_are_read_with_keys_on_the_cpu(marked: Weights, keys: tuple[CarrierKey, ...]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reading = read_signature(keys, reader({name: tile.cuda() for name, tile in marked.items()}))
    assert reading.bit_error_rate == 0.0
