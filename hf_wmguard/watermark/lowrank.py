"""The weight signature inside a low-rank adapter: the matrix that is read is W0 + s B A, and only B moves.

Along a direction a b^T the adapter adds s (B^T a)^T (A b). The change of W that a change of B makes is s dB A, in the
row space of A. A mark that left it would be stripped by one truncated SVD; one inside it survives being merged and
being taken out again. The key's right directions therefore lie in the row space that A has at the commitment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.errors import CapacityError
from hf_wmguard.watermark.signature import CarrierKey

_LARGEST = 127
# Squared cosine between the mark's directions and the adapter's row space below which they count as lost: moving a
# projection there would change the weights ten times as much.
_LOST = 0.01


def row_space(down: Tensor) -> bytes:
    """Return an orthonormal basis of an adapter's row space, as `Carrier.basis` holds it.

    Args:
        down: The adapter's matrix A, any float dtype [rank, columns].
    Returns:
        int8 [columns, rank] in row-major order, in units of 1/127 of the largest entry.
    Raises:
        CapacityError: The rows of A are not linearly independent.
    """
    basis, triangle = torch.linalg.qr(down.detach().double().cpu().T)
    sizes = triangle.diagonal().abs()
    if down.shape[0] > down.shape[1] or not bool(sizes.min() > 1e-6 * sizes.max()):
        raise CapacityError(
            f"lora_A [{down.shape[0]}, {down.shape[1]}] has linearly dependent rows",
            hint="initialise the adapter with its default weights, or lower r",
        )
    data: bytes = torch.round(basis * (_LARGEST / basis.abs().max())).to(torch.int8).numpy().tobytes()
    return data


def adapter_projections(down: Tensor, up: Tensor, scaling: float, key: CarrierKey) -> Tensor:
    """Return what an adapter adds to the projections of the matrix it adapts, float64 [l, r].

    Args:
        down: A, any float dtype [rank, columns].
        up: The tile's rows of B, any float dtype [rows, rank].
        scaling: s.
        key: The carrier key.
    """
    device = key.dither.device
    left = key.left.T @ up.detach().to(device=device, dtype=torch.float32)
    right = down.detach().to(device=device, dtype=torch.float32) @ key.right
    return scaling * (left.double() @ right.double())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reach:
    """How an adapter reaches the projections of one carrier, as its A is now.

    Args:
        inverse: H [r, rank], float64, with H A B = 1: the change A' X H of s B moves the projections by X, and changes
            the weights no more than any other change of B that does so.
        gram: (H A) (H A)^T, float64 [r, r].
        lost: Number of right directions that have left the row space of A and are not moved.
    """

    inverse: Tensor
    gram: Tensor
    lost: int

    @classmethod
    def of(cls, down: Tensor, key: CarrierKey) -> Reach:
        """Return the reach of A, any float dtype [rank, columns].

        With M = A A^T and G = A B: H = (G^T M^-1 G)^-1 G^T M^-1, the weighted least-squares inverse of G; the matrix
        in brackets holds the squared cosines between the directions and the row space of A.
        """
        wide = down.detach().to(key.dither.device).double()
        reached = wide @ key.right.double()
        weighted = torch.linalg.pinv(wide @ wide.T, hermitian=True) @ reached
        cosines = reached.T @ weighted
        gram = torch.linalg.pinv(cosines, hermitian=True, atol=_LOST, rtol=0.0)
        lost = int((torch.linalg.eigvalsh(cosines) <= _LOST).sum())
        return cls(inverse=gram @ weighted.T, gram=gram, lost=lost)

    def change(self, key: CarrierKey, shift: Tensor, scaling: float) -> Tensor:
        """Return the change of the tile's rows of B that moves its projections by ``shift``, float32 [rows, rank].

        Args:
            key: The carrier key.
            shift: float64 [l, r], in units of the weights.
            scaling: s.
        """
        return key.left @ (key.left_gram_inverse @ shift.double() @ self.inverse / scaling).float()

    def change_norm(self, key: CarrierKey, shift: Tensor) -> float:
        """Return the Frobenius norm of the change of the weights that `change` makes."""
        moved = key.left_gram_inverse @ shift.double() @ self.gram
        return math.sqrt(max(0.0, float(torch.sum(moved * shift))))
