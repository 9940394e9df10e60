"""Merges and delta compression, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_wmguard.robustness.compression import drop_delta, one_bit_delta, svd_delta
from hf_wmguard.robustness.merging import (
    merge_dare,
    merge_linear,
    merge_slerp,
    merge_task_arithmetic,
    merge_ties,
)

NAME = "layers.0.w"
Weights = dict[str, Tensor]


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def models() -> tuple[Weights, Weights, Weights]:
    """The owner's with a head of its own, another fine-tune, and their base."""
    base = {NAME: _draw(0, 30, 40), "norm": _draw(1, 40), "ids": torch.arange(3)}
    owner = {NAME: base[NAME] + 0.1 * _draw(2, 30, 40), "norm": base["norm"] + 0.1, "ids": torch.arange(3)}
    other = {NAME: base[NAME] + 0.1 * _draw(3, 30, 40), "norm": base["norm"] - 0.1, "ids": torch.arange(3)}
    return owner | {"head": _draw(4, 5, 40)}, other | {"head": _draw(5, 7, 40)}, base


MERGES: dict[str, Callable[[Weights, Weights, Weights], Weights]] = {
    "linear": lambda owner, other, base: merge_linear(owner, other, 0.3),
    "slerp": lambda owner, other, base: merge_slerp(owner, other, 0.3),
    "ties": lambda owner, other, base: merge_ties(owner, other, base, 0.3),
    "dare": lambda owner, other, base: merge_dare(owner, other, base, 0.3),
    "task arithmetic": lambda owner, other, base: merge_task_arithmetic(owner, other, base, 0.3),
    "svd": lambda owner, other, base: svd_delta(owner, base, 4),
    "one bit": lambda owner, other, base: one_bit_delta(owner, base),
    "drop": lambda owner, other, base: drop_delta(owner, base, 0.5),
}


@pytest.mark.parametrize("name", MERGES)
def test_inputs_are_left_alone_and_the_owners_own_is_kept(models: tuple[Weights, ...], name: str) -> None:
    before = [{key: tensor.clone() for key, tensor in model.items()} for model in models]
    after = MERGES[name](*models)
    assert list(after) == list(models[0])
    assert torch.equal(after["head"], models[0]["head"])
    assert torch.equal(after["ids"], torch.arange(3))
    assert not torch.equal(after[NAME], models[0][NAME])
    assert after[NAME].dtype == torch.float32
    after[NAME].zero_()
    for model, copy in zip(models, before, strict=True):
        assert all(torch.equal(model[key], copy[key]) for key in model)


def test_linear_and_slerp_end_at_the_two_models(models: tuple[Weights, ...]) -> None:
    owner, other, _ = models
    for merge in (merge_linear, merge_slerp):
        for weight, end in ((0.0, other), (1.0, owner)):
            for key in (NAME, "norm"):
                torch.testing.assert_close(merge(owner, other, weight)[key], end[key])
    torch.testing.assert_close(merge_linear(owner, other, 0.3)["norm"], 0.3 * owner["norm"] + 0.7 * other["norm"])


def test_slerp_moves_along_the_circle() -> None:
    east, north = {NAME: torch.tensor([[2.0, 0.0]])}, {NAME: torch.tensor([[0.0, 2.0]])}
    after = merge_slerp(north, east, 1 / 3)[NAME]
    torch.testing.assert_close(after, torch.tensor([[2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]]))
    # Parallel and zero tensors have no circle.
    torch.testing.assert_close(
        merge_slerp(east, {NAME: torch.tensor([[4.0, 0.0]])}, 0.5)[NAME], torch.tensor([[3.0, 0]])
    )
    assert torch.equal(merge_slerp({NAME: torch.zeros(1, 2)}, east, 0.5)[NAME], torch.tensor([[1.0, 0.0]]))


def test_ties_by_hand() -> None:
    base = {NAME: torch.full((1, 5), 10.0)}
    owner = {NAME: base[NAME] + torch.tensor([[4.0, 3.0, -5.0, 0.1, 0.2]])}
    other = {NAME: base[NAME] + torch.tensor([[2.0, -4.0, 0.1, 3.0, 0.3]])}
    # Three of five survive each trim: owner 4, 3, -5; other 2, -4, 3. Signs are elected by the sum: +, -, -, +.
    # Mean of those who agree: (4 + 2) / 2, -4 alone, -5 alone, 3 alone, nobody.
    after = merge_ties(owner, other, base, 0.5, density=0.6)[NAME]
    torch.testing.assert_close(after, 10 + torch.tensor([[3.0, -4.0, -5.0, 3.0, 0.0]]))
    # At weight 0.8 the owner wins the second vote, and weighs more in the mean of the first.
    after = merge_ties(owner, other, base, 0.8, density=0.6)[NAME]
    torch.testing.assert_close(after, 10 + torch.tensor([[3.6, 3.0, -5.0, 3.0, 0.0]]))


def test_task_arithmetic_adds_deltas() -> None:
    after = merge_task_arithmetic(
        {NAME: torch.tensor([[3.0]])}, {NAME: torch.tensor([[7.0]])}, {NAME: torch.ones(1, 1)}, 0.5
    )
    assert after[NAME].item() == 1 + 0.5 * (2 + 6)


def test_dare_drops_at_random_and_keeps_the_expectation() -> None:
    base = {NAME: torch.zeros(300, 400)}
    owner, other = {NAME: torch.full((300, 400), 1.0)}, {NAME: torch.full((300, 400), -3.0)}
    after = merge_dare(owner, other, base, 0.6, drop=0.75)[NAME]
    # 0.6 / 0.25 or 0, plus -1.2 / 0.25 or 0: four values, and the mean of the undropped merge.
    values = sorted({round(value, 3) for value in after.unique().tolist()})
    assert values == [-4.8, -2.4, 0.0, 2.4]
    assert float((after == 0).float().mean()) == pytest.approx(0.75**2, abs=0.01)
    assert float(after.mean()) == pytest.approx(0.6 - 0.4 * 3, abs=0.03)
    alone = drop_delta(owner, base, 0.9)[NAME]
    assert alone.unique().tolist() == [0.0, pytest.approx(10.0)]
    assert float(alone.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(drop_delta(owner, base, 0.0)[NAME], owner[NAME])


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_svd_leaves_the_best_delta_of_its_rank(models: tuple[Weights, ...], rank: int) -> None:
    owner, _, base = models
    delta = owner[NAME] - base[NAME]
    after = svd_delta(owner, base, rank)[NAME] - base[NAME]
    assert int(torch.linalg.matrix_rank(after, atol=1e-4)) == rank
    # Eckart-Young: what is lost is the singular values that were cut.
    lost = torch.linalg.svdvals(delta)[rank:].square().sum().sqrt()
    torch.testing.assert_close((after - delta).norm(), lost, atol=1e-4, rtol=1e-4)


def test_one_bit_delta_has_one_magnitude(models: tuple[Weights, ...]) -> None:
    owner, _, base = models
    delta, after = owner[NAME] - base[NAME], one_bit_delta(owner, base)[NAME] - base[NAME]
    torch.testing.assert_close(after.abs(), torch.full_like(after, float(delta.abs().mean())), atol=1e-5, rtol=1e-3)
    assert torch.equal(after > 0, delta > 0)
