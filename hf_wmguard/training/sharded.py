"""Carriers whose matrices lie in parts on several processes as DTensors: FSDP2 and tensor parallelism.

A projection A^T W B is a sum over the weights, so every rank takes the sum over its own part and one all-reduce of n
floats adds them up: no step gathers a weight. A move changes each part by its rows and columns of the change. Tiles are
put together only once, one after the other, when the scheme is committed to (their norms go into the record).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_wmguard.errors import FormatError, UnsupportedError
from hf_wmguard.training.backends import LoraParameters, ParameterBackend, WholeParameters
from hf_wmguard.training.zero import ZeroParameters, uses_zero
from hf_wmguard.watermark.rounding import add_rounded_
from hf_wmguard.watermark.signature import CarrierKey

Groups = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What this process holds of a tensor.

    Args:
        local: Its values; a view, where the tensor's own are asked for.
        starts: Where it begins in the whole, for each dimension.
        groups: The processes over which a sum of parts is the sum of the whole, one group after the other.
    """

    local: Tensor
    starts: tuple[int, ...]
    groups: Groups


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters of a model lie in parts on several processes."""
    # After a forward without a backward FSDP2 may leave whole copies in the place of all parts.
    return any(isinstance(one, FSDPModule) for one in model.modules()) or any(
        isinstance(one, DTensor) for one in model.parameters()
    )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state dict, in the main process's memory; empty on the others, which all have to call it."""
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(state)


