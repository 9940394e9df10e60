"""Which weights carry the signature: a keyed tile of rows of matrices of the repeated blocks.

A carrier is a range of whole rows, so that in a safetensors file it is one run of bytes. Only the matrices of
numbered blocks carry (``encoder.layer.0...``, ``model.layers.7...``, ``transformer.h.3...``): embeddings, heads,
poolers, norms and biases are what a thief replaces first, and are few and sensitive besides. In a large model the key
chooses which matrices carry and which of their rows, so that reading them touches about 1% of the bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from hf_wmguard.canonical import decode_base64, encode_base64, require_object
from hf_wmguard.errors import CapacityError, FormatError
from hf_wmguard.watermark.planner import MAX_PROJECTIONS, Mix, choose_mix
from hf_wmguard.watermark.prf import Stream

MIN_SIDE = 16
"""A matrix narrower than this carries nothing."""
MAX_CARRIERS = 128
"""Beyond it the key chooses which matrices carry: more would make the private record larger and no verdict stronger."""
MAX_ROWS = 1 << 31
# The smallest normal float32: with less, a step could vanish.
_MIN_RMS = 2.0**-126
TILE_WEIGHTS = 32 << 20
"""Models with fewer weights in their blocks are read whole; of larger ones this many, or 1% where that is more."""
_TILE_SHARE = 0.01
_MIN_TILE_ROWS = 64

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
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
    "sides": (list,),
    "rms": (float,),
    "basis": (str,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """One tile of one matrix, and by how many directions it is read.

    Args:
        name: Name of the parameter; of a low-rank adapter the name of the matrix that it adapts.
        shape: Rows and columns of the whole matrix.
        row_start: First row of the tile.
        rows: Number of rows of the tile.
        sides: Left and right directions; their product is the number of projections.
        rms: Root mean square of the tile when the scheme was committed, in units of the weights.
        basis: Of a low-rank adapter: its row space, orthonormal up to rounding, int8 [columns, rank] in row-major
            order, in units of 1/127 of its largest entry. Empty otherwise.
    """

    name: str
    shape: tuple[int, int]
    row_start: int
    rows: int
    sides: tuple[int, int]
    rms: float
    basis: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        left, right = self.sides
        whole = self.row_start >= 0 and self.rows >= 1 and self.row_start + self.rows <= self.shape[0] <= MAX_ROWS
        widest = min(self.shape[1], self.rank) if self.basis else self.shape[1]
        fine = 1 <= left <= self.rows and 1 <= right <= widest and left * right <= MAX_PROJECTIONS
        if not (whole and fine and _MIN_RMS <= self.rms < math.inf and len(self.basis) == self.rank * self.shape[1]):
            raise FormatError(
                f"carrier {self.name!r} is impossible: {self.shape}, {self.row_start}, {self.rows}, {self.sides}",
                hint=_RESTORE,
            )

    @property
    def projections(self) -> int:
        """Number of projections, and so of code bits, of this carrier."""
        return self.sides[0] * self.sides[1]

    @property
    def rank(self) -> int:
        """Rank of the adapter that carries, 0 for a whole matrix."""
        return len(self.basis) // max(1, self.shape[1])

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "row_start": self.row_start,
            "rows": self.rows,
            "sides": list(self.sides),
            "rms": self.rms,
            "basis": encode_base64(self.basis),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the carrier in a plain dictionary.

        Raises:
            FormatError: A field is missing, unknown or impossible.
        """
        checked = require_object(value, _FIELDS, "carrier")
        pairs = {}
        for name in ("shape", "sides"):
            pair = checked[name]
            if len(pair) != 2 or any(type(size) is not int for size in pair):
                raise FormatError(f"carrier: {name} is not two integers", hint=_RESTORE)
            pairs[name] = (pair[0], pair[1])
        return cls(**{**checked, **pairs, "basis": decode_base64(checked["basis"], "carrier basis")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A range of rows that may carry.

    Args:
        name: Name of the parameter.
        shape: Rows and columns of the whole matrix.
        row_start: First row.
        rows: Number of rows.
    """

    name: str
    shape: tuple[int, int]
    row_start: int
    rows: int

    @property
    def weights(self) -> int:
        """Number of weights of the whole matrix."""
        return self.shape[0] * self.shape[1]


def is_carrier(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter of this name and shape may carry the signature."""
    return len(shape) == 2 and min(shape) >= MIN_SIDE and bool(_BLOCK.search(name)) and not _NOT_A_CARRIER.search(name)


def choose_tiles(shapes: Mapping[str, tuple[int, int]], stream: Stream) -> tuple[Tile, ...]:
    """Return the tiles that may carry, in the order of their names: spread over the blocks, chosen by the key.

    Args:
        shapes: Rows and columns of each matrix that may carry.
        stream: A keyed stream that is used for nothing else.
    """
    names = _spread(sorted(shapes), stream)
    every = sum(rows * columns for rows, columns in shapes.values())
    chosen = sum(shapes[name][0] * shapes[name][1] for name in names)
    share = max(TILE_WEIGHTS, _TILE_SHARE * every) / max(1, chosen)
    tiles = []
    for name in names:
        whole = shapes[name][0]
        rows = whole if share >= 1 else min(whole, max(_MIN_TILE_ROWS, int(share * whole)))
        tiles.append(Tile(name=name, shape=shapes[name], row_start=stream.below(whole - rows + 1), rows=rows))
    return tuple(tiles)


def _spread(names: list[str], stream: Stream) -> list[str]:
    """Return at most `MAX_CARRIERS` of the names, as many from every block as from any other."""
    if len(names) <= MAX_CARRIERS:
        return names
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_BLOCK.findall(name)[0], []).append(name)
    queues = [[block[i] for i in stream.permutation(len(block))] for block in blocks.values()]
    order = [queues[i] for i in stream.permutation(len(queues))]
    chosen = [queue[turn] for turn in range(max(map(len, order))) for queue in order if turn < len(queue)]
    return sorted(chosen[:MAX_CARRIERS])


def select_carriers(
    shapes: Mapping[str, tuple[int, int]],
    rms_of: Callable[[Tile], float],
    *,
    budget: float,
    min_projections: int,
    stream: Stream,
    step: float | None = None,
    bases: Mapping[str, tuple[int, bytes]] | None = None,
) -> tuple[tuple[Carrier, ...], Mix]:
    """Return the carriers that spend the budget evenly, the same relative change in each matrix, and the mix of steps.

    Args:
        shapes: Rows and columns of each matrix that may carry.
        rms_of: Measures a tile's root mean square.
        budget: Norm of the change over the norm of the carrying matrices.
        min_projections: Code bits that the payload needs at least.
        stream: A keyed stream that is used for nothing else.
        step: One step for all projections, in units of each tile's rms; by default a mix is chosen.
        bases: Of adapters: rank and row space of each, as in `Carrier`.
    Raises:
        CapacityError: Too few projections at this budget; the hint says which budget would do.
    """
    if not shapes:
        raise CapacityError(
            "the model has no matrix that can carry a signature (expected 2-D weights in numbered blocks)",
            hint="a model that is trained can be marked with triggers only (signature=None)",
        )
    tiles = choose_tiles(shapes, stream)
    ranks = {name: rank for name, (rank, _) in (bases or {}).items()}
    mix, sides = _fill(tiles, ranks, budget=budget, step=step)
    total = sum(left * right for left, right in sides)
    if total < min_projections:
        enough = (
            one
            for one in _BUDGETS
            if sum(left * right for left, right in _fill(tiles, ranks, budget=one, step=step)[1]) >= min_projections
        )
        more = "raise r or adapt more matrices" if ranks else "mark more matrices"
        advice = next((f"raise the budget to {one:g}" for one in enough), more)
        raise CapacityError(
            f"too few carriers: {len(tiles)} matrices give {total} projections at budget {budget:g}, "
            f"the payload needs {min_projections}",
            hint=f"{advice}, or, in training, pass signature=None to mark with triggers only",
        )
    carriers = tuple(
        Carrier(
            name=tile.name,
            shape=tile.shape,
            row_start=tile.row_start,
            rows=tile.rows,
            sides=side,
            rms=rms_of(tile),
            basis=bases[tile.name][1] if bases else b"",
        )
        for tile, side in zip(tiles, sides, strict=True)
        if side[0]
    )
    return carriers, mix.of(total)


def _fill(
    tiles: tuple[Tile, ...], ranks: Mapping[str, int], *, budget: float, step: float | None
) -> tuple[Mix, list[tuple[int, int]]]:
    """Return the mix and the sides of each tile, (0, 0) where one carries nothing, within the budget.

    Putting a projection on its lattice moves it by a uniform amount in [-D/2, D/2], so that n projections of
    orthogonal directions change the weights by sqrt(n mean(D^2) / 12). The m sign columns of A overlap by chance,
    and trace((A^T A)^-1) is m / (1 - m / rows) in expectation; likewise for B.

    Source: mean of the inverse Wishart distribution (Mardia, Kent & Bibby 1979, sec. 3.8).
    Deviation: columns of signs, whose overlaps have the same variance as those of Gaussian columns.
    """
    weights = sum(tile.weights for tile in tiles)
    allowed = 12 * weights * (_MARGIN * budget) ** 2
    # In a small model it is room that is short, and not the budget: then fewer projections take larger steps.
    room = sum(left * right for left, right in _sides(tiles, ranks, MAX_PROJECTIONS))
    cost = allowed
    while True:
        mix = choose_mix(cost, step, room)
        sides = _sides(tiles, ranks, mix.projections)
        spent = mix.mean_square * sum(_cost(tile, side, ranks) for tile, side in zip(tiles, sides, strict=True))
        if spent <= allowed:
            return mix, sides
        cost *= 0.99 * allowed / spent


def _cost(tile: Tile | Carrier, sides: tuple[int, int], ranks: Mapping[str, int]) -> float:
    left, right = sides
    # The right directions of an adapter are orthonormal.
    columns = math.inf if tile.name in ranks else tile.shape[1]
    return left * right / ((1 - left / tile.rows) * (1 - right / columns))


def expected_change(carriers: Sequence[Carrier], steps: Mix) -> float:
    """Return the norm of the change that marking makes, over the norm of the carrying matrices (all of one rms)."""
    ranks = {carrier.name: carrier.rank for carrier in carriers if carrier.rank}
    cost = sum(_cost(carrier, carrier.sides, ranks) for carrier in carriers)
    return math.sqrt(steps.mean_square * cost / 12 / sum(math.prod(carrier.shape) for carrier in carriers))


def _sides(tiles: tuple[Tile, ...], ranks: Mapping[str, int], projections: int) -> list[tuple[int, int]]:
    """Return the sides that bring the number of projections near, and not above, a total, in proportion to size."""
    if not projections:
        return [(0, 0)] * len(tiles)
    weights = sum(tile.weights for tile in tiles)
    wanted = [projections * tile.weights / weights for tile in tiles]
    sides = [
        _side(tile, ranks.get(tile.name), math.floor(math.sqrt(n)), n) for tile, n in zip(tiles, wanted, strict=True)
    ]
    spare = projections - sum(left * right for left, right in sides)
    # What rounding down left over goes, direction by direction, where most is missing.
    gaps = sorted(range(len(tiles)), key=lambda i: sides[i][0] * sides[i][1] / tiles[i].weights)
    for i in gaps:
        more = _side(tiles[i], ranks.get(tiles[i].name), max(sides[i]) + 1, (max(sides[i]) + 1) ** 2)
        gain = more[0] * more[1] - sides[i][0] * sides[i][1]
        # In a matrix far smaller than the others one direction would be many times its share of the change.
        fair = more[0] * more[1] <= 4 * wanted[i]
        if fair and 0 < gain <= spare and tiles[i].name not in ranks:
            sides[i], spare = more, spare - gain
    return sides


def _side(tile: Tile, rank: int | None, side: int, projections: float) -> tuple[int, int]:
    if rank is None:
        side = min(side, tile.rows // 8, tile.shape[1] // 8)
        return side, side
    # As many on the right as on the left, where the rank allows it; what it does not goes to the left.
    right = min(rank, max(1, side))
    return min(tile.rows // 8, int(projections / right)), right
