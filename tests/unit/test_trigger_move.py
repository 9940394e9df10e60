"""One move of the weights: how far it goes, along which way, and what ordinary training notices of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import Adafactor

from hf_wmguard.training.trigger_move import LARGEST_MOVE, STEPS_LONG, descend, moments_of, peak_rate

STEEP, FLAT = 0, 1


def move(layer: nn.Linear, decrease: float, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Return how the weights move."""
    before = layer.weight.detach().clone()
    descend([layer.weight], decrease, moments_of(optimizer), torch.Generator().manual_seed(0))
    return layer.weight.detach() - before


def trained(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """Return a layer whose first input the data pulls at a thousand times more than its second, and its optimizer."""
    layer = nn.Linear(2, 3, bias=False)
    optimizer = kind(layer.parameters(), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        x = torch.randn(8, 2) * torch.tensor([30.0, 0.03])
        (layer(x) - torch.randn(8, 3)).pow(2).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return layer, optimizer


def test_a_linear_loss_falls_by_what_was_asked_for() -> None:
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(3, 4)
    (layer.weight * x).sum().backward()
    moved = move(layer, 1e-3)
    assert -(moved * x).sum().item() == pytest.approx(1e-3, rel=1e-2)
    # Without a metric the shortest way: down the gradient.
    assert torch.allclose(moved, -1e-3 * x / x.pow(2).sum(), rtol=1e-2)


def test_a_move_is_bounded() -> None:
    layer = nn.Linear(4, 3, bias=False)
    norm = layer.weight.detach().norm()
    (1e-3 * layer.weight).sum().backward()
    assert move(layer, 100.0).norm().item() == pytest.approx(LARGEST_MOVE * norm.item(), rel=1e-3)


def test_a_move_is_no_longer_than_the_optimizers_steps() -> None:
    layer, optimizer = trained()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    assert peak_rate(optimizer) == 1e-3 > optimizer.param_groups[0]["lr"]
    assert peak_rate(None) == math.inf
    (1e-3 * layer.weight).sum().backward()
    before = layer.weight.detach().clone()
    descend([layer.weight], 100.0, {}, torch.Generator(), rate=1e-4)
    assert (layer.weight.detach() - before).pow(2).mean().sqrt().item() == pytest.approx(STEPS_LONG * 1e-4, rel=1e-2)


def test_what_the_data_pulls_at_hardly_moves() -> None:
    layer, optimizer = trained()
    # Only the metric: nothing to take out.
    optimizer.state[layer.weight]["exp_avg"].zero_()
    layer.weight.sum().backward()
    moved = move(layer, 1e-3, optimizer).abs()
    assert moved[:, FLAT].median() > 20 * moved[:, STEEP].median()
    # The same loss falls by as much.
    assert -move(layer, 1e-3, optimizer).sum().item() == pytest.approx(1e-3, rel=0.05)
    even = move(layer, 1e-3).abs()
    assert even.max().item() == pytest.approx(even.min().item(), rel=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_would_raise_the_ordinary_loss_is_taken_out(sign: float) -> None:
    layer, optimizer = trained()
    mean = optimizer.state[layer.weight]["exp_avg"]
    x = sign * mean / mean.norm() + torch.randn(3, 2) * 0.1
    (layer.weight * x).sum().backward()
    # The ordinary loss changes by the product with its mean gradient: it never rises, and may fall.
    change = (move(layer, 1e-3, optimizer).double() * mean.double()).sum().item()
    assert change <= 2e-3 * move(layer, 1e-3, optimizer).norm().item() * mean.norm().item()


def test_moments_are_those_of_the_adam_kind_through_any_wrapper() -> None:
    layer, optimizer = trained()

    class Wrapped:
        def __init__(self) -> None:
            self.optimizer = optimizer

    assert moments_of(Wrapped()).keys() == moments_of(optimizer).keys() == {id(layer.weight)}
    for other in (None, object(), torch.optim.SGD(layer.parameters(), lr=0.1), torch.optim.AdamW(layer.parameters())):
        assert moments_of(other) == {}
    factored = trained(torch.optim.Adafactor)
    assert moments_of(factored[1]) == {}
    # transformers' own: of vectors it keeps the mean square whole, and no mean.
    vector = nn.Parameter(torch.ones(4))
    second_only = Adafactor([vector], lr=1e-3, relative_step=False, scale_parameter=False)
    vector.sum().backward()
    second_only.step()
    assert "exp_avg_sq" in second_only.state[vector]
    assert moments_of(second_only) == {}


def test_16_bit_weights_move_by_less_than_their_last_place() -> None:
    layer = nn.Linear(200, 200, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(layer.weight, 1.0)
    for step in range(20):
        layer.weight.sum().backward()
        # Seeded by the step, as in training: with one seed for all, the same few weights would move each time.
        descend([layer.weight], 0.4, {}, torch.Generator().manual_seed(step))
        layer.zero_grad()
    # 20 moves of 1e-5, each far below the last place of 1.0 (2^-8).
    assert (1 - layer.weight.detach().double().mean()).item() == pytest.approx(20 * 1e-5, rel=0.2)


def test_nothing_moves_where_nothing_is_left_to_learn() -> None:
    layer = nn.Linear(4, 3)
    layer(torch.randn(2, 4)).sum().backward()
    assert not move(layer, 0.0).any()
    layer.weight.grad = torch.zeros_like(layer.weight)
    assert not move(layer, 1.0).any()
