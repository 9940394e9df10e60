"""The weight signature inside a DoRA adapter: the matrix that is read is M = D (W0 + s B A), D = diag(m / norms).

DoRA rescales every row of V = W0 + s B A to the length m. A change of B alone would therefore turn a row and leave its
length, and what the key's directions see of it would not be what was asked for. Moved together with its length,
m' = D norm(V'), a row keeps its factor D, and M changes by D s dB A: the same geometry as without DoRA, exactly.

Source: Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation", eq. (5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rescaled:
    """Some rows of a matrix under a DoRA adapter.

    Args:
        directions: V, float32 [rows, columns].
        factors: D, float32 [rows, 1].
    """

    directions: Tensor
    factors: Tensor

    @classmethod
    def of(cls, base: Tensor, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor) -> Rescaled:
        """Return the rows.

        Args:
            base: Rows of W0, any float dtype [rows, columns].
            down: A, any float dtype [rank, columns].
            up: The same rows of B, any float dtype [rows, rank].
            scaling: s.
            magnitude: The same rows of m, any float dtype [rows].
        """
        base = base.detach().float()
        directions = base + scaling * (up.detach().to(base) @ down.detach().to(base))
        norms = directions.norm(dim=1, keepdim=True)
        return cls(directions=directions, factors=magnitude.detach().to(base)[:, None] / norms)

    @property
    def weights(self) -> Tensor:
        """M, float32 [rows, columns]."""
        return self.factors * self.directions

    def change(self, change: Tensor) -> Tensor:
        """Return the change of B that changes M as a plain adapter's ``change`` would change its matrix.

        A row that DoRA has shrunk to nothing cannot be moved; it is left alone.

        Args:
            change: float32 [rows, rank].
        """
        return torch.where(self.factors.abs() > 1e-6, change / self.factors, torch.zeros_like(change))

    def magnitude(self, directions: Tensor) -> Tensor:
        """Return m of the same factors for rows that were moved, float32 [rows].

        Args:
            directions: V after the move, float32 [rows, columns].
        """
        lengths: Tensor = self.factors[:, 0] * directions.norm(dim=1)
        return lengths
