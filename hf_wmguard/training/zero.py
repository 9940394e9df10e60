"""Carriers under DeepSpeed's ZeRO, which keeps float32 master weights in flat parts on several processes.

Stages 1 and 2 leave each process a whole copy of the model's own, often 16-bit, weights, which the optimizer writes
anew from the master weights at every step; stage 3 cuts that copy as well. So the master weights are what is read and
moved. A part is a run of the matrix's elements, row after row, and may begin and end inside a row.

What the optimizer makes from the master weights at its next step need not be written twice. After the last move there
is no next step, so `settle` brings the model's own copy up to date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.protect import SavedAdapter
from hf_wmguard.training.backends import check_dtype
from hf_wmguard.watermark.carriers import is_carrier
from hf_wmguard.watermark.signature import CarrierKey, change_norm


def uses_zero(model: nn.Module) -> bool:
    """Return whether DeepSpeed keeps the master weights of a model's parameters."""
    return any(hasattr(one, "ds_id") or hasattr(one, "_hp_mapping") for one in model.parameters())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """This process's part of some rows of a matrix, padded with zeros to whole rows.

    Args:
        rows: float32 [r, columns]; 0 where the elements lie on another process.
        first: Row of the matrix that it begins with.
        inside: Which of the padded elements are this process's.
        place: Where those lie in the process's flat part of the matrix.
    """

    rows: Tensor
    first: int
    inside: slice
    place: slice


class ZeroParameters:
    """The trained matrices of a model whose master weights ZeRO keeps in parts.

    Raises:
        UnsupportedError: All matrices that could carry are frozen, or one is of a type that cannot be moved.
    """

    def __init__(self, model: nn.Module) -> None:
        fit = {name: one for name, one in model.named_parameters() if is_carrier(name, _shape(one))}
        self._parameters: dict[str, Any] = {name: one for name, one in fit.items() if one.requires_grad}
        if fit and not self._parameters:
            raise UnsupportedError(
                f"all {len(fit)} matrices that could carry the signature are frozen", hint="train some of them"
            )
        for name, parameter in self._parameters.items():
            check_dtype(name, parameter)
        self._moved: dict[str, CarrierKey] = {}

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return {name: (_shape(one)[0], _shape(one)[1]) for name, one in self._parameters.items()}

    def bases(self) -> Mapping[str, tuple[int, bytes]]:
        return {}

    def saved(self) -> Mapping[str, SavedAdapter]:
        return {}

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        parameter = self._parameters[name]
        run = _run_of(parameter, row_start, rows)
        tile = torch.zeros(rows, _shape(parameter)[1], device=run.rows.device)
        tile[run.first - row_start : run.first - row_start + len(run.rows)] = run.rows
        distributed.all_reduce(tile, group=_group_of(parameter))
        return tile

    def projections_of(self, keys: Sequence[CarrierKey], committed: Sequence[Tensor]) -> list[Tensor]:
        own = [self._partial(key).flatten() for key in keys]
        sums = torch.cat(own)
        # Data parallel processes alone: other kinds of parallelism are refused at the start.
        distributed.all_reduce(sums, group=_group_of(self._parameters[keys[0].carrier.name]))
        pieces = torch.split(sums, [len(one) for one in own])
        return [one.reshape(key.carrier.sides) for one, key in zip(pieces, keys, strict=True)]

    def _partial(self, key: CarrierKey) -> Tensor:
        run = _run_of(self._parameters[key.carrier.name], key.carrier.row_start, key.carrier.rows)
        left = key.left[run.first - key.carrier.row_start :][: len(run.rows)]
        return (left.T @ run.rows.to(left.device) @ key.right).double()

    def move(self, key: CarrierKey, shift: Tensor, generator: torch.Generator) -> None:
        parameter = self._parameters[key.carrier.name]
        run = _run_of(parameter, key.carrier.row_start, key.carrier.rows)
        left = key.left[run.first - key.carrier.row_start :][: len(run.rows)]
        change = (left @ key.spread(shift) @ key.right.T).flatten()[run.inside]
        _add(parameter, change, run.place)
        self._moved[key.carrier.name] = key

    def settle(self) -> None:
        """Bring the model's own copies of what was moved up to date with the master weights; a collective."""
        for name, key in self._moved.items():
            parameter, carrier = self._parameters[name], key.carrier
            # Stage 3 has no whole copy, but of what it keeps gathered because it is small.
            whole = getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE") == "AVAILABLE"
            # Not every process need have it gathered, and the collective needs all of them.
            tile = self.read(name, carrier.row_start, carrier.rows)
            if whole:
                rows = parameter.data[carrier.row_start : carrier.row_start + carrier.rows]
                rows.copy_(tile.to(rows.dtype))
        self._moved.clear()

    def change_norm(self, key: CarrierKey, shift: Tensor) -> float:
        return change_norm(key, shift)

    def add_gradient(self, key: CarrierKey, gradient: Tensor) -> None:
        raise UnsupportedError(
            "DeepSpeed steps inside backward, where no gradient can be added", hint="set signature.form to decoupled"
        )


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _group_of(parameter: Any) -> Any:
    return parameter.ds_process_group if hasattr(parameter, "ds_id") else parameter._dp_group


def _flat_part(parameter: Any) -> tuple[Tensor, int]:
    """Return this process's master weights of a parameter, float32 [n], and where they begin in it."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param

        part: Tensor = safe_get_local_fp32_param(parameter)
        start = part.numel() * distributed.get_rank(parameter.ds_process_group)
        # The last part is padded to the size of the others.
        return part.detach().flatten()[: max(0, parameter.ds_numel - start)], start
    mapping = parameter._hp_mapping
    if mapping is None:
        return torch.zeros(0, device=parameter.device), 0
    return mapping.get_hp_fragment().detach(), mapping.lp_fragment_address.start


def _run_of(parameter: Any, row_start: int, rows: int) -> _Run:
    (flat, start), columns = _flat_part(parameter), _shape(parameter)[1]
    first = max(start, row_start * columns)
    last = max(first, min(start + len(flat), (row_start + rows) * columns))
    if first == last:
        empty = torch.zeros(0, columns, device=flat.device)
        return _Run(rows=empty, first=row_start, inside=slice(0), place=slice(0))
    begin, end = first // columns, -(-last // columns)
    padded = torch.zeros((end - begin) * columns, device=flat.device)
    inside, place = slice(first - begin * columns, last - begin * columns), slice(first - start, last - start)
    padded[inside] = flat[place].float()
    return _Run(rows=padded.reshape(-1, columns), first=begin, inside=inside, place=place)


@torch.no_grad()
def _add(parameter: Any, change: Tensor, place: slice) -> None:
    if not hasattr(parameter, "ds_id"):
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.get_hp_fragment().data[place] += change.to(parameter._hp_mapping.hp_fragment.device)
        return
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    part = safe_get_local_fp32_param(parameter).detach().clone()
    part.flatten()[place] += change.to(part.device)
    safe_set_local_fp32_param(parameter, part)
    # The part of the model's own copy, from which the next forward gathers.
    parameter.ds_tensor.data.copy_(part.reshape(parameter.ds_tensor.shape))
