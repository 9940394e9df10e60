"""Other names, other storage, fewer layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_wmguard.robustness.structure import add_prefix, drop_layers, layers_of, rename, shuffle_order, transpose


@pytest.fixture
def weights() -> dict[str, Tensor]:
    tensors = {f"model.layers.{layer}.mlp.0.weight": torch.full((2, 3), float(layer)) for layer in range(12)}
    return {"embed.weight": torch.ones(4, 3), **tensors, "head.weight": torch.ones(3, 4)}


def test_layers_are_found_by_their_first_number(weights: dict[str, Tensor]) -> None:
    assert layers_of(weights) == {"model.layers.": list(range(12))}
    assert layers_of(
        {"encoder.block.0.w": torch.ones(1), "decoder.block.1.w": torch.ones(1), "0.w": torch.ones(1)}
    ) == {
        "encoder.block.": [0],
        "decoder.block.": [1],
        "": [0],
    }


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.25, [*range(8), 11]), (0.5, [*range(5), 11]), (0, range(12)), (1, [11]), (0.01, [*range(10), 11])],
)
def test_dropped_layers_leave_no_gap(weights: dict[str, Tensor], share: float, kept: list[int]) -> None:
    after = drop_layers(weights, share)
    assert layers_of(after) == {"model.layers.": list(range(len(list(kept))))}
    left = [float(after[f"model.layers.{new}.mlp.0.weight"][0, 0]) for new in range(len(list(kept)))]
    assert left == list(kept)
    assert torch.equal(after["embed.weight"], weights["embed.weight"])


def test_names_and_storage_change_no_value(weights: dict[str, Tensor]) -> None:
    def values(tensors: dict[str, Tensor]) -> list[float]:
        return sorted(float(tensor.sum()) for tensor in tensors.values())

    for attacked in (add_prefix(weights), rename(weights), shuffle_order(weights), transpose(weights)):
        assert values(attacked) == values(weights)
        for tensor in attacked.values():
            tensor.zero_()
        assert float(weights["embed.weight"].sum()) == 12


def test_names(weights: dict[str, Tensor]) -> None:
    assert set(add_prefix(weights)) == {f"module.{name}" for name in weights}
    assert set(shuffle_order(weights)) == set(weights)
    assert list(shuffle_order(weights)) != list(weights)
    renamed = rename(weights)
    assert renamed["blocks.7.t000"][0, 0] == 7
    assert {name for name in renamed if not name.startswith("blocks")} == {"rest.t000", "rest.t001"}
    transposed = transpose(weights)
    assert transposed["model.layers.3.mlp.0.weight"].shape == (3, 2)
    assert transposed["model.layers.3.mlp.0.weight"].is_contiguous()
    assert transposed["embed.weight"].shape == (4, 3)
