"""Where the carriers of a model lie in memory, and how they are moved: whole parameters, or adapters beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.protect import SavedAdapter
from hf_wmguard.watermark.carriers import is_carrier
from hf_wmguard.watermark.lowrank import Reach, adapter_projections, row_space
from hf_wmguard.watermark.magnitude import Rescaled
from hf_wmguard.watermark.rounding import CARRYING_DTYPES, add_rounded_, round_stochastic
from hf_wmguard.watermark.signature import CarrierKey, change_norm, move_, project

_logger = logging.getLogger(__name__)
ADAPTER = "default"
"""The only name of an adapter whose files peft writes where everybody looks for them."""
_INNER = "base_model.model."


class ParameterBackend(Protocol):
    """What can carry a signature in one model."""

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Return rows and columns of every matrix that may carry, by its name in the merged model."""

    def bases(self) -> Mapping[str, tuple[int, bytes]]:
        """Return rank and row space of every adapter, as `select_carriers` takes them; empty for whole matrices."""

    def saved(self) -> Mapping[str, SavedAdapter]:
        """Return where a save holds each adapter; empty for whole matrices."""

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        """Return rows of a matrix as they are committed to; of an adapted matrix without its adapter."""

    def projections_of(self, keys: Sequence[CarrierKey], committed: Sequence[Tensor]) -> list[Tensor]:
        """Return the projections of carriers, each float64 [l, r], not checked for NaN.

        Args:
            keys: The carrier keys.
            committed: For each, those of what `read` gave at the commitment, float64 [l, r].
        """

    def move(self, key: CarrierKey, shift: Tensor, generator: torch.Generator) -> None:
        """Move the projections of one carrier by ``shift``, float64 [l, r], changing the weights as little as may be.

        Args:
            key: The carrier key.
            shift: In units of the weights.
            generator: For the rounding of 16-bit weights.
        """

    def settle(self) -> None:
        """Make what was moved the weights that a save writes, where the two are not the same."""

    def change_norm(self, key: CarrierKey, shift: Tensor) -> float:
        """Return the Frobenius norm of the change that `move` makes."""

    def add_gradient(self, key: CarrierKey, gradient: Tensor) -> None:
        """Add to ``.grad`` what follows from a gradient with respect to the projections, float64 [l, r]."""


