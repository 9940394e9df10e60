"""Whether a gradient that was added before the backward is still there after it, under DDP too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hf_wmguard.training.step_order import AddedGradient

Wrap = Callable[[nn.Module], nn.Module]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WAYS: dict[str, Wrap] = {
    "alone": lambda model: model,
    "ddp": DistributedDataParallel,
    "ddp with bucket views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_added_to_is_not_lost(way: str, micro_steps: int) -> None:
    model = nn.Linear(3, 2)
    wrapped = WAYS[way](model)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        added = AddedGradient(model)
        for _ in range(micro_steps):
            wrapped(torch.ones(1, 3)).sum().backward()
        assert not added.is_lost()
        assert model.weight.grad is not None
        assert bool((model.weight.grad == 1 + micro_steps).all())
        model.zero_grad()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("when", ["before the backward", "between two", "after it"])
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_set_to_zero_is_lost(way: str, when: str) -> None:
    model = nn.Linear(3, 2)
    wrapped = WAYS[way](model)
    model(torch.ones(1, 3)).sum().backward()
    added = AddedGradient(model)
    for moment in ("before the backward", "between two"):
        if when == moment:
            model.zero_grad()
        wrapped(torch.ones(1, 3)).sum().backward()
    if when == "after it":
        model.zero_grad()
    assert added.is_lost()


def test_without_gradients_there_is_nothing_to_lose() -> None:
    assert not AddedGradient(nn.Linear(2, 2)).is_lost()
