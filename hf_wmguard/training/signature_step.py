"""The signature's own part of a training step.

Decoupled: after the optimizer, a share of the shortest way to the lattice, with a size and a schedule of its own, like
AdamW's weight decay. Gradient: the signature loss's gradient beside the ordinary one; Adam normalises most of it away,
so that the last step closes the rest of the way at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_wmguard.config import SignatureConfig
from hf_wmguard.errors import FormatError, NonFiniteWeightError
from hf_wmguard.training.backends import ParameterBackend
from hf_wmguard.training.schedule import Phase, Ramp
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey, Reading, loss_gradient, residual


class SignatureStep:
    """Moves the carriers of one model onto their lattices.

    Args:
        keys: The carriers with their keys, on the model's device.
        committed: Their projections when the scheme was committed.
        backend: Where the carriers lie.
        config: Form, strength and ramp.
        phase: The marked phase.
        rounding_key: 32 bytes, the subkey of the rounding's random numbers.
    """

    def __init__(
        self,
        keys: tuple[CarrierKey, ...],
        committed: list[Tensor],
        backend: ParameterBackend,
        config: SignatureConfig,
        phase: Phase,
        rounding_key: bytes,
    ) -> None:
        self.keys = keys
        self._committed = committed
        self._backend = backend
        self._strength = config.strength
        self._by_gradient = config.form == "gradient"
        # The gradient form is complete where its last step snaps.
        self.ramp = Ramp(phase=phase, share=1.0 if self._by_gradient else config.ramp)
        self._rounding_key = rounding_key
        self._applied = [torch.zeros_like(key.dither) for key in keys]
        self._last = [torch.zeros_like(key.dither) for key in keys]
        self._projections: list[Tensor] = []
        # Of the whole matrices, as the budget counts; a tile stands for its matrix.
        self._norm = math.sqrt(sum(key.carrier.rms**2 * math.prod(key.carrier.shape) for key in keys))

    def before_optimizer(self, step: int) -> None:
        """Add the gradient of the signature loss, in the gradient form, where optimizer step ``step`` is marked.

        Raises:
            NonFiniteWeightError: A weight is NaN or Inf.
        """
        if not self._by_gradient or not self.ramp.phase.contains(step):
            return
        self._read()
        total = sum(key.carrier.projections for key in self.keys)
        for key, projections in zip(self.keys, self._projections, strict=True):
            self._backend.add_gradient(key, loss_gradient(projections, key) * (self._strength / total))

    def after_optimizer(self, step: int, *, rests: bool = False) -> None:
        """Move the carriers by the share of the remaining way that belongs to optimizer step ``step``.

        Args:
            step: Optimizer steps done.
            rests: Move nothing before the ramp's end; the steps after this one make up for it.
        Raises:
            NonFiniteWeightError: A weight is NaN or Inf.
        """
        if self.ramp.strength(step) > 0 and (step >= self.ramp.full or not (self._by_gradient or rests)):
            self.run(self.ramp.strength(step), step)

    @torch.no_grad()
    def run(self, strength: float, step: int) -> None:
        """Move every carrier by ``strength`` (0 to 1) of the remaining way.

        Args:
            strength: Share of the way.
            step: Optimizer steps done; a run that was resumed rounds as one that was not.
        Raises:
            NonFiniteWeightError: A weight is NaN or Inf; nothing has been moved.
        """
        self._read()
        device = self._applied[0].device
        seed = Stream(self._rounding_key, "rounding", step).below(1 << 32)
        generator = torch.Generator(device).manual_seed(seed)
        self._last = [
            strength * residual(projections, key) for key, projections in zip(self.keys, self._projections, strict=True)
        ]
        for key, shift in zip(self.keys, self._last, strict=True):
            self._backend.move(key, shift, generator)
        if strength >= 1:
            self._backend.settle()
        for done, shift in zip(self._applied, self._last, strict=True):
            done.add_(shift)
        self._projections = [was + shift for was, shift in zip(self._projections, self._last, strict=True)]

    @torch.no_grad()
    def _read(self) -> None:
        self._projections = self._backend.projections_of(self.keys, self._committed)
        # One check for all: each would make a GPU wait.
        if not bool(torch.isfinite(torch.cat([one.flatten() for one in self._projections])).all()):
            broken = next(k for k, p in zip(self.keys, self._projections, strict=True) if not torch.isfinite(p).all())
            raise NonFiniteWeightError(
                f"{broken.carrier.name}: a weight is NaN or Inf",
                hint="training has diverged: lower the learning rate and resume from the last checkpoint",
            )

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
            "wmguard/snap": self.last_change,
        }

    @property
    def weight_change(self) -> float:
        """Norm of the sum of all moves over the norm of the carrying matrices when the scheme was committed."""
        return self._relative(self._applied)

    @property
    def last_change(self) -> float:
        """Norm of the last move, likewise: of the last one before a save, this is the snap."""
        return self._relative(self._last)

    @torch.no_grad()
    def _relative(self, shifts: list[Tensor]) -> float:
        squares = (self._backend.change_norm(key, shift) ** 2 for key, shift in zip(self.keys, shifts, strict=True))
        return math.sqrt(sum(squares)) / self._norm

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
