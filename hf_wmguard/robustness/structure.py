"""The same weights stored otherwise, and layers taken out."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from hf_wmguard.robustness.attacks import StateDict, is_block_matrix

_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?)(?P<index>\d+)\.(?P<rest>.+)$")


def layers_of(tensors: StateDict) -> dict[str, list[int]]:
    """Return the layer numbers of each stack, by what stands before the number (``model.layers.``)."""
    found: dict[str, set[int]] = {}
    for match in filter(None, map(_LAYER.match, tensors)):
        found.setdefault(match["stack"], set()).add(int(match["index"]))
    return {stack: sorted(numbers) for stack, numbers in found.items()}


def drop_layers(tensors: StateDict, share: float) -> dict[str, Tensor]:
    """Return a model with fewer layers, the rest renumbered without gaps.

    Args:
        tensors: The state dict.
        share: Share of the layers of each stack that are taken out, rounded to whole layers; at least one goes and one
            stays.
    Source: Gromov et al. 2024 ("The unreasonable ineffectiveness of the deeper layers"), sec. 4: a run of deep layers
        goes, the last one stays.
    """
    numbers: dict[str, dict[int, int]] = {}
    for stack, layers in layers_of(tensors).items():
        gone = min(max(round(share * len(layers)), share > 0), len(layers) - 1)
        kept = layers[: len(layers) - 1 - gone] + layers[-1:]
        numbers[stack] = {old: new for new, old in enumerate(kept)}
    attacked = {}
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if match is None:
            attacked[name] = tensor
        elif int(match["index"]) in numbers[match["stack"]]:
            number = numbers[match["stack"]][int(match["index"])]
            attacked[f"{match['stack']}{number}.{match['rest']}"] = tensor.clone()
    return attacked


def add_prefix(tensors: StateDict, prefix: str = "module.") -> dict[str, Tensor]:
    """Return all tensors under longer names, as wrappers around a model leave them."""
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def shuffle_order(tensors: StateDict, *, seed: int = 0) -> dict[str, Tensor]:
    """Return the same tensors in another order, as other shards would hold them."""
    names = list(tensors)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {names[index]: tensors[names[index]].clone() for index in order}


def transpose(tensors: StateDict) -> dict[str, Tensor]:
    """Return block matrices stored as [inputs, outputs], as ONNX exports and other frameworks do."""
    return {
        name: tensor.T.contiguous() if is_block_matrix(name, tensor) else tensor.clone()
        for name, tensor in tensors.items()
    }


def rename(tensors: StateDict) -> dict[str, Tensor]:
    """Return tensors under names that say nothing but the layer: ``blocks.3.t007``, in the order of the names."""
    attacked: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name in sorted(tensors):
        match = _LAYER.match(name)
        place = f"blocks.{match['index']}" if match else "rest"
        counts[place] = counts.get(place, -1) + 1
        attacked[f"{place}.t{counts[place]:03}"] = tensors[name].clone()
    return attacked
