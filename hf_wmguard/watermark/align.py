"""Undo the symmetries of a transformer: the mathematics, on plain matrices.

Weights can be changed in many ways that leave a network's outputs alone: neurons and heads can change places, the
residual stream can be permuted or rotated, maps can be pushed between V and O or between Q and K. Each function here
fits one such change between a matrix of the owner's original (``reference``) and one of a suspect.

Every fit has far fewer free numbers than the matrix it is applied to, and takes the simplest kind of change that
explains the suspect: what a fit is free to choose, it takes from the suspect's mark (see `align_heads`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAME = 0.9
"""Rows whose cosine is above it are one row."""
_ROUNDS = 8
_SKETCH = 512
_CHUNK = 1024
_FEW_VECTORS = 1024
# Below it a cosine, or what a map explains of the reference, is chance.
CHANCE = 0.5
# A change within this of doing nothing is not made: what it would repair is less than what a fit can spoil.
_SCALE_SLACK = 0.02
# How many standard errors from 1 a row's scale must be.
_CERTAIN = 4.0
TINY = 1e-30


def unit_rows(matrix: Tensor) -> Tensor:
    """Return rows of norm 1, float32; a row of zeros, or one too large for float32, comes out as zeros."""
    matrix = matrix.float()
    scaled = matrix / matrix.abs().amax(dim=1, keepdim=True).clamp_min(TINY)
    return scaled.div_(scaled.norm(dim=1, keepdim=True).clamp_min(TINY))


def best_cosines(samples: Sequence[Tensor], rows: Tensor) -> list[float]:
    """Return how well the rows of each sample recur among others, in any order and scale.

    Args:
        samples: Each [few, k].
        rows: [n, k].
    Returns:
        For each sample the mean of its rows' best cosines, -1 to 1.
    """
    units = unit_rows(rows).T
    return [float((unit_rows(sample) @ units).amax(dim=1).mean()) for sample in samples]


def match_rows(reference: Tensor, suspect: Tensor, *, either_sign: bool = False) -> tuple[Tensor, Tensor]:
    """Return for each reference row the suspect's row that is most like it, each used once.

    Rows that lie in place stay. The others are paired where each is the other's best, in rounds; what is less than
    half as like as the pairs of an earlier round stays alone.

    Args:
        reference: [r, k], any float dtype.
        suspect: [s, k].
        either_sign: A row and its negative are alike.
    Returns:
        Index of the suspect's row, int64 [r], -1 where none is; the cosine, float32 [r], 0 where none is.
    """
    # A random sketch keeps the product of two matrices of tens of thousands of rows affordable.
    wide = reference.shape[1] > 2 * _SKETCH and min(len(reference), len(suspect)) > 2 * _SKETCH
    ours, theirs = unit_rows(reference), unit_rows(suspect)
    both = min(len(ours), len(theirs))
    index = torch.full((len(ours),), -1, dtype=torch.int64)
    cosine = torch.zeros(len(ours))
    in_place = (ours[:both] * theirs[:both]).sum(dim=1)
    kept = ((in_place.abs() if either_sign else in_place) > SAME).nonzero().flatten()
    index[kept], cosine[kept] = kept, in_place[kept]
    if wide and len(kept) < len(ours):
        draw = torch.Generator().manual_seed(0)
        sketch = torch.randn(ours.shape[1], _SKETCH, generator=draw)
        ours, theirs = unit_rows(ours @ sketch), unit_rows(theirs @ sketch)
    floor = 0.5 * SAME if len(kept) else 0.0
    for _ in range(_ROUNDS):
        free = (index < 0).nonzero().flatten()
        taken = torch.zeros(len(theirs), dtype=torch.bool)
        taken[index[index >= 0]] = True
        unused = (~taken).nonzero().flatten()
        if not len(free) or not len(unused):
            break
        value, column, back = _best(ours[free], theirs[unused], either_sign=either_sign)
        mutual = (back[column] == torch.arange(len(free))) & (value.abs() > floor)
        if not mutual.any():
            break
        index[free[mutual]] = unused[column[mutual]]
        cosine[free[mutual]] = value[mutual]
        floor = max(floor, 0.5 * float(value[mutual].abs().median()))
    return index, cosine


def _best(ours: Tensor, theirs: Tensor, *, either_sign: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return for unit rows: the best cosine and its index among theirs, and for each of theirs the best of ours."""
    values, columns = [], []
    top = torch.full((len(theirs),), -torch.inf)
    back = torch.zeros(len(theirs), dtype=torch.int64)
    for start in range(0, len(ours), _CHUNK):
        cosines = ours[start : start + _CHUNK] @ theirs.T
        size = cosines.abs() if either_sign else cosines
        column = size.argmax(dim=1)
        values.append(cosines.gather(1, column[:, None]).flatten())
        columns.append(column)
        here, row = size.max(dim=0)
        better = here > top
        top = torch.where(better, here, top)
        back = torch.where(better, row + start, back)
    return torch.cat(values), torch.cat(columns), back


