"""The mix of steps: what attacks leave of it is what simulated attacks leave, and nothing nearby does better."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch

from hf_wmguard.errors import FormatError
from hf_wmguard.watermark.planner import (
    ERROR_LEVELS,
    MAX_PROJECTIONS,
    Attack,
    Mix,
    choose_mix,
    payload_decodes,
    predict,
    weights_for,
)
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_p_correlation, log10_p_weighted

# 12 * 10.6e6 weights * (0.95 * 1%)^2: what a budget of 1% allows a small encoder.
ENCODER = 11_500.0
MERGED = Attack(owner_weight=0.1, error=0.05)
NOISY = Attack(error=1.0)


def mean_cosine(error: float, owner_weight: float, step: float) -> float:
    """Return the mean cosine of projections that were put on the lattice and then attacked."""
    draw = torch.Generator().manual_seed(1)
    before = 30 * torch.randn(200_000, generator=draw, dtype=torch.float64)
    marked = step * torch.round(before / step)
    attacked = owner_weight * marked + (1 - owner_weight) * before
    attacked += error * torch.randn(200_000, generator=draw, dtype=torch.float64)
    return float(torch.cos(2 * math.pi * attacked / step).mean())


@pytest.mark.parametrize("step", [0.75, 2.0, 5.0])
@pytest.mark.parametrize(("error", "owner_weight"), [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (0.0, 0.5), (0.05, 0.1)])
def test_attenuation_is_what_a_simulated_attack_leaves(step: float, error: float, owner_weight: float) -> None:
    steps = torch.tensor([step], dtype=torch.float64)
    expected = Attack(error=error, owner_weight=owner_weight).attenuation(steps)
    assert expected.dtype == torch.float64
    assert float(expected) == pytest.approx(mean_cosine(error, owner_weight, step), abs=0.01)


def test_a_mix_by_hand() -> None:
    mix = Mix(((1.0, 300), (4.0, 100)))
    assert mix.projections == 400
    assert mix.mean_square == pytest.approx((300 + 1600) / 400)
    assert (Mix(()).projections, Mix(()).mean_square) == (0, 0.0)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 399, 400, 401, 4101, MAX_PROJECTIONS])
def test_another_number_in_the_same_mix(total: int) -> None:
    mix = Mix(((0.75, 1948), (1.5, 1947), (5.0, 219)))
    other = mix.of(total)
    assert other.projections == total
    exact = {step: count * total / mix.projections for step, count in mix.parts}
    assert all(abs(count - exact[step]) < 1 for step, count in other.parts)
    assert all(exact[step] < 1 for step in exact.keys() - dict(other.parts).keys())


def test_the_same_number_is_the_same_mix() -> None:
    for mix in (Mix(((0.75, 1948), (1.5, 1947), (5.0, 219))), Mix(((2.0, 7),)), Mix(())):
        assert mix.of(mix.projections) == mix
    assert Mix(((1.0, 3), (2.0, 1))).of(0) == Mix(())


def test_a_mix_round_trips_through_json() -> None:
    mix = Mix(((0.75, 10), (5.0, 3)))
    assert Mix.from_json(json.loads(json.dumps([list(part) for part in mix.parts]))) == mix


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2],
        [[1.0]],
        [[1.0, 2, 3]],
        [[1, 2]],
        [["1.0", 2]],
        [[1.0, 2.0]],
        [[1.0, True]],
        [[1.0, 0]],
        [[1.0, -1]],
        [[0.0, 1]],
        [[-1.0, 1]],
        [[1e-4, 1]],
        [[1e4, 1]],
        [[math.inf, 1]],
        [[math.nan, 1]],
        [[1.0 + i, 1] for i in range(17)],
        [None],
    ],
)
def test_a_malformed_mix_is_refused(value: list[Any]) -> None:
    with pytest.raises(FormatError):
        Mix.from_json(value)


@pytest.mark.parametrize("cost", [0.0, 1e-9, 0.5, 10.0, 1e3, ENCODER, 1e6, 1e300])
@pytest.mark.parametrize("step", [None, 2.0])
def test_the_cost_and_the_most_projections_are_kept(cost: float, step: float | None) -> None:
    mix = choose_mix(cost, step)
    assert mix.projections <= MAX_PROJECTIONS
    assert mix.projections * mix.mean_square <= cost * (1 + 1e-9)
    if cost >= 1e3:
        assert mix.projections > 100


def test_one_step_takes_all() -> None:
    assert choose_mix(1000.0, 2.0) == Mix(((2.0, 250),))
    assert choose_mix(3.0, 2.0) == Mix(())
    assert choose_mix(1e9, 2.0, room=77) == Mix(((2.0, 77),))


def test_little_room_takes_larger_steps() -> None:
    wide, narrow = choose_mix(ENCODER), choose_mix(ENCODER, room=1200)
    assert narrow.projections <= 1200 < wide.projections
    assert narrow.mean_square > 2 * wide.mean_square


def test_the_mix_serves_both_ends_and_single_steps_do_not() -> None:
    """Under equal cost a small step fails under noise, a large one under merging, and the mix under neither."""
    mix, small, large = choose_mix(ENCODER), choose_mix(ENCODER, 1.0), choose_mix(ENCODER, 5.0)
    assert predict(small, NOISY)[0] > -1
    assert predict(large, MERGED)[0] > -9
    for attack in (NOISY, MERGED):
        assert predict(mix, attack)[0] < -9


def test_no_single_step_meets_the_hardest_requirement_better() -> None:
    def worst(mix: Mix) -> float:
        return max(predict(mix, attack)[0] for attack in (NOISY, MERGED))

    mix = worst(choose_mix(ENCODER))
    assert all(mix < worst(choose_mix(ENCODER, step)) for step in (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0))


def test_more_budget_predicts_no_less() -> None:
    for attack in (NOISY, MERGED, Attack(error=0.465), Attack(owner_weight=0.5)):
        values = [predict(choose_mix(factor * ENCODER), attack)[0] for factor in (0.25, 0.5, 1.0)]
        assert all(more < less for less, more in itertools.pairwise(values))


def test_the_plan_is_the_same_every_time() -> None:
    assert choose_mix(ENCODER) == choose_mix(ENCODER)


def test_weights_favour_what_an_error_leaves() -> None:
    steps = torch.tensor([0.75, 1.5, 5.0], dtype=torch.float64)
    assert weights_for(0.0, steps).tolist() == [1.0, 1.0, 1.0]
    for error in ERROR_LEVELS[1:]:
        weights = weights_for(error, steps)
        assert float(weights.max()) == 1.0 == float(weights[2])
        assert weights.tolist() == sorted(weights.tolist())
    # Where nothing would be left of any step, no weight is NaN.
    assert bool(torch.isfinite(weights_for(1e3, steps)).all())


def test_the_prediction_without_an_attack_is_the_bound_at_its_end() -> None:
    mix = Mix(((1.0, 300), (4.0, 100)))
    log10_p, energy = predict(mix, Attack())
    assert energy == pytest.approx(400)
    best = min(
        log10_p_weighted(300 * a + 100 * b, (a, b), (300, 100))
        for a, b in (weights_for(e, torch.tensor([1.0, 4.0], dtype=torch.float64)).tolist() for e in ERROR_LEVELS)
    )
    assert log10_p == pytest.approx(log10_bonferroni(best, len(ERROR_LEVELS)))
    assert best == pytest.approx(log10_p_correlation(400, 400))


def test_the_energy_of_one_step() -> None:
    _, energy = predict(Mix(((2.0, 1000),)), Attack(error=0.5))
    assert energy == pytest.approx(1000 * math.exp(-4 * math.pi**2 * 0.25 / 4))
    assert not payload_decodes(energy)
    assert payload_decodes(predict(Mix(((2.0, 1000),)), Attack(error=0.1))[1])
