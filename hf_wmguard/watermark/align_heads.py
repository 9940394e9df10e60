"""Undo what was done to attention heads: their order, and the maps between V and O and between Q and K.

A general map in every head has size^2 free numbers, fitted to (1 + group) * size * width weights. Of a mark that the
reference lacks it takes size / (width * (1 + group)), 2% to 8%, out of the suspect's heads; simpler maps take next to
nothing, so they are preferred wherever they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.watermark.align import CHANCE, TINY, snap

# Relative error of a map that is good enough.
_MAP_SLACK = 0.05
# A simpler map may leave this much more unexplained than a general one.
_SIMPLER = 1.1


def assign(scores: Tensor) -> Tensor:
    """Return for each row a column of its own, int64: the best pair first. Rows must not outnumber columns."""
    scores = scores.clone()
    index = torch.zeros(len(scores), dtype=torch.int64)
    for _ in range(len(scores)):
        row, column = divmod(int(scores.argmax()), scores.shape[1])
        index[row] = column
        scores[row], scores[:, column] = -torch.inf, -torch.inf
    return index


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadMaps:
    """Where a layer's heads are in the suspect, and the map inside each.

    Args:
        order: The suspect's head for each of the reference's, by role, int64 [heads].
        maps: float32 [heads, size, size] by role: from the suspect's head to the reference's.
    """

    order: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]

    @property
    def moves(self) -> bool:
        """Whether undoing it changes anything."""
        still = all(bool((order == torch.arange(len(order))).all()) for order in self.order.values())
        eye = torch.eye(self.maps["q"].shape[1])
        return not still or any(bool((maps != eye).any()) for maps in self.maps.values())

    def undo(self, role: str, matrix: Tensor) -> Tensor:
        """Return a suspect's matrix, q, k or v [heads * size, d] or o [d, heads * size], in the reference's heads."""
        rows = matrix.T if role == "o" else matrix
        order, maps = self.order[role], self.maps[role]
        heads = rows.reshape(len(order), maps.shape[1], -1)[order]
        mapped = torch.bmm(maps, heads).reshape(rows.shape)
        return mapped.T if role == "o" else mapped


def fit_heads(
    reference: Mapping[str, Tensor], suspect: Mapping[str, Tensor], *, kv_count: int, size: int, rotary: int
) -> HeadMaps:
    """Return where heads went and the invertible maps between V and O and between Q and K.

    Args:
        reference: q, k, v, float32 [heads * size, d], and o, float32 [d, heads * size].
        suspect: The same shapes, in the reference's residual coordinates.
        kv_count: Key and value heads; the query heads that share one stay together.
        size: Rows of one head.
        rotary: Leading rows of a query or key head that only maps in pairs may mix; 0 without rotary embeddings.
    """
    ours, theirs = (_by_head(one, kv_count=kv_count, size=size) for one in (reference, suspect))
    kv = assign(_explained(ours["v"][:, 0], theirs["v"][:, 0]) + _explained(ours["k"][:, 0], theirs["k"][:, 0]))
    theirs = {role: heads[kv] for role, heads in theirs.items()}
    group = ours["q"].shape[1]
    queries = torch.stack(
        [
            assign(sum(_explained(ours[role][head], theirs[role][head]) for role in ("q", "o")))  # type: ignore[arg-type]
            for head in range(kv_count)
        ]
    )
    for role in ("q", "o"):
        theirs[role] = torch.stack([theirs[role][head, queries[head]] for head in range(kv_count)])
    maps = {}
    for first, second, turning in (("k", "q", rotary), ("v", "o", 0)):
        pair = _pair_maps(
            (ours[first][:, 0], theirs[first][:, 0]), (_wide(ours[second]), _wide(theirs[second])), rotary=turning
        )
        back = torch.linalg.pinv(pair).mT.repeat_interleave(group, dim=0)
        for role, one in ((first, pair), (second, back)):
            maps[role] = _own_scale(one, ours[role].flatten(0, 1), theirs[role].flatten(0, 1)).float()
    order = (kv[:, None] * group + queries).flatten()
    return HeadMaps(order={"q": order, "k": kv, "v": kv, "o": order}, maps=maps)


def _by_head(matrices: Mapping[str, Tensor], *, kv_count: int, size: int) -> dict[str, Tensor]:
    """Return float64 [kv heads, group, size, d] by role; group is 1 for k and v."""
    rows = {role: (matrix.T if role == "o" else matrix).double() for role, matrix in matrices.items()}
    return {role: matrix.reshape(kv_count, -1, size, matrix.shape[1]) for role, matrix in rows.items()}


def _own_scale(maps: Tensor, reference: Tensor, suspect: Tensor) -> Tensor:
    """Return maps [heads, size, size] after which every head has the reference's scale.

    Where queries or keys are normalised, each may be scaled on its own.
    """
    undone = torch.bmm(maps, suspect)
    scale = (undone * reference).sum((1, 2)) / reference.square().sum((1, 2)).clamp_min(TINY)
    scale = snap(torch.where(scale > 0.5 * CHANCE, scale, torch.ones_like(scale)))
    return maps / scale[:, None, None]


def _wide(heads: Tensor) -> Tensor:
    """Return [heads, size, group * d]: what shares one map, side by side."""
    return heads.transpose(1, 2).flatten(2)


def _explained(reference: Tensor, suspect: Tensor) -> Tensor:
    """Return [r, s]: the share of each reference head [size, d] that lies in the row space of each suspect head."""
    bases = torch.linalg.qr(suspect.mT).Q.float()
    ours = reference.flatten(1).div(reference.flatten(1).norm(dim=1, keepdim=True).clamp_min(TINY))
    return torch.einsum("rxd,sdy->rsxy", ours.view_as(reference).float(), bases).square().sum((2, 3))


def _pair_maps(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, rotary: int) -> Tensor:
    """Return X [heads, size, size] with X first' = first and X^-T second' = second, as nearly as both allow.

    The cost of X is |X first' - first|^2 / |first|^2 + |second' - X^T second|^2 / |second'|^2. The simplest of
    identity, scale, rotations with scale of rotary pairs, and general map that fits is taken, head by head.

    Args:
        first: Reference and suspect, float64 [heads, size, n].
        second: Reference and suspect, float64 [heads, size, m].
    """
    ours, theirs = first
    ours_2, theirs_2 = second
    heads, size, _ = ours.shape
    weight = 1 / ours.square().sum((1, 2), keepdim=True).clamp_min(TINY)
    weight_2 = 1 / theirs_2.square().sum((1, 2), keepdim=True).clamp_min(TINY)
    gram = weight * theirs @ theirs.mT
    gram_2 = weight_2 * ours_2 @ ours_2.mT
    target = weight * ours @ theirs.mT + weight_2 * ours_2 @ theirs_2.mT
    eye = torch.eye(size, dtype=ours.dtype).expand(heads, -1, -1)

    values, left = torch.linalg.eigh(gram_2)
    values_2, right = torch.linalg.eigh(gram)
    sums = (values[:, :, None] + values_2[:, None, :]).clamp_min(TINY)
    general = left @ ((left.mT @ target @ right) / sums) @ right.mT
    trace = (gram + gram_2).diagonal(dim1=1, dim2=2).sum(1).clamp_min(TINY)
    scaled = (target.diagonal(dim1=1, dim2=2).sum(1) / trace)[:, None, None] * eye
    candidates = [(eye, 0), (scaled, 1)]
    if rotary:
        candidates.append((_rotary_part(target, gram + gram_2, rotary=rotary), size))
    candidates.append((general, size * size))

    observed = ours[0].numel() + ours_2[0].numel()
    costs = torch.stack(
        [
            (
                weight.flatten() * (x @ theirs - ours).square().sum((1, 2))
                + weight_2.flatten() * (theirs_2 - x.mT @ ours_2).square().sum((1, 2))
            )
            / max(1 - free / observed, 0.1)
            for x, free in candidates
        ]
    )
    fits = (costs < 2 * _MAP_SLACK**2) | (costs <= _SIMPLER**2 * costs.amin(dim=0))
    # The first that fits: argmax of a boolean is not promised to be the first.
    choice = (fits.int() * torch.arange(len(costs), 0, -1)[:, None]).argmax(dim=0)
    return torch.stack([x for x, _ in candidates])[choice, torch.arange(heads)]


def _rotary_part(target: Tensor, gram: Tensor, *, rotary: int) -> Tensor:
    """Return the map that turns and scales each pair of rows i, i + rotary / 2, and scales each row behind them."""
    result = torch.diag_embed(target.diagonal(dim1=1, dim2=2) / gram.diagonal(dim1=1, dim2=2).clamp_min(TINY))
    one = torch.arange(rotary // 2)
    two = one + rotary // 2
    total = (gram[:, one, one] + gram[:, two, two]).clamp_min(TINY)
    along = (target[:, one, one] + target[:, two, two]) / total
    across = (target[:, one, two] - target[:, two, one]) / total
    result[:, one, one], result[:, two, two] = along, along
    result[:, one, two], result[:, two, one] = across, -across
    return result