def snap(scale: Tensor, slack: Tensor | float = 0.0) -> Tensor:
    """Return scales, 1 where they are as near to it as ``slack`` or a fixed bound."""
    near = (scale - 1).abs() < torch.as_tensor(slack).clamp_min(_SCALE_SLACK)
    return torch.where(near, torch.ones_like(scale), scale)


def _row_scales(reference: Tensor, suspect: Tensor) -> Tensor:
    """Return how much larger each row is, by least squares; 1 where that is within what chance gives."""
    size = reference.square().sum(dim=1).clamp_min(TINY)
    scale = (suspect * reference).sum(dim=1) / size
    rest = (suspect - scale[:, None] * reference).square().sum(dim=1)
    return snap(scale, _CERTAIN * (rest / size / reference.shape[1]).sqrt())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Basis:
    """The suspect's residual stream in terms of the reference's.

    Args:
        kind: ``identity``, ``permutation`` (also with changed signs), ``rotation`` or ``unknown``.
        order: The suspect's channel for each of the reference's, int64 [d].
        signs: 1 or -1 for each of the reference's channels, float32 [d].
        rotation: float32 [d, d]; suspect = reference @ rotation. None where ``order`` says it all.
        scale: How much larger the suspect's stream is.
        tried: How many kinds were compared.
    """

    kind: str
    order: Tensor
    signs: Tensor
    rotation: Tensor | None = None
    scale: float = 1.0
    tried: int = 1

    @classmethod
    def identity(cls, width: int, *, kind: str = "identity", tried: int = 1) -> Basis:
        """Return the basis in which nothing moves."""
        return cls(kind=kind, order=torch.arange(width), signs=torch.ones(width), tried=tried)

    @property
    def moves(self) -> bool:
        """Whether undoing it changes anything but the scale."""
        return self.kind in ("permutation", "rotation")

    def undo(self, rows: Tensor) -> Tensor:
        """Return rows [n, d] of the suspect's stream in the reference's coordinates, directions only."""
        if self.rotation is not None:
            return rows @ self.rotation.T
        return rows[:, self.order] * self.signs if self.moves else rows

    def apply(self, rows: Tensor) -> Tensor:
        """Return rows [n, d] of the reference's stream in the suspect's coordinates, directions only."""
        if self.rotation is not None:
            return rows @ self.rotation
        if not self.moves:
            return rows
        turned = torch.empty_like(rows)
        turned[:, self.order] = rows * self.signs
        return turned


