"""The decoupled signature step: after the optimizer, a share of the shortest way to the lattice.

A loss term added to the gradient would be normalised away by Adam; like AdamW's weight decay, this step has a
size and a schedule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_wmguard.errors import FormatError
from hf_wmguard.training.schedule import Ramp
from hf_wmguard.watermark.signature import (
    CarrierKey,
    Reading,
    change_norm,
    move_,
    read_projections,
    residual,
)


class SignatureStep:
    """Moves the carriers of one model onto their lattices.

    Args:
        keys: The carriers with their keys, on the model's device.
        parameters: The model's parameters by name, float32.
        ramp: How far to go at which step.
    """

    def __init__(self, keys: tuple[CarrierKey, ...], parameters: Mapping[str, nn.Parameter], ramp: Ramp) -> None:
        self.keys = keys
        self.ramp = ramp
        self._parameters = parameters
        self._applied = [torch.zeros_like(key.dither) for key in keys]
        self._projections: list[Tensor] = []
        # Of the whole matrices, as the budget counts; a tile stands for its matrix.
        self._norm = math.sqrt(sum(key.carrier.rms**2 * math.prod(key.carrier.shape) for key in keys))

    @torch.no_grad()
    def run(self, strength: float) -> float:
        """Move every carrier by ``strength`` (0 to 1) of the remaining way; return the relative size of the move.

        Raises:
            NonFiniteWeightError: A weight is NaN or Inf; the carriers before it have been moved.
        """
        self._projections = []
        squares = 0.0
        for index, key in enumerate(self.keys):
            tile = self._tile(key)
            projections = read_projections(tile, key)
            shift = strength * residual(projections, key)
            if strength > 0:
                move_(tile, key, shift)
                self._applied[index] += shift
                squares += change_norm(key, shift) ** 2
            self._projections.append(projections + shift)
        return math.sqrt(squares) / self._norm

    def metrics(self) -> dict[str, float]:
        """Return what the carriers said after the last move, and how far they have been moved in all."""
        if not self._projections:
            return {}
        reading = Reading.of(self.keys, self._projections)
        return {
            "wmguard/signature_loss": reading.loss,
            "wmguard/bit_error_rate": reading.bit_error_rate,
            "wmguard/log10_p": reading.log10_p,
            "wmguard/weight_change": self.weight_change,
        }

    @property
    def weight_change(self) -> float:
        """Norm of the sum of all moves over the norm of the carrying matrices when the scheme was committed."""
        return (
            math.sqrt(sum(change_norm(key, shift) ** 2 for key, shift in zip(self.keys, self._applied, strict=True)))
            / self._norm
        )

    def state(self) -> bytes:
        """Return the sum of all moves so far, for a checkpoint; secret, because it lies in the key's directions."""
        return torch.cat([shift.flatten().cpu() for shift in self._applied]).float().numpy().tobytes()

    def restore(self, data: bytes) -> None:
        """Go on from a `state`.

        Raises:
            FormatError: It belongs to other carriers.
        """
        if len(data) != 4 * sum(key.carrier.projections for key in self.keys):
            raise FormatError(
                "the checkpoint's signature state belongs to other carriers",
                hint="resume with the same config",
            )
        flat, position = torch.frombuffer(bytearray(data), dtype=torch.float32).double(), 0
        for shift in self._applied:
            shift.copy_(flat[position : position + shift.numel()].reshape(shift.shape))
            position += shift.numel()

    def _tile(self, key: CarrierKey) -> Tensor:
        carrier = key.carrier
        return self._parameters[carrier.name].data[carrier.row_start : carrier.row_start + carrier.rows]
