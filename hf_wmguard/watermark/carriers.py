"""Which weights carry the signature: one tile of rows of each matrix of the repeated blocks.

A carrier is a range of whole rows, so that in a safetensors file it is one run of bytes. Only the matrices of
numbered blocks carry (``encoder.layer.0...``, ``model.layers.7...``, ``transformer.h.3...``): embeddings, heads,
poolers, norms and biases are what a thief replaces first, and are few and sensitive besides.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from hf_wmguard.canonical import require_object
from hf_wmguard.errors import CapacityError, FormatError

MAX_PROJECTIONS = 4096
"""About as many give no attack in DESIGN a chance; beyond it the budget is left unspent."""
MIN_SIDE = 16
"""A matrix narrower than this carries nothing."""
MAX_ROWS = 1 << 31

_BLOCK = re.compile(r"(^|\.)\d+\.")
_NOT_A_CARRIER = re.compile(
    r"embed|norm|bias|router|\.gate\.|lm_head|score|classifier|pooler|relative_attention", re.IGNORECASE
)
# The expected change leaves this much of the budget to chance: n uniform shifts have a norm with a relative
# standard deviation of 0.45 / sqrt(n), 1.4% at the fewest projections that hold a payload.
_MARGIN = 0.95
# What a CapacityError may advise: the range that `SignatureConfig` takes.
_BUDGETS = tuple(thousandths / 1000 for thousandths in range(1, 201))
_RESTORE = "a record like this was never written: restore the registry from a backup"
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "shape": (list,),
    "row_start": (int,),
    "rows": (int,),
    "side": (int,),
    "step": (float,),
    "rms": (float,),
}


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
                f"carrier {self.name!r} is impossible: {self.shape}, {self.row_start}, {self.rows}, {self.side}",
                hint=_RESTORE,
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
        checked = require_object(value, _FIELDS, "carrier")
        shape = checked["shape"]
        if len(shape) != 2 or any(type(size) is not int for size in shape):
            raise FormatError("carrier: shape is not two integers", hint=_RESTORE)
        return cls(**{**checked, "shape": (shape[0], shape[1])})


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
    """Return the carriers that spend the budget evenly over all matrices: the same relative change in each.

    Args:
        shapes: Rows and columns of each matrix that may carry.
        rms: Root mean square of each.
        budget: Norm of the change over the norm of the carrying matrices.
        step: D in units of the rms.
        min_projections: Code bits that the payload needs at least.
    Raises:
        CapacityError: Too few projections at this budget; the hint says which budget would do.
    """
    if not shapes:
        raise CapacityError(
            "the model has no matrix that can carry a signature (expected 2-D weights in numbered blocks)",
            hint="pass signature=None to mark with triggers only",
        )
    sides = _sides(shapes, budget=budget, step=step)
    total = sum(side**2 for side in sides.values())
    if total < min_projections:
        raise CapacityError(
            f"too few carriers: {len(shapes)} matrices give {total} projections at budget {budget:g}, "
            f"the payload needs {min_projections}",
            hint=_advice(shapes, step=step, min_projections=min_projections),
        )
    return tuple(
        Carrier(
            name=name,
            shape=shapes[name],
            row_start=0,
            rows=shapes[name][0],
            side=side,
            step=step * rms[name],
            rms=rms[name],
        )
        for name, side in sorted(sides.items())
        if side
    )


def _sides(shapes: Mapping[str, tuple[int, int]], *, budget: float, step: float) -> dict[str, int]:
    """Return m for each matrix, 0 where not even one projection is within the budget; it grows with the budget."""
    weights = sum(rows * columns for rows, columns in shapes.values())
    return {
        name: _side(
            rows,
            columns,
            relative=_MARGIN * budget / step,
            # Its share of `MAX_PROJECTIONS`, rounded up: of thousands of matrices each gets one and not none.
            most=math.ceil(math.sqrt(MAX_PROJECTIONS * rows * columns / weights)),
        )
        for name, (rows, columns) in shapes.items()
    }


def _side(rows: int, columns: int, *, relative: float, most: int) -> int:
    """Return the largest m whose expected change is ``relative`` steps of the matrix's norm or less.

    Putting a projection on its lattice moves it by a uniform amount in [-D/2, D/2]. Were the directions
    orthogonal, m x m of them would change the matrix by m D / sqrt(12) out of sqrt(rows columns) rms. The m sign
    columns of A overlap by chance, and trace((A^T A)^-1) is m / (1 - m / rows) in expectation; likewise for B.

    Source: mean of the inverse Wishart distribution (Mardia, Kent & Bibby 1979, sec. 3.8).
    Deviation: columns of signs, whose overlaps have the same variance as those of Gaussian columns.
    """
    limit = min(rows // 8, columns // 8, most)
    return sum(m <= relative * math.sqrt(12 * (rows - m) * (columns - m)) for m in range(1, limit + 1))


def _advice(shapes: Mapping[str, tuple[int, int]], *, step: float, min_projections: int) -> str:
    def total(budget: float) -> int:
        return sum(side**2 for side in _sides(shapes, budget=budget, step=step).values())

    index = bisect_left(_BUDGETS, min_projections, key=total)
    if index == len(_BUDGETS):
        return "lower the step, or pass signature=None to mark with triggers only"
    return f"raise the budget to {_BUDGETS[index]:g}, lower the step, or pass signature=None"
