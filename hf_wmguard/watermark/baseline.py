"""What a carrier's tile was like before it was marked.

All of it is measured at the commitment, before the first step, and so knows nothing of dithers or code bits: whatever
is done to a suspect on the strength of a baseline (finding the tile under another name, undoing a scaling, aligning
with an original) cannot push an innocent suspect towards the mark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from hf_wmguard.canonical import decode_base64, encode_base64, require_object
from hf_wmguard.errors import FormatError
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections

_FIELDS: dict[str, tuple[type, ...]] = {"projections": (str,), "row_norms": (str,), "column_norms": (str,)}
_ROUNDS = 3
_VANISHED = -10.0


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Baseline:
    """The measurements of one tile.

    Args:
        projections: Its projections in units of the rms, float32 [l, r].
        row_norms: Root mean square of each row in units of the rms, float16 [rows].
        column_norms: Likewise of each column, float16 [columns].
    """

    projections: bytes
    row_norms: bytes
    column_norms: bytes

    @classmethod
    def measure(cls, tile: Tensor, key: CarrierKey) -> Self:
        """Return the baseline of a tile, any float dtype [rows, columns]; errors as `read_projections`."""
        rms, (rows, columns) = key.carrier.rms, _both_rms(tile)
        return cls(
            projections=_pack((read_projections(tile, key) / rms).float()),
            row_norms=_pack((rows / rms).half()),
            column_norms=_pack((columns / rms).half()),
        )

    def fits(self, carrier: Carrier) -> bool:
        """Return whether the sizes are those of a carrier."""
        sizes = (4 * carrier.projections, 2 * carrier.rows, 2 * carrier.shape[1])
        return (len(self.projections), len(self.row_norms), len(self.column_norms)) == sizes

    def projections_of(self, key: CarrierKey) -> Tensor:
        """Return the projections before marking, in units of the weights, float64 [l, r]."""
        relative = _unpack(self.projections, torch.float32).double().reshape(key.carrier.sides)
        return (relative * key.carrier.rms).to(key.dither.device)

    def likeness(self, projections: Tensor, key: CarrierKey) -> float:
        """Return the correlation of projections with the baseline's, -1 to 1: near 1 only for the same tile.

        It looks along secret directions but at no dither, so that choosing by it is no further test.
        """
        pair = torch.stack([projections.flatten(), self.projections_of(key).flatten()])
        norms = torch.linalg.vector_norm(pair, dim=1)
        return float((pair[0] @ pair[1]) / (norms[0] * norms[1]).clamp_min(1e-300))

    def unmerge(self, projections: Tensor, key: CarrierKey, weight: float) -> Tensor:
        """Return what was merged with the baseline, float64 [l, r]: B + (P - B) / w.

        A merge draws the whole fine-tuning back, not the mark's own small shift alone, and so off the lattice.

        Args:
            projections: Those of a suspect, in units of the weights, float64 [l, r].
            key: The carrier key.
            weight: Share of the suspect that is the owner's, 0 to 1.
        """
        before = self.projections_of(key)
        return before + (projections - before) / weight

    def stretch(self, tile: Tensor, carrier: Carrier) -> tuple[float, bool]:
        """Return by how much a tile was scaled, and whether it is still in proportion to its steps.

        The first is the root mean square of the log ratios of row norms or of column norms, the larger one. The second
        says whether the tile's norm is within a factor of 4 of what it was: beside steps far larger than the weights
        the phases would depend on the dithers alone, whatever the suspect is.
        """
        rows, columns = _both_rms(tile)
        ratios = [
            # A row that vanished, beside one that had a norm, is scaled too.
            torch.log(found / carrier.rms / norms).nan_to_num(0.0, 0.0, _VANISHED)
            for found, norms in ((rows, self._norms(self.row_norms)), (columns, self._norms(self.column_norms)))
        ]
        whole = float(_rms(rows, 0)) / carrier.rms
        return max(float(_rms(ratio, 0)) for ratio in ratios), 0.25 <= whole <= 4

    def rescale(self, tile: Tensor, carrier: Carrier) -> Tensor:
        """Return the tile with the row and column norms of the baseline, float32 [rows, columns].

        Undoes any scaling of rows and columns (Sinkhorn's iteration, a few rounds).
        """
        # Whatever the scale was, no square of it may overflow.
        weights = tile.detach().float()
        weights = weights / weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        rows, columns = self._norms(self.row_norms) * carrier.rms, self._norms(self.column_norms) * carrier.rms
        tiny = torch.finfo(torch.float32).tiny
        for _ in range(_ROUNDS):
            weights *= (rows / _rms(weights, 1).clamp_min(tiny))[:, None]
            weights *= columns / _rms(weights, 0).clamp_min(tiny)
        return weights

    def unmark_(self, tile: Tensor, key: CarrierKey) -> None:
        """Set a float32 tile's projections back, in place, to what they were before marking."""
        move_(tile, key, self.projections_of(key) - read_projections(tile, key))

    def _norms(self, data: bytes) -> Tensor:
        return _unpack(data, torch.float16).float()

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        return {name: encode_base64(getattr(self, name)) for name in _FIELDS}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the baseline in a plain dictionary.

        Raises:
            FormatError: A field is missing, unknown or not finite, or a norm is negative.
        """
        checked = require_object(value, _FIELDS, "baseline")
        baseline = cls(**{name: decode_base64(checked[name], f"baseline {name}") for name in _FIELDS})
        norms = (baseline.row_norms, baseline.column_norms)
        for data, dtype, least in (
            (baseline.projections, torch.float32, -math.inf),
            *((n, torch.float16, 0) for n in norms),
        ):
            values = _unpack(data, dtype) if len(data) % dtype.itemsize == 0 else torch.tensor(math.nan)
            if not bool((torch.isfinite(values) & (values >= least)).all()):
                raise FormatError("baseline is damaged", hint="restore the registry from a backup")
        return baseline


def _both_rms(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root mean square of every row and of every column, float32."""
    weights = tile.detach().float()
    # The squares of large or small float32 values leave its range; the largest value is divided out first.
    largest = weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    weights = weights / largest
    return _rms(weights, 1) * largest, _rms(weights, 0) * largest


def _rms(values: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=dim)
    return norms / math.sqrt(values.shape[dim])


def _pack(values: Tensor) -> bytes:
    data: bytes = values.flatten().cpu().numpy().tobytes()
    return data


def _unpack(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