def tied_again(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which what the model ties is one tensor, and not a copy for each name."""
    result, first = dict(state), dict[int, str]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if name in result and other in result:
            result[name] = result[other]
    return result


def splits_itself(model: Any) -> bool:
    """Return whether transformers has split a model as it was loaded, and puts it together for a save."""
    return getattr(model.config, "distributed_config", None) is not None


def check_whole(model: nn.Module) -> None:
    """Refuse to save or to read what training goes on from, where a model lies in parts.

    Raises:
        UnsupportedError: It does.
    """
    if is_sharded(model):
        raise UnsupportedError(
            "the state of an optimizer that lies in parts on several processes is not saved or read by this version",
            hint="call guard.save(folder) without resumable=True, which saves the weights",
        )


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without a copy and without a graph."""
    one: Any = tensor.detach()
    part: Tensor = one.to_local() if isinstance(tensor, DTensor) else one
    return part


def part_of(tensor: Tensor) -> Part:
    """Return what this process holds of a tensor, and where in the whole.

    Raises:
        UnsupportedError: It is cut in another way than in one block for each process.
    """
    if not isinstance(tensor, DTensor):
        return Part(local=tensor.detach(), starts=(0,) * tensor.ndim, groups=())
    mesh, own = tensor.device_mesh, local(tensor)
    place = mesh.get_coordinate()
    starts, sizes, groups = [0] * tensor.ndim, list(tensor.shape), []
    for index, placement in enumerate(tensor.placements):
        # By type: a strided shard is a Shard to isinstance in some releases of torch.
        if type(placement) is Shard and place is not None:
            step = -(-sizes[placement.dim] // mesh.size(index))
            begin = min(place[index] * step, sizes[placement.dim])
            starts[placement.dim] += begin
            sizes[placement.dim] = min(step, sizes[placement.dim] - begin)
            groups.append(mesh.get_group(index))
        elif type(placement) is not Replicate:
            sizes[0] = -1
    if list(own.shape) != sizes:
        raise UnsupportedError(
            f"a parameter of shape {tuple(tensor.shape)} is cut in a way that cannot be followed: {tensor.placements}",
            hint="use FSDP2 or tensor parallelism, but not both over the same dimension",
        )
    return Part(local=own, starts=tuple(starts), groups=tuple(groups))


def _is_copied(tensor: Tensor) -> bool:
    """Return whether a tensor lies in parts, of each of which several processes have a copy of their own."""
    if not isinstance(tensor, DTensor):
        return False
    kinds = [type(one) for one, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True) if size > 1]
    return Replicate in kinds and Shard in kinds


def reshard(model: nn.Module) -> None:
    """Drop the whole copies that FSDP2 keeps after a forward: the next one must be made from what is changed here."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def total(tensors: Iterable[Tensor], value_of: Callable[[Tensor], float]) -> float:
    """Return the sum of a value over whole tensors; arguments as those of `totals`."""
    return totals(tensors, lambda one: (value_of(one),))[0]


def totals(tensors: Iterable[Tensor], values_of: Callable[[Tensor], Sequence[float]]) -> list[float]:
    """Return the sums of some values over whole tensors, from those of each part.

    Args:
        tensors: At least one, of which this process may hold parts.
        values_of: Of a tensor, what its part adds to each sum.
    """
    sums: dict[Groups, list[float]] = {}
    devices: dict[Groups, torch.device] = {}
    for one in tensors:
        groups, values = part_of(one).groups, values_of(one)
        sums[groups] = [a + b for a, b in zip(sums.get(groups, [0.0] * len(values)), values, strict=True)]
        devices[groups] = one.device
    whole = [
        _summed(torch.tensor(values, dtype=torch.float64, device=devices[groups] if groups else None), groups).tolist()
        for groups, values in sums.items()
    ]
    return [sum(values) for values in zip(*whole, strict=True)]


def _summed(values: Tensor, groups: Groups) -> Tensor:
    for group in groups:
        distributed.all_reduce(values, group=group)
    return values


def backend_of(model: nn.Module) -> ParameterBackend:
    """Return what can carry a signature in a model; errors as those of the backends."""
    if isinstance(model, PeftModel):
        return LoraParameters(model)
    if uses_zero(model):
        return ZeroParameters(model)
    return ShardedParameters(model) if is_sharded(model) else WholeParameters(model)


class ShardedParameters(WholeParameters):
    """The trained matrices of a model without adapters, parts of which lie on other processes.

    Raises:
        UnsupportedError: As `WholeParameters`, or a matrix is cut in a way that cannot be followed.
    """

    def __init__(self, model: nn.Module) -> None:
        reshard(model)
        super().__init__(model)
        self._model = model
        for parameter in self._parameters.values():
            part_of(parameter)
            if _is_copied(parameter):
                raise UnsupportedError(
                    "training mode is not supported by this version: HSDP, which keeps several copies of each part",
                    hint="use FSDP2 over all processes, without replicas",
                )

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        parameter = self._parameters[name]
        part = part_of(parameter)
        # float32 holds what the 16-bit types do, and a sum of a number with zeros is that number.
        tile = torch.zeros(rows, parameter.shape[1], dtype=torch.float32, device=part.local.device)
        row, column = part.starts
        first, last = max(row_start, row), min(row_start + rows, row + part.local.shape[0])
        if first < last:
            columns = slice(column, column + part.local.shape[1])
            tile[first - row_start : last - row_start, columns] = part.local[first - row : last - row].float()
        return _summed(tile, part.groups)

    def projections_of(self, keys: Sequence[CarrierKey], committed: Sequence[Tensor]) -> list[Tensor]:
        reshard(self._model)
        parts = [_Block.of(self._parameters[key.carrier.name], key) for key in keys]
        own = [
            (block.left(key.left).T @ block.weights.float() @ block.right(key.right)).double()
            for block, key in zip(parts, keys, strict=True)
        ]
        found: list[Tensor] = list(own)
        # All carriers that are cut alike in one go: as a rule, all carriers.
        for groups in dict.fromkeys(block.groups for block in parts):
            places = [index for index, block in enumerate(parts) if block.groups == groups]
            flat = _summed(torch.cat([own[index].flatten() for index in places]), groups)
            sums = torch.split(flat, [own[index].numel() for index in places])
            for index, values in zip(places, sums, strict=True):
                found[index] = values.reshape(own[index].shape)
        return found

    def move(self, key: CarrierKey, shift: Tensor, generator: torch.Generator) -> None:
        block = _Block.of(self._parameters[key.carrier.name], key)
        change = block.left(key.left) @ key.spread(shift) @ block.right(key.right).T
        whole = (key.carrier.rows, key.carrier.shape[1])
        add_rounded_(block.weights, change, generator, whole=whole, at=(block.row, block.column))

    def add_gradient(self, key: CarrierKey, gradient: Tensor) -> None:
        grad = self._parameters[key.carrier.name].grad
        if grad is not None:
            block = _Block.of(grad, key)
            change = block.left(key.left) @ gradient.float() @ block.right(key.right).T
            block.weights.add_(change.to(block.weights.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """What this process holds of one carrier's tile: a view of its weights, and where in the tile it begins."""

    weights: Tensor
    row: int
    column: int
    groups: Groups

    @classmethod
    def of(cls, tensor: Tensor, key: CarrierKey) -> _Block:
        part, carrier = part_of(tensor), key.carrier
        row, column = part.starts
        first = max(carrier.row_start, row)
        last = max(first, min(carrier.row_start + carrier.rows, row + part.local.shape[0]))
        inside = min(first - carrier.row_start, carrier.rows)
        return cls(weights=part.local[first - row : last - row], row=inside, column=column, groups=part.groups)

    def left(self, rows: Tensor) -> Tensor:
        return rows[self.row : self.row + self.weights.shape[0]]

    def right(self, columns: Tensor) -> Tensor:
        return columns[self.column : self.column + self.weights.shape[1]]


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor's values into what this process holds of another.

    Raises:
        FormatError: They have different shapes.
    """
    if target.shape != whole.shape:
        raise FormatError(
            f"a tensor is {tuple(whole.shape)}, expected {tuple(target.shape)}", hint="load it into the same model"
        )
    part = part_of(target)
    window = tuple(slice(start, start + size) for start, size in zip(part.starts, part.local.shape, strict=True))
    part.local.copy_(whole[window] if window else whole)


class Loaded(NamedTuple):
    """What ``load_state_dict`` says: names that only the model has, and names that only the file has."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> Loaded:
    """Load whole tensors into a model whose parameters lie in parts."""
    reshard(model)
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own:
            copy_whole(own[name], tensor)
    return Loaded(sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys()))
