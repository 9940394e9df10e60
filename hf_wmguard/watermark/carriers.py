"""Which weights carry the signature: one tile of rows of each matrix of the repeated blocks.

A carrier is a range of whole rows, so that in a safetensors file it is one run of bytes. Only the matrices of
numbered blocks carry (``encoder.layer.0...``, ``model.layers.7...``, ``transformer.h.3...``): embeddings, heads,
poolers, norms and biases are what a thief replaces first, and are few and sensitive besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_wmguard.errors import CapacityError, FormatError

MAX_PROJECTIONS = 4096
"""More than this gives no attack in DESIGN a chance; beyond it the budget is left unspent."""
MIN_SIDE = 16
"""A matrix narrower than this carries nothing."""
MAX_ROWS = 1 << 31

_BLOCK = re.compile(r"(^|\.)\d+\.")
_NOT_A_CARRIER = re.compile(r"embed|norm|bias|router|lm_head|score|classifier|pooler|relative_attention", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """One tile of one matrix, and how finely it is read.

    Args:
        name: Name of the parameter.
        shape: Rows and columns of the whole matrix.
        row_start: First row of the tile.
        rows: Number of rows of the tile.
        side: m; the tile is read by m x m projections.
        step: Quantisation step D, in units of the weights.
        rms: Root mean square of the tile when the scheme was committed.
    """

    name: str
    shape: tuple[int, int]
    row_start: int
    rows: int
    side: int
    step: float
    rms: float

    def __post_init__(self) -> None:
        whole = self.row_start >= 0 and self.rows >= 1 and self.row_start + self.rows <= self.shape[0] <= MAX_ROWS
        fine = 1 <= self.side <= min(self.rows, self.shape[1]) and self.side**2 <= MAX_PROJECTIONS
        if not (whole and fine and 0 < self.step < math.inf and 0 < self.rms < math.inf):
            raise FormatError(
                f"carrier {self.name!r} is impossible: {self.shape}, {self.row_start}, {self.rows}, {self.side}"
            )

    @property
    def projections(self) -> int:
        """Number of projections, and so of code bits, of this carrier."""
        return self.side**2

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the carrier in a plain dictionary.

        Raises:
            FormatError: A field is missing, unknown or impossible.
        """
        try:
            rows, columns = value["shape"]
            return cls(**{**value, "shape": (int(rows), int(columns))})
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"carrier record is malformed: {error}") from None


def is_carrier(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter of this name and shape may carry the signature."""
    return len(shape) == 2 and min(shape) >= MIN_SIDE and bool(_BLOCK.search(name)) and not _NOT_A_CARRIER.search(name)


def select_carriers(
    shapes: Mapping[str, tuple[int, int]],
    rms: Mapping[str, float],
    *,
    budget: float,
    step: float,
    min_projections: int,
) -> tuple[Carrier, ...]:
    """Return the carriers that spend the budget evenly over all matrices.

    A projection along a unit-norm direction is moved by a uniform amount in [-D/2, D/2], so that a carrier of N
    weights and rms r, read by m x m projections at D = step * r, changes by m^2 D^2 / 12 out of N r^2. With the
    same relative change everywhere, m = sqrt(12 N) * budget / step. The directions are nearly, not exactly,
    orthogonal; ``_OVERLAP`` keeps the true change within the budget.

    Args:
        shapes: Rows and columns of each matrix that may carry.
        rms: Root mean square of each.
        budget: Norm of the change over the norm of the carrying matrices.
        step: D in units of the rms.
        min_projections: Code bits that the payload needs at least.
    Raises:
        CapacityError: Too few projections at this budget; the message says which budget would do.
    """
    weights = sum(rows * columns for rows, columns in shapes.values())
    if not weights:
        raise CapacityError(
            "the model has no matrix that can carry a signature (expected 2-D weights in numbered blocks)",
            hint="pass signature=None to mark with triggers only",
        )
    affordable = min(budget * _OVERLAP, math.sqrt(MAX_PROJECTIONS * step**2 / (12 * weights)))
    carriers = []
    for name, (rows, columns) in sorted(shapes.items()):
        side = int(math.sqrt(12 * rows * columns) * affordable / step)
        # Beyond an eighth of the tile the directions are far from orthogonal, and the change larger than planned.
        side = min(side, rows // 8, columns // 8, math.isqrt(MAX_PROJECTIONS))
        if side >= 1:
            carriers.append(
                Carrier(
                    name=name,
                    shape=(rows, columns),
                    row_start=0,
                    rows=rows,
                    side=side,
                    step=step * rms[name],
                    rms=rms[name],
                )
            )
    total = sum(carrier.projections for carrier in carriers)
    if total < min_projections:
        needed = step * math.sqrt(min_projections / (12 * weights)) / _OVERLAP
        raise CapacityError(
            f"too few carriers: {weights:,} weights give {total} projections at budget {budget:g}, "
            f"the payload needs {min_projections}",
            hint=f"raise the budget to about {1.3 * needed:.2g}, lower the step, or pass signature=None",
        )
    return tuple(carriers)


_OVERLAP = 0.95
