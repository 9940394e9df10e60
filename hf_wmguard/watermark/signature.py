"""The weight signature: keyed spread-transform dither modulation on rank-1 projections.

Each carrier tile W [o, i] is read along m x m directions a_u b_v^T of unit norm, P = A^T W B. A projection
carries one code bit c by its place on the lattice d + c D/2 + D Z. The dither d is uniform in [0, D) and secret:
for any fixed P, (P - d) mod D is uniform, so that without the key each cos(2 pi (P - d) / D) has the law of
cos(uniform) *whatever the weights are*. That is what makes the p-value exact.

Source: Chen & Wornell 2001, "Quantization index modulation", sec. V (spread-transform dither modulation).
Deviation: directions are rank-1 sign patterns, so that reading costs one thin matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.errors import FormatError, NonFiniteWeightError
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import log10_p_correlation

_MAX_STEPS = 2.0**32


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class CarrierKey:
    """The secret half of one carrier, and what is precomputed from it.

    Args:
        carrier: Where it is read.
        left: Unit-norm sign columns A, float32 [o, m].
        right: Unit-norm sign columns B, float32 [i, m].
        dither: d in [0, D), float64 [m, m].
        bits: Code bits c, float64 [m, m] of 0 and 1.
        left_inverse: A (A^T A)^-1, float32 [o, m].
        right_inverse: B (B^T B)^-1, float32 [i, m].
    """

    carrier: Carrier
    left: Tensor
    right: Tensor
    dither: Tensor
    bits: Tensor
    left_inverse: Tensor
    right_inverse: Tensor

    @classmethod
    def derive(cls, key: bytes, carrier: Carrier, bits: Tensor) -> CarrierKey:
        """Return the key of one carrier.

        Args:
            key: 32 bytes, the model's carrier subkey.
            carrier: Where it is read.
            bits: Its code bits, any dtype [m * m].
        """
        side = carrier.side
        stream = Stream(key, "carrier", carrier.name, carrier.row_start, carrier.rows, side)
        left = stream.signs(carrier.rows, side) / math.sqrt(carrier.rows)
        right = stream.signs(carrier.shape[1], side) / math.sqrt(carrier.shape[1])
        return cls(
            carrier=carrier,
            left=left,
            right=right,
            dither=(stream.uniform(side**2) * carrier.step).reshape(side, side),
            bits=bits.double().reshape(side, side),
            left_inverse=_right_factor(left),
            right_inverse=_right_factor(right),
        )

    def to(self, device: torch.device) -> CarrierKey:
        """Return the same key on another device."""
        names = ("left", "right", "dither", "bits", "left_inverse", "right_inverse")
        return CarrierKey(carrier=self.carrier, **{name: getattr(self, name).to(device) for name in names})


def _right_factor(columns: Tensor) -> Tensor:
    # float64: the Gram matrix of a wide tile is well conditioned, but its inverse feeds an exact snap.
    wide = columns.double()
    factor: Tensor = torch.linalg.solve(wide.T @ wide, wide.T).T
    return factor.float().contiguous()


def read_projections(tile: Tensor, key: CarrierKey) -> Tensor:
    """Return the projections of one carrier.

    Args:
        tile: Weights, any float dtype [o, i], on any device.
        key: Its carrier key.
    Returns:
        float64 [m, m], in units of the weights, on the key's device.
    Raises:
        FormatError: The tile has another shape, or projections more than 2^32 steps from zero.
        NonFiniteWeightError: A weight in it is NaN or Inf.
    """
    expected = (key.carrier.rows, key.carrier.shape[1])
    if tuple(tile.shape) != expected:
        raise FormatError(
            f"{key.carrier.name}: tile is {tuple(tile.shape)}, expected {expected}",
            hint="the model's shapes have changed",
        )
    weights = tile.detach().to(device=key.left.device, dtype=torch.float32)
    projections = (key.left.T @ weights @ key.right).double()
    if not bool(torch.isfinite(projections).all()):
        raise NonFiniteWeightError(
            f"{key.carrier.name}: a weight is NaN or Inf",
            hint="in training: lower the learning rate and resume; in a suspect: the file is damaged",
        )
    # Beyond this a double no longer resolves the dither, and with it the p-value. The rule looks at the weights only.
    if float(projections.abs().max()) > _MAX_STEPS * key.carrier.step:
        raise FormatError(
            f"{key.carrier.name}: weights are out of all proportion to the record", hint="the file is damaged"
        )
    return projections


def soft_bits(projections: Tensor, key: CarrierKey) -> Tensor:
    """Return cos(2 pi (P - d) / D), float64 [m * m]: +1 reads as code bit 0, -1 as code bit 1."""
    return torch.cos(2 * math.pi * (projections - key.dither) / key.carrier.step).flatten()


def residual(projections: Tensor, key: CarrierKey) -> Tensor:
    """Return Q(P) - P, float64 [m, m]: the way to the nearest point of the lattice d + c D/2 + D Z."""
    step = key.carrier.step
    offset = projections - key.dither - key.bits * (step / 2)
    return step * torch.round(offset / step) - offset


def move_(tile: Tensor, key: CarrierKey, shift: Tensor) -> None:
    """Change a tile in place so that its projections move by ``shift``, by the smallest change that does so.

    The change is A (A^T A)^-1 shift (B^T B)^-1 B^T.

    Args:
        tile: float32 [o, i], contiguous rows.
        key: Its carrier key.
        shift: float64 [m, m], in units of the weights.
    """
    tile.addmm_(key.left_inverse @ shift.to(tile.dtype), key.right_inverse.T)


def change_norm(key: CarrierKey, shift: Tensor) -> float:
    """Return the Frobenius norm of the change that `move_` makes for ``shift``, without forming it.

    |A' X B'^T|^2 = trace(X^T (A'^T A') X (B'^T B')) with A' = A (A^T A)^-1 and B' likewise.
    """
    left = (key.left_inverse.T @ key.left_inverse).double()
    right = (key.right_inverse.T @ key.right_inverse).double()
    return math.sqrt(max(0.0, float(torch.sum((left @ shift @ right) * shift))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read along the key's directions.

    Args:
        soft: cos(2 pi (P - d) / D) for every projection of the scheme, float64 [n]; 0 where nothing could be read.
        bits: The code bits, float64 [n].
        carriers_read: Carriers found.
        carriers_missing: Carriers not found, of another shape, or with weights that are not finite.
    """

    soft: Tensor
    bits: Tensor
    carriers_read: int
    carriers_missing: int

    @property
    def projections(self) -> int:
        """Number of projections that were read."""
        return int(torch.count_nonzero(self.soft))

    @property
    def statistic(self) -> float:
        """Sum over the projections of (-1)^c cos(2 pi (P - d) / D)."""
        return float(torch.sum((1 - 2 * self.bits) * self.soft))

    @property
    def correlation(self) -> float:
        """The statistic over its largest possible value; about 0 without the mark, 1 right after embedding."""
        return self.statistic / max(1, self.projections)

    @property
    def bit_error_rate(self) -> float:
        """Share of the read code bits that are wrong, 0 to 1; 0.5 where nothing was read."""
        read = self.soft != 0
        wrong = (self.soft < 0) != (self.bits > 0.5)
        count = int(read.sum())
        return float((wrong & read).sum()) / count if count else 0.5

    @property
    def loss(self) -> float:
        """The signature loss, mean(1 - cos(2 pi (P - d - c D/2) / D)) / 2; 0 when all are on the lattice."""
        return (1 - self.correlation) / 2

    @property
    def log10_p(self) -> float:
        """Proven upper bound of log10 of the p-value under "made without this key"."""
        return log10_p_correlation(self.statistic, self.projections)


def read_signature(keys: Iterable[CarrierKey], tile_of: Callable[[Carrier], Tensor | None]) -> Reading:
    """Return what the tiles say along the keys; one tile at a time is in memory.

    Args:
        keys: All carriers of the scheme, in order.
        tile_of: Gives a carrier's tile, any float dtype [o, i], or None where there is none.
    """
    soft, bits, read, missing = [], [], 0, 0
    for key in keys:
        tile = tile_of(key.carrier)
        bits.append(key.bits.flatten().cpu())
        try:
            values = None if tile is None else soft_bits(read_projections(tile, key), key).cpu()
        except (FormatError, NonFiniteWeightError):
            values = None
        if values is None:
            missing += 1
            values = torch.zeros(key.carrier.projections, dtype=torch.float64)
        else:
            read += 1
        soft.append(values)
    return Reading(soft=torch.cat(soft), bits=torch.cat(bits), carriers_read=read, carriers_missing=missing)
