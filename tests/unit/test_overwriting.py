"""Strangers' signatures over weights."""

from __future__ import annotations

import pytest
import torch

from hf_wmguard.errors import CapacityError
from hf_wmguard.robustness.attacks import relative_change
from hf_wmguard.robustness.overwriting import overwrite

NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]


def _weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    matrices = {name: torch.randn(256, 256, generator=draw) for name in NAMES}
    return {**matrices, "model.norm.weight": torch.ones(256), "ids": torch.arange(4)}


def test_every_stranger_changes_the_blocks_by_about_the_budget() -> None:
    weights = _weights()
    one, five = overwrite(weights, 1, budget=0.06), overwrite(weights, 5, budget=0.06)
    assert relative_change(one, weights) == pytest.approx(0.06, rel=0.15)
    # Independent changes add up in squares.
    assert relative_change(five, weights) == pytest.approx(0.06 * 5**0.5, rel=0.15)
    assert all(one[name] is weights[name] for name in ("model.norm.weight", "ids"))
    assert torch.equal(weights[NAMES[0]], _weights()[NAMES[0]])


def test_the_dtype_stays_and_a_small_model_is_refused() -> None:
    weights = {name: tensor.bfloat16() for name, tensor in _weights().items() if tensor.is_floating_point()}
    assert {one.dtype for one in overwrite(weights, 1, budget=0.06).values()} == {torch.bfloat16}
    with pytest.raises(CapacityError):
        overwrite(weights, 1, budget=0.001)
