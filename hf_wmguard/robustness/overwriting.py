"""Other owners embed signatures of their own over the marked weights."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import new_record, new_salt
from hf_wmguard.robustness.attacks import StateDict, is_block_matrix
from hf_wmguard.watermark.carriers import is_carrier
from hf_wmguard.watermark.signature import move_, read_projections, residual

STRANGERS_BUDGET = 0.03
"""Three times the usual strength."""


def overwrite(tensors: StateDict, owners: int, *, budget: float = STRANGERS_BUDGET) -> dict[str, Tensor]:
    """Return weights over which other owners, each with a fresh key, have embedded signatures one after the other.

    Args:
        tensors: The state dict.
        owners: Number of strangers.
        budget: Relative weight change of each, as `SignatureConfig.budget`.
    Raises:
        CapacityError: The model is too small for a stranger's payload.
    """
    attacked = {
        name: tensor.detach().float().clone() if is_block_matrix(name, tensor) else tensor
        for name, tensor in tensors.items()
    }
    shapes = {
        name: (one.shape[0], one.shape[1]) for name, one in attacked.items() if is_carrier(name, tuple(one.shape))
    }
    config = WatermarkConfig(
        model_id="stranger", owner_key="env:UNUSED", registry=".", signature=SignatureConfig(budget=budget)
    )
    for _ in range(owners):
        owner = OwnerKey.generate()
        record = new_record(
            owner,
            config,
            salt=new_salt(),
            shapes=shapes,
            read=lambda name, start, rows: attacked[name][start : start + rows],
        )
        for key in record.carrier_keys(owner):
            carrier = key.carrier
            tile = attacked[carrier.name][carrier.row_start : carrier.row_start + carrier.rows]
            with torch.no_grad():
                move_(tile, key, residual(read_projections(tile, key), key))
    return {name: one.to(tensors[name].dtype) for name, one in attacked.items()}
