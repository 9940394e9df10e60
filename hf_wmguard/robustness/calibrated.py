"""Attacks that look at activations: GPTQ and Wanda. What the layers see is collected by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_wmguard.robustness.attacks import StateDict, is_block_matrix, on_matrices

_DAMPING = 0.01


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What the inputs of one linear layer were, over all calibration tokens.

    Args:
        gram: Sum of x x^T, float32 [i, i].
        largest: Largest magnitude of each input feature, float32 [i].
        tokens: Number of inputs.
    """

    gram: Tensor
    largest: Tensor
    tokens: int = 0

    def add(self, values: Tensor) -> None:
        """Take in more inputs, any float dtype [..., i]."""
        flat = values.detach().reshape(-1, values.shape[-1]).float()
        self.gram.addmm_(flat.T, flat)
        self.largest = torch.maximum(self.largest, flat.abs().amax(dim=0))
        self.tokens += flat.shape[0]


def collect_inputs(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Inputs]:
    """Return what every linear layer of the numbered blocks sees, by name of its weight.

    Args:
        model: Left in the mode it was in.
        batches: Keyword arguments of the model.
    """
    seen: dict[str, Inputs] = {}
    handles = []
    for module_name, module in model.named_modules():
        name = f"{module_name}.weight"
        if isinstance(module, nn.Linear) and is_block_matrix(name, module.weight):
            weight = module.weight
            zeros = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
            seen[name] = Inputs(gram=zeros, largest=zeros[0].clone())
            handles.append(module.register_forward_pre_hook(_hook(seen[name])))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return seen


def _hook(inputs: Inputs) -> Any:
    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.add(arguments[0])

    return note


def quantize_gptq(
    tensors: StateDict, inputs: Mapping[str, Inputs], *, bits: int = 4, group: int = 128
) -> dict[str, Tensor]:
    """Return matrices quantized column by column, each rounding error made up for by the columns still to come.

    Args:
        tensors: The state dict.
        inputs: From `collect_inputs`; a matrix without inputs is left alone.
        bits: Width of the asymmetric grid from the smallest to the largest weight of a group.
        group: Columns of a row that share a grid.
    Source: Frantar et al. 2022 (GPTQ), algorithm 1.
    Deviation: all Hessians come from one pass through the whole model, not from the blocks quantized so far.
    """

    def change(name: str, weight: Tensor) -> Tensor:
        return _gptq(weight, inputs[name].gram, bits, group) if name in inputs else weight

    return on_matrices(tensors, change)


def _gptq(weight: Tensor, gram: Tensor, bits: int, group: int) -> Tensor:
    hessian = gram.to(weight.device).double()
    diagonal = hessian.diagonal()
    # A feature that was always zero says nothing about its column: any rounding of it will do.
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    rest, quantized = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        end = min(start + group, weight.shape[1])
        block, factor = rest[:, start:end], upper[start:end, start:end]
        scale, low = _grid(block, bits)
        errors = torch.empty_like(block)
        for column in range(end - start):
            value = block[:, column : column + 1]
            rounded = torch.round((value - low) / scale).clamp_(0, 2**bits - 1) * scale + low
            quantized[:, start + column] = rounded[:, 0]
            errors[:, column] = ((value - rounded) / factor[column, column])[:, 0]
            block[:, column + 1 :] -= torch.outer(errors[:, column], factor[column, column + 1 :])
        rest[:, end:] -= errors @ upper[start:end, end:]
    return quantized


def _grid(block: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return step and lowest level of each row; zero is a level, as integer kernels need it."""
    low = block.amin(dim=1, keepdim=True).clamp_max(0)
    high = block.amax(dim=1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(block.dtype).tiny)
    return scale, torch.round(low / scale) * scale


def prune_wanda(tensors: StateDict, inputs: Mapping[str, Inputs], share: float) -> dict[str, Tensor]:
    """Return matrices with the least important weights of each row set to zero: |weight| times its input's norm.

    Args:
        tensors: The state dict.
        inputs: From `collect_inputs`; a matrix without inputs is left alone.
        share: Share of each row that becomes zero, 0 to 1.
    Source: Sun et al. 2023 (Wanda), sec. 3.
    """

    def change(name: str, weight: Tensor) -> Tensor:
        count = int(share * weight.shape[1])
        if name not in inputs or count == 0:
            return weight
        importance = weight.abs() * inputs[name].gram.diagonal().sqrt().to(weight)
        return weight.scatter(1, importance.argsort(dim=1, stable=True)[:, :count], 0)

    return on_matrices(tensors, change)