def fit_basis(reference: Tensor, suspect: Tensor) -> Basis:
    """Return what was done to the residual stream, from vectors in it that belong together.

    Args:
        reference: Token embeddings, float32 [n, d].
        suspect: The same tokens', float32 [n, d].
    Source: Schoenemann 1966 (orthogonal Procrustes).
    """
    width = reference.shape[1]
    ours, theirs = reference - reference.mean(dim=0), suspect - suspect.mean(dim=0)
    # A permutation shows in far fewer vectors than a rotation.
    few = slice(None, None, max(1, len(ours) // _FEW_VECTORS))
    order, cosine = match_rows(ours[few].T, theirs[few].T, either_sign=True)
    found = order >= 0
    if found.float().mean() > SAME and cosine[found].abs().median() > CHANCE:
        left = torch.ones(width, dtype=torch.bool)
        left[order[found]] = False
        order[~found] = left.nonzero().flatten()
        signs = torch.where(cosine < 0, -1.0, 1.0)
        same = bool((order == torch.arange(width)).all() and (signs > 0).all())
        kind = "identity" if same else "permutation"
        basis = Basis(kind=kind, order=order, signs=signs, tried=1 if same else 2)
    elif len(ours) < 2 * width or not torch.isfinite(theirs.norm()):
        return Basis.identity(width, kind="unknown", tried=2)
    else:
        left_vectors, size, right_vectors = torch.linalg.svd(ours.T @ theirs)
        if float(size.sum() / (ours.norm() * theirs.norm()).clamp_min(TINY)) < CHANCE:
            return Basis.identity(width, kind="unknown", tried=3)
        basis = Basis(
            kind="rotation",
            order=torch.arange(width),
            signs=torch.ones(width),
            rotation=left_vectors @ right_vectors,
            tried=3,
        )
    scale = snap((basis.undo(theirs) * ours).sum() / ours.square().sum().clamp_min(TINY))
    return Basis(
        kind=basis.kind,
        order=basis.order,
        signs=basis.signs,
        rotation=basis.rotation,
        scale=float(scale) if scale > 0 else 1.0,
        tried=basis.tried,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neurons:
    """Where a layer's neurons are in the suspect.

    Args:
        index: The suspect's neuron for each of the reference's, int64 [f]; -1 where it is gone.
        scale: How much larger the suspect's neuron is, float32 [f].
        extra: Further neurons of the suspect that are parts of one of the reference's, int64 [n].
        extra_of: Of which, int64 [n].
        extra_scale: How much larger, float32 [n].
    """

    index: Tensor
    scale: Tensor
    extra: Tensor
    extra_of: Tensor
    extra_scale: Tensor

    @property
    def moves(self) -> bool:
        """Whether undoing it changes anything."""
        in_place = bool((self.index == torch.arange(len(self.index))).all())
        return not in_place or bool((self.scale != 1).any()) or len(self.extra) > 0

    def undo_rows(self, matrix: Tensor, *, scaled: bool) -> Tensor:
        """Return [f, d], a row for each of the reference's neurons, zeros where it is gone."""
        rows = matrix[self.index.clamp_min(0)] * (self.index >= 0)[:, None]
        return rows / self.scale[:, None] if scaled else rows

    def undo_columns(self, matrix: Tensor) -> Tensor:
        """Return [d, f], a column for each of the reference's neurons: what all its parts write together."""
        columns = matrix[:, self.index.clamp_min(0)] * (self.scale * (self.index >= 0))
        return columns.index_add_(1, self.extra_of, matrix[:, self.extra] * self.extra_scale)


def fit_neurons(reference: Mapping[str, Tensor], suspect: Mapping[str, Tensor]) -> Neurons:
    """Return where neurons went, by their rows; whatever the suspect has besides is left out.

    A neuron can be scaled in ``up`` (its activation is linear in it), without ``up`` in ``gate`` (a ReLU).

    Args:
        reference: ``gate`` and, in gated networks, ``up``, float32 [f, d].
        suspect: The same, with any number of rows, in the reference's residual coordinates.
    """
    index, cosine = match_rows(reference["gate"], suspect["gate"])
    partner = "up" if "up" in reference else "gate"
    found = (index >= 0).nonzero().flatten()
    free = torch.ones(len(suspect["gate"]), dtype=torch.bool)
    free[index[found]] = False
    spare = free.nonzero().flatten()
    extra_of = torch.zeros(0, dtype=torch.int64)
    if len(spare) and len(found):
        value, owner, _ = _best(
            unit_rows(suspect["gate"][spare]), unit_rows(reference["gate"][found]), either_sign=False
        )
        part = value > SAME * cosine[found[owner]].clamp_min(CHANCE)
        spare, extra_of = spare[part], found[owner[part]]
    else:
        spare = spare[:0]
    members, owners = torch.cat([index[found], spare]), torch.cat([found, extra_of])
    theirs, ours = suspect[partner][members], reference[partner][owners]
    likeness = (unit_rows(theirs) * unit_rows(ours)).sum(dim=1)
    scale = _row_scales(ours, theirs)
    plausible = likeness.abs() > 0.5 * CHANCE if partner == "up" else likeness > 0.5 * CHANCE
    scale = torch.where(plausible, scale, torch.ones_like(scale))
    # The most alike of a neuron's parts stands for it: a decoy that shares its gate alone does not.
    best = torch.full((len(index),), -1.0).scatter_reduce(0, owners, likeness.abs(), "amax")
    chosen = (likeness.abs() == best[owners]).nonzero().flatten().flip(0)
    first = torch.full((len(index),), -1, dtype=torch.int64)
    first[owners[chosen]] = chosen
    here = first >= 0
    others = torch.ones(len(members), dtype=torch.bool)
    others[first[here]] = False
    others &= plausible & (likeness.abs() > 0.5 * best[owners])
    return Neurons(
        index=torch.where(here, members[first.clamp_min(0)], -1) if len(members) else index,
        scale=torch.where(here, scale[first.clamp_min(0)], 1.0) if len(members) else torch.ones(len(index)),
        extra=members[others],
        extra_of=owners[others],
        extra_scale=scale[others],
    )
