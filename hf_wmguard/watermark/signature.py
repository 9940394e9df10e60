"""The weight signature: keyed spread-transform dither modulation on rank-1 projections.

Each carrier tile W [o, i] is read along m x m directions a_u b_v^T of unit norm, P = A^T W B. A projection
carries one code bit c by its place on the lattice d + c D/2 + D Z. The dither d is uniform in [0, D) and secret:
for any fixed P, (P - d) mod D is uniform, so that without the key each cos(2 pi (P - d) / D) has the law of
cos(uniform) *whatever the weights are*. That is what makes the p-value exact.

Source: Chen & Wornell 2001, "Quantization index modulation", sec. V (spread-transform dither modulation).
Deviation: directions are rank-1 sign patterns, so that reading costs one thin matrix product; the step differs from
projection to projection, because small steps survive merging and large ones pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hf_wmguard.errors import FormatError, NonFiniteWeightError
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.planner import ERROR_LEVELS, weights_for
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_p_weighted

_MAX_STEPS = 2.0**32


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class CarrierKey:
    """The secret half of one carrier, and what is precomputed from it.

    Kept small, because training holds the keys of all carriers: of directions that are signs the signs alone, and of
    A (A^T A)^-1 the small factor.

    Args:
        carrier: Where it is read, by l x r directions.
        left_signs: Signs of A, int8 [o, l].
        right_kept: Signs of B, int8 [i, r]; of an adapter's carrier B itself, float32.
        step: Quantisation step D of each projection, in units of the weights, float64 [l, r].
        dither: d in [0, D), float64 [l, r].
        bits: Code bits c, float64 [l, r] of 0 and 1.
        left_gram_inverse: (A^T A)^-1, float64 [l, l].
        right_gram_inverse: (B^T B)^-1, float64 [r, r].
    """

    carrier: Carrier
    left_signs: Tensor
    right_kept: Tensor
    step: Tensor
    dither: Tensor
    bits: Tensor
    left_gram_inverse: Tensor
    right_gram_inverse: Tensor

    @classmethod
    def derive(cls, key: bytes, carrier: Carrier, bits: Tensor, steps: Tensor) -> CarrierKey:
        """Return the key of one carrier.

        Args:
            key: 32 bytes, the model's carrier subkey.
            carrier: Where it is read.
            bits: Its code bits, any dtype [l * r].
            steps: Its steps in units of the carrier's rms, float64 [l * r].
        """
        stream = Stream(key, "carrier", carrier.name, carrier.row_start, carrier.rows, *carrier.sides)
        left = stream.signs(carrier.rows, carrier.sides[0]).to(torch.int8)
        right = _right_directions(carrier, stream)
        step = (steps.double() * carrier.rms).reshape(carrier.sides)
        return cls(
            carrier=carrier,
            left_signs=left,
            right_kept=right,
            step=step,
            dither=stream.uniform(carrier.projections).reshape(carrier.sides) * step,
            bits=bits.double().reshape(carrier.sides),
            left_gram_inverse=_gram_inverse(_directions(left)),
            right_gram_inverse=_gram_inverse(_directions(right)),
        )

    def to(self, device: torch.device) -> CarrierKey:
        """Return the same key on another device."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "carrier"}
        return CarrierKey(carrier=self.carrier, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @property
    def left(self) -> Tensor:
        """Unit-norm columns A, float32 [o, l]."""
        return _directions(self.left_signs)

    @property
    def right(self) -> Tensor:
        """Unit-norm columns B, float32 [i, r]."""
        return _directions(self.right_kept)

    def spread(self, shift: Tensor) -> Tensor:
        """Return X, float32 [l, r], such that A X B^T is the smallest change that moves the projections by ``shift``.

        Args:
            shift: float64 [l, r], in units of the weights.
        """
        return (self.left_gram_inverse @ shift.double() @ self.right_gram_inverse).float()


def _directions(kept: Tensor) -> Tensor:
    return kept if kept.is_floating_point() else kept.float() / math.sqrt(kept.shape[0])


def _right_directions(carrier: Carrier, stream: Stream) -> Tensor:
    columns, count = carrier.shape[1], carrier.sides[1]
    if not carrier.basis:
        return stream.signs(columns, count).to(torch.int8)
    # An adapter's change has no component outside its row space: a direction there would cost sqrt(columns / rank)
    # times as much. Inside it, the key turns the basis, so that the directions stay secret.
    basis = torch.frombuffer(bytearray(carrier.basis), dtype=torch.int8).reshape(columns, carrier.rank).double()
    turn = _orthonormal(2 * stream.uniform(carrier.rank**2).reshape(carrier.rank, carrier.rank) - 1)
    directions = _orthonormal(basis) @ turn[:, :count]
    unit: Tensor = directions / torch.linalg.vector_norm(directions, dim=0)
    return unit.float().contiguous()


def _orthonormal(columns: Tensor) -> Tensor:
    # Q is unique only where the diagonal of R is positive: which sign a library takes must not change the mark.
    factors = torch.linalg.qr(columns)
    signs = torch.where(factors.R.diagonal() < 0, -1.0, 1.0).to(columns.dtype)
    unique: Tensor = factors.Q * signs
    return unique


def _gram_inverse(columns: Tensor) -> Tensor:
    # float64: the Gram matrix of a wide tile is well conditioned, but its inverse feeds an exact snap.
    wide = columns.double()
    inverse: Tensor = torch.linalg.inv(wide.T @ wide)
    return inverse


def project(tile: Tensor, key: CarrierKey) -> Tensor:
    """Return A^T W B of a tile of the right shape, unchecked, float64 [l, r]: nothing waits for the device."""
    weights = tile.detach().to(device=key.dither.device, dtype=torch.float32)
    return (key.left.T @ weights @ key.right).double()


def read_projections(tile: Tensor, key: CarrierKey) -> Tensor:
    """Return the projections of one carrier.

    Args:
        tile: Weights, any float dtype [o, i], on any device.
        key: Its carrier key.
    Returns:
        float64 [l, r], in units of the weights, on the key's device.
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
    projections = project(tile, key)
    if not bool(torch.isfinite(projections).all()):
        raise NonFiniteWeightError(
            f"{key.carrier.name}: a weight is NaN or Inf",
            hint="in training: lower the learning rate and resume; in a suspect: the file is damaged",
        )
    # Beyond this a double no longer resolves the dither, and with it the p-value. The rule looks at the weights only.
    if float(projections.abs().max()) > _MAX_STEPS * float(key.step.min()):
        raise FormatError(
            f"{key.carrier.name}: weights are out of all proportion to the record", hint="the file is damaged"
        )
    return projections


def soft_bits(projections: Tensor, key: CarrierKey) -> Tensor:
    """Return cos(2 pi (P - d) / D), float64 [l * r]: +1 reads as code bit 0, -1 as code bit 1."""
    return torch.cos(2 * math.pi * (projections - key.dither) / key.step).flatten()


def residual(projections: Tensor, key: CarrierKey) -> Tensor:
    """Return Q(P) - P, float64 [l, r]: the way to the nearest point of the lattice d + c D/2 + D Z."""
    offset = projections - key.dither - key.bits * (key.step / 2)
    return key.step * torch.round(offset / key.step) - offset


def loss_gradient(projections: Tensor, key: CarrierKey) -> Tensor:
    """Return the gradient of this carrier's sum of (1 - cos(2 pi (P - d - c D/2) / D)) / 2, float64 [l, r]."""
    offset = projections - key.dither - key.bits * (key.step / 2)
    return (math.pi / key.step) * torch.sin(2 * math.pi * offset / key.step)


def move_(tile: Tensor, key: CarrierKey, shift: Tensor) -> None:
    """Change a tile in place so that its projections move by ``shift``, by the smallest change that does so.

    The change is A (A^T A)^-1 shift (B^T B)^-1 B^T: the one that `CarrierKey.spread` is for.

    Args:
        tile: float32 [o, i], contiguous rows.
        key: Its carrier key.
        shift: float64 [l, r], in units of the weights.
    """
    tile.addmm_(key.left @ key.spread(shift), key.right.T)


def change_norm(key: CarrierKey, shift: Tensor) -> float:
    """Return the Frobenius norm of the change that `move_` makes for ``shift``, without forming it.

    |A X B^T|^2 = trace(X^T (A^T A) X (B^T B)), and with X = (A^T A)^-1 shift (B^T B)^-1 the Gram matrices cancel.
    """
    moved = key.left_gram_inverse @ shift.double() @ key.right_gram_inverse
    return math.sqrt(max(0.0, float(torch.sum(moved * shift))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reading proves.

    Args:
        log10_p: Proven upper bound of log10 of the smallest p-value that any weighting gave, before correction.
        tests: Number of weightings that were tried.
        weights: The weight of each projection that gave it, float64 [n].
    """

    log10_p: float
    tests: int
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read along the key's directions.

    Args:
        soft: cos(2 pi (P - d) / D) for every projection of the scheme, float64 [n]; 0 where nothing could be read.
        bits: The code bits, float64 [n].
        steps: D in units of each tile's rms, float64 [n].
        carriers_read: Carriers found.
        carriers_missing: Carriers not found, of another shape, or with weights that are not finite.
    """

    soft: Tensor
    bits: Tensor
    steps: Tensor
    carriers_read: int
    carriers_missing: int

    @classmethod
    def of(cls, keys: Sequence[CarrierKey], projections: Sequence[Tensor | None]) -> Self:
        """Return what projections say along the keys.

        Args:
            keys: All carriers of the scheme, in order.
            projections: Those of each carrier, float64 [l, r], or None where they cannot be read.
        """
        soft = [
            torch.zeros(key.carrier.projections, dtype=torch.float64) if read is None else soft_bits(read, key).cpu()
            for key, read in zip(keys, projections, strict=True)
        ]
        missing = sum(read is None for read in projections)
        return cls(
            soft=torch.cat(soft),
            bits=torch.cat([key.bits.flatten().cpu() for key in keys]),
            # Rounded, because steps that were equal must be so again after a multiplication and a division.
            steps=torch.cat([(key.step / key.carrier.rms).flatten().cpu() for key in keys]).round(decimals=9),
            carriers_read=len(keys) - missing,
            carriers_missing=missing,
        )

    @property
    def projections(self) -> int:
        """Number of projections that were read."""
        return int(torch.count_nonzero(self.soft))

    @property
    def statistic(self) -> float:
        """Sum over the projections of (-1)^c cos(2 pi (P - d) / D)."""
        return float(self._cosines().sum())

    @property
    def correlation(self) -> float:
        """Mean of (-1)^c cos(2 pi (P - d) / D); about 0 without the mark, 1 right after embedding."""
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

    def score(self) -> Score:
        """Return the best p-value of several weightings, each made for another size of error.

        Strong noise leaves only the large steps readable, and the others would drown them; after a merge all count
        alike. The weightings are fixed before anything is read, and each is a test.
        """
        cosines, read = self._cosines(), self.soft != 0
        steps = torch.unique(self.steps)
        # With a single step all weightings are the same test.
        levels = ERROR_LEVELS if len(steps) > 1 else ERROR_LEVELS[:1]
        members = self.steps[:, None] == steps
        counts = (members & read[:, None]).sum(0).tolist()
        sums = (members * cosines[:, None]).sum(0)

        def log10_p(error: float) -> float:
            weights = weights_for(error, steps)
            return log10_p_weighted(float(weights @ sums), weights.tolist(), counts)

        best = min(levels, key=log10_p)
        return Score(log10_p=log10_p(best), tests=len(levels), weights=weights_for(best, self.steps))

    @property
    def log10_p(self) -> float:
        """Proven upper bound of log10 of the p-value under "made without this key", for all weightings tried."""
        score = self.score()
        return log10_bonferroni(score.log10_p, score.tests)

    def _cosines(self) -> Tensor:
        return (1 - 2 * self.bits) * self.soft


def read_signature(keys: Iterable[CarrierKey], tile_of: Callable[[Carrier], Tensor | None]) -> Reading:
    """Return what the tiles say along the keys; one tile at a time is in memory.

    Args:
        keys: All carriers of the scheme, in order.
        tile_of: Gives a carrier's tile, any float dtype [o, i], or None where there is none.
    """
    keys = tuple(keys)
    return Reading.of(keys, [try_projections(tile_of(key.carrier), key) for key in keys])


def try_projections(tile: Tensor | None, key: CarrierKey) -> Tensor | None:
    """Return what `read_projections` does, or None where there is no tile or it cannot be read."""
    if tile is None:
        return None
    try:
        return read_projections(tile, key)
    except (FormatError, NonFiniteWeightError):
        return None