class WholeParameters:
    """The trained matrices of a model without adapters.

    Raises:
        UnsupportedError: All matrices that could carry are frozen, or one is of a type that cannot be moved.
    """

    def __init__(self, model: nn.Module) -> None:
        fit = {name: one for name, one in model.named_parameters() if is_carrier(name, tuple(one.shape))}
        self._parameters = {name: one for name, one in fit.items() if one.requires_grad}
        if fit and not self._parameters:
            raise UnsupportedError(
                f"all {len(fit)} matrices that could carry the signature are frozen",
                hint="train some of them, or pass signature=None to mark with triggers only",
            )
        for name, parameter in self._parameters.items():
            check_dtype(name, parameter)

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return {name: (one.shape[0], one.shape[1]) for name, one in self._parameters.items()}

    def bases(self) -> Mapping[str, tuple[int, bytes]]:
        return {}

    def saved(self) -> Mapping[str, SavedAdapter]:
        return {}

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        return self._parameters[name].data[row_start : row_start + rows]

    def projections_of(self, keys: Sequence[CarrierKey], committed: Sequence[Tensor]) -> list[Tensor]:
        return [project(self._tile(key), key) for key in keys]

    def move(self, key: CarrierKey, shift: Tensor, generator: torch.Generator) -> None:
        tile = self._tile(key)
        if tile.dtype == torch.float32:
            move_(tile, key, shift)
        else:
            values = tile.float()
            move_(values, key, shift)
            tile.copy_(round_stochastic(values, tile.dtype, generator))

    def settle(self) -> None:
        """Do nothing: they are the same."""

    def change_norm(self, key: CarrierKey, shift: Tensor) -> float:
        return change_norm(key, shift)

    def add_gradient(self, key: CarrierKey, gradient: Tensor) -> None:
        _add_to_grad(self._parameters[key.carrier.name], key, key.left @ gradient.float() @ key.right.T)

    def _tile(self, key: CarrierKey) -> Tensor:
        return self.read(key.carrier.name, key.carrier.row_start, key.carrier.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """One adapted matrix: W0 of ``module``, with A ``down``, B ``up`` and s ``scaling`` beside it, and DoRA's m."""

    module: Any
    down: nn.Parameter
    up: nn.Parameter
    scaling: float
    saved: SavedAdapter
    magnitude: nn.Parameter | None = None


class LoraParameters:
    """The adapted matrices of a model with one LoRA adapter; the base may be quantized to 4 bits.

    Raises:
        UnsupportedError: An adapter of a kind that cannot carry, or whose B is not trained.
    """

    def __init__(self, model: PeftModel) -> None:
        layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
        self._adapters: dict[str, _Adapter] = {}
        for path, layer in layers.items():
            name = path.removeprefix(_INNER) + ".weight"
            check_layer(path, layer)
            if ADAPTER in layer.lora_A:
                adapter = _adapter(path, layer)
                if is_carrier(name, (adapter.up.shape[0], adapter.down.shape[1])):
                    self._adapters[name] = adapter
        if not self._adapters:
            raise UnsupportedError(
                f"none of the {len(layers)} adapted layers can carry the signature "
                "(expected linear layers of the repeated blocks)",
                hint='set target_modules="all-linear", or pass signature=None to mark with triggers only',
            )
        self._reported: set[str] = set()

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return {name: (one.up.shape[0], one.down.shape[1]) for name, one in self._adapters.items()}

    def bases(self) -> Mapping[str, tuple[int, bytes]]:
        return {name: (one.down.shape[0], row_space(one.down)) for name, one in self._adapters.items()}

    def saved(self) -> Mapping[str, SavedAdapter]:
        return {
            name: one.saved if one.magnitude is None else replace(one.saved, base=partial(self.read, name))
            for name, one in self._adapters.items()
        }

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        base = self._adapters[name].module.base_layer
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedError(
                f"{name}: the 4-bit weights were rearranged by an evaluation on this CPU and cannot be read any more",
                hint="load the base again, and evaluate it after training has begun",
            )
        return dequantize_module_weight(base).detach()[row_start : row_start + rows]

    def projections(self, key: CarrierKey, committed: Tensor) -> Tensor:
        """Return the projections of one carrier; see `projections_of`."""
        # The frozen matrix says what it said at the commitment: it is not dequantized at every step.
        adapter = self._adapters[key.carrier.name]
        if adapter.magnitude is not None:
            return project(self._rescaled(adapter, key).weights, key)
        return committed + adapter_projections(adapter.down, _rows(adapter, key), adapter.scaling, key)

    def projections_of(self, keys: Sequence[CarrierKey], committed: Sequence[Tensor]) -> list[Tensor]:
        return [self.projections(key, before) for key, before in zip(keys, committed, strict=True)]

    def move(self, key: CarrierKey, shift: Tensor, generator: torch.Generator) -> None:
        adapter = self._adapters[key.carrier.name]
        reach = Reach.of(adapter.down, key)
        if reach.lost and key.carrier.name not in self._reported:
            self._reported.add(key.carrier.name)
            _logger.warning(
                "%s: lora_A has turned away from %d of the mark's %d directions, which are not moved any more; "
                "lower the learning rate, or freeze lora_A",
                key.carrier.name,
                reach.lost,
                key.carrier.sides[1],
            )
        change = reach.change(key, shift, adapter.scaling)
        if adapter.magnitude is None:
            add_rounded_(_rows(adapter, key), change, generator)
            return
        before = self._rescaled(adapter, key)
        add_rounded_(_rows(adapter, key), before.change(change), generator)
        # Of B as it was rounded.
        lengths = before.magnitude(self._rescaled(adapter, key).directions)
        _magnitude_rows(adapter, key).copy_(lengths)

    def settle(self) -> None:
        """Do nothing: they are the same."""

    def change_norm(self, key: CarrierKey, shift: Tensor) -> float:
        return Reach.of(self._adapters[key.carrier.name].down, key).change_norm(key, shift)

    def add_gradient(self, key: CarrierKey, gradient: Tensor) -> None:
        adapter = self._adapters[key.carrier.name]
        right = adapter.down.detach().float() @ key.right
        left = key.left @ gradient.float()
        if adapter.magnitude is not None:
            # As in DoRA's own backward, the rows' norms count as constant.
            left = self._rescaled(adapter, key).factors * left
        _add_to_grad(adapter.up, key, adapter.scaling * (left @ right.T))

    def _rescaled(self, adapter: _Adapter, key: CarrierKey) -> Rescaled:
        carrier = key.carrier
        base = self.read(carrier.name, carrier.row_start, carrier.rows).to(adapter.up.device)
        return Rescaled.of(base, adapter.down, _rows(adapter, key), adapter.scaling, _magnitude_rows(adapter, key))


def _rows(adapter: _Adapter, key: CarrierKey) -> Tensor:
    return adapter.up.data[key.carrier.row_start : key.carrier.row_start + key.carrier.rows]


def _magnitude_rows(adapter: _Adapter, key: CarrierKey) -> Tensor:
    magnitude: Any = adapter.magnitude
    rows: Tensor = magnitude.data[key.carrier.row_start : key.carrier.row_start + key.carrier.rows]
    return rows


def _add_to_grad(parameter: nn.Parameter, key: CarrierKey, gradient: Tensor) -> None:
    # A parameter that this step's loss did not reach has no gradient, and the optimizer leaves it alone: so do we.
    if parameter.grad is not None:
        parameter.grad[key.carrier.row_start : key.carrier.row_start + key.carrier.rows] += gradient.to(
            parameter.grad.dtype
        )


def _adapter(path: str, layer: Any) -> _Adapter:
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    for name, parameter in ((f"{path}.lora_A", down), (f"{path}.lora_B", up)):
        check_dtype(name, parameter)
    if not up.requires_grad:
        raise UnsupportedError(f"{path}.lora_B is frozen", hint="load the adapter with is_trainable=True")
    saved = SavedAdapter(
        down=f"{path}.lora_A.weight",
        up=f"{path}.lora_B.weight",
        scaling=float(layer.scaling[ADAPTER]),
        magnitude=f"{path}.lora_magnitude_vector" if _is_dora(layer) else None,
    )
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight if _is_dora(layer) else None
    return _Adapter(module=layer, down=down, up=up, scaling=saved.scaling, saved=saved, magnitude=magnitude)


def _is_dora(layer: Any) -> bool:
    return isinstance(layer.lora_variant.get(ADAPTER), DoraLinearVariant)


def check_dtype(name: str, parameter: Tensor) -> None:
    """Refuse a parameter of a type that cannot be moved by small steps.

    Raises:
        UnsupportedError: Not float32, bfloat16 or float16.
    """
    if parameter.dtype not in CARRYING_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in CARRYING_DTYPES)
        raise UnsupportedError(
            f"{name} is {parameter.dtype}, expected {expected}", hint="load the model with dtype=torch.bfloat16"
        )


def check_layer(path: str, layer: Any) -> None:
    """Refuse an adapted layer whose merged weight is neither W0 + s B A nor, with DoRA, its rows rescaled.

    Raises:
        UnsupportedError: Another variant, a bias of its own, a transposed or convolutional layer, merged.
    """
    variant = getattr(layer, "lora_variant", {}).get(ADAPTER)
    kind = type(layer).__name__
    refused: list[tuple[Any, str, str]] = [
        (
            variant is not None and not _is_dora(layer),
            f"LoRA variant {type(variant).__name__}",
            "use plain LoRA or DoRA",
        ),
        (layer.lora_bias.get(ADAPTER), "lora_bias", "set lora_bias=False"),
        (getattr(layer, "fan_in_fan_out", False), "fan_in_fan_out (Conv1D)", "train such a model without an adapter"),
        (kind in ("ParamWrapper", "MultiheadAttention"), kind, "adapt linear layers only, not target_parameters"),
        (layer.merged, "a merged adapter", "call unmerge_adapter() first"),
    ]
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"{path}: adapter is not supported by this version: {what}", hint=instead)
