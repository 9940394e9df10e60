"""The attacks do what their names say, to copies, and to matrices only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_wmguard.robustness.attacks import (
    add_noise,
    cast,
    prune_magnitude,
    quantize_int8,
    relative_change,
)

Weights = dict[str, Tensor]
ATTACKS: dict[str, Callable[[Weights], Weights]] = {
    "bf16": lambda tensors: cast(tensors, torch.bfloat16),
    "same dtype": lambda tensors: cast(tensors, torch.float32),
    "int8": quantize_int8,
    "prune": lambda tensors: prune_magnitude(tensors, 0.5),
    "noise": lambda tensors: add_noise(tensors, 0.1),
    "prune nothing": lambda tensors: prune_magnitude(tensors, 0.0),
}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def weights() -> Weights:
    draw = torch.Generator().manual_seed(0)
    return {
        "layers.0.matrix": torch.randn(40, 60, generator=draw),
        "embed.weight": torch.randn(40, 60, generator=draw),
        "vector": torch.randn(60, generator=draw),
        "cube": torch.randn(2, 3, 4, generator=draw),
        "ids": torch.arange(12).reshape(3, 4),
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_the_input_is_left_alone(weights: Weights, name: str) -> None:
    before = {key: tensor.clone() for key, tensor in weights.items()}
    attacked = ATTACKS[name](weights)
    assert list(attacked) == list(weights)
    attacked["layers.0.matrix"].zero_()
    assert all(torch.equal(weights[key], before[key]) for key in weights)


@pytest.mark.parametrize("name", ["int8", "prune", "noise"])
def test_only_matrices_are_changed(weights: Weights, name: str) -> None:
    attacked = ATTACKS[name](weights)
    assert not torch.equal(attacked["layers.0.matrix"], weights["layers.0.matrix"])
    assert all(torch.equal(attacked[key], weights[key]) for key in ("embed.weight", "vector", "cube", "ids"))


def test_a_cast_changes_every_float_and_no_integer(weights: Weights) -> None:
    attacked = cast(weights, torch.bfloat16)
    assert {key: tensor.dtype for key, tensor in attacked.items()} == {
        "layers.0.matrix": torch.bfloat16,
        "embed.weight": torch.bfloat16,
        "vector": torch.bfloat16,
        "cube": torch.bfloat16,
        "ids": torch.int64,
    }
    torch.testing.assert_close(attacked["layers.0.matrix"].float(), weights["layers.0.matrix"], rtol=2**-8, atol=0)


def test_int8_has_255_levels_per_row_and_rounds_to_the_nearest(weights: Weights) -> None:
    before, after = weights["layers.0.matrix"], quantize_int8(weights)["layers.0.matrix"]
    scale = before.abs().amax(dim=1, keepdim=True) / 127
    levels = after / scale
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert float(levels.abs().max()) <= 127 + 1e-4
    assert float(((after - before) / scale).abs().max()) <= 0.5 + 1e-4
    # 1% is what DESIGN compares the budget of the mark with.
    assert 0.004 < float((after - before).norm() / before.norm()) < 0.02
    torch.testing.assert_close(quantize_int8({"layers.0.w": after})["layers.0.w"], after)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_of_zero_rows_is_zero(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 5, dtype=dtype)
    weight[1] = torch.tensor([1.0, -2.0, 0.5, 0.0, 2.0])
    after = quantize_int8({"layers.0.w": weight})["layers.0.w"]
    assert after.dtype == dtype
    assert torch.equal(after[[0, 2]], weight[[0, 2]])
    torch.testing.assert_close(after[1], weight[1], atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_pruning_takes_the_smallest(dtype: torch.dtype, share: float) -> None:
    # Distinct magnitudes in every dtype, so that the share is exact.
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    weight = ((order + 1) * (1 - 2 * (order % 2))).reshape(10, 20).to(dtype)
    after = prune_magnitude({"layers.0.w": weight}, share)["layers.0.w"]
    kept = after != 0
    assert int((~kept).sum()) == round(share * 200)
    assert torch.equal(after[kept], weight[kept])
    assert torch.equal(kept, weight.abs() > share * 200)


def test_pruning_twice_takes_no_more(weights: Weights) -> None:
    once = prune_magnitude(weights, 0.5)
    assert torch.equal(prune_magnitude(once, 0.5)["layers.0.matrix"], once["layers.0.matrix"])
    assert torch.equal(prune_magnitude(weights, 0.0)["layers.0.matrix"], weights["layers.0.matrix"])


def test_noise_is_as_strong_as_it_says(weights: Weights) -> None:
    tensors = {"layers.0.w": 3 * torch.randn(200, 300), "layers.1.w": torch.randn(200, 300)}
    noise = {name: add_noise(tensors, 0.3)[name] - tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert float(noise[name].std() / tensor.square().mean().sqrt()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten() for one in noise.values()]))[0, 1])) < 0.02
    assert relative_change(add_noise(tensors, 0.3), tensors) == pytest.approx(0.3, rel=0.02)
    assert torch.equal(add_noise(weights, 0.3)["layers.0.matrix"], add_noise(weights, 0.3)["layers.0.matrix"])
    assert not torch.equal(
        add_noise(weights, 0.3)["layers.0.matrix"], add_noise(weights, 0.3, seed=1)["layers.0.matrix"]
    )


def test_change_counts_what_can_be_compared(weights: Weights) -> None:
    half = {**weights, "layers.0.matrix": weights["layers.0.matrix"] / 2, "vector": torch.zeros(60)}
    assert relative_change(half, weights) == pytest.approx(0.5)
    assert relative_change({"x": torch.ones(2, 2)}, weights) is None
    assert relative_change({"layers.0.matrix": torch.ones(2, 2)}, weights) is None
