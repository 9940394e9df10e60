"""GPTQ and Wanda do with activations what their papers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_wmguard.robustness.calibrated import Inputs, collect_inputs, prune_wanda, quantize_gptq
from hf_wmguard.robustness.quantization import quantize_groups

NAME = "layers.0.w"


@pytest.fixture
def activations() -> Tensor:
    # Correlated, as real ones are: otherwise no column can make up for another.
    draw = torch.Generator().manual_seed(1)
    return torch.randn(512, 24, generator=draw) @ torch.randn(24, 96, generator=draw) + 0.1 * torch.randn(
        512, 96, generator=draw
    )


def _seen(values: Tensor) -> Inputs:
    inputs = Inputs(gram=torch.zeros(values.shape[1], values.shape[1]), largest=torch.zeros(values.shape[1]))
    inputs.add(values)
    return inputs


def _loss(weight: Tensor, after: Tensor, activations: Tensor) -> float:
    return float((activations @ (after - weight).T).square().sum())


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_rounding_on_the_calibration_loss(activations: Tensor, bits: int) -> None:
    weight = torch.randn(40, 96)
    inputs = {NAME: _seen(activations)}
    after = quantize_gptq({NAME: weight}, inputs, bits=bits, group=32)[NAME]
    # With the identity as Hessian no column makes up for another: the same grids, rounded to the nearest.
    nearest = quantize_gptq({NAME: weight}, {NAME: _seen(torch.eye(96))}, bits=bits, group=32)[NAME]
    symmetric = quantize_groups({NAME: weight}, bits, group=32)[NAME]
    assert _loss(weight, after, activations) < 0.5 * _loss(weight, nearest, activations)
    assert _loss(weight, after, activations) < 0.5 * _loss(weight, symmetric, activations)
    # And it is on a grid: no row of a group has more levels than the bits give.
    for row in after:
        for group in row.split(32):
            assert len(torch.unique((group * 1e4).round())) <= 2**bits


def test_gptq_without_correlations_is_rounding_to_the_nearest() -> None:
    weight = torch.randn(8, 32)
    after = quantize_gptq({NAME: weight}, {NAME: _seen(torch.eye(32))}, bits=4, group=32)[NAME]
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    assert float(((after - weight) / ((high - low) / 15)).abs().max()) <= 1 + 1e-4
    inner = (weight > low) & (weight < high)
    assert float(((after - weight) / ((high - low) / 15)).abs()[inner].median()) < 0.5


@pytest.mark.parametrize("dead", [slice(5, 6), slice(None)])
def test_gptq_takes_inputs_that_are_always_zero(activations: Tensor, dead: slice) -> None:
    activations[:, dead] = 0
    after = quantize_gptq({NAME: torch.randn(8, 96)}, {NAME: _seen(activations)})[NAME]
    assert bool(torch.isfinite(after).all())


def test_wanda_keeps_what_its_inputs_make_large(activations: Tensor) -> None:
    weight = torch.randn(10, 96)
    after = prune_wanda({NAME: weight}, {NAME: _seen(activations)}, 0.5)[NAME]
    for row, left in zip(weight, after, strict=True):
        importance = row.abs() * activations.norm(dim=0)
        assert set(torch.nonzero(left == 0).flatten().tolist()) == set(importance.argsort()[:48].tolist())
        assert torch.equal(left[left != 0], row[left != 0])


def test_inputs_are_those_of_the_block_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 4)])
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[1](self.layers[0](x)))

    model = Model().train()
    batches = [{"x": torch.randn(2, 5, 6)}, {"x": torch.randn(3, 5, 6)}]
    seen = collect_inputs(model, batches)
    assert set(seen) == {"layers.0.weight", "layers.1.weight"}
    whole = torch.cat([batch["x"].reshape(-1, 6) for batch in batches])
    torch.testing.assert_close(seen["layers.0.weight"].gram, whole.T @ whole)
    torch.testing.assert_close(seen["layers.0.weight"].largest, whole.abs().amax(dim=0))
    assert seen["layers.1.weight"].tokens == 25
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())
