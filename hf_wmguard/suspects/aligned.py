"""A suspect in its original's coordinates: what a thief moved without changing the function, moved back.

`align` is a function of two sets of weights, the suspect's and the reference's, and of nothing else. It knows no key,
no lattice and no payload, so an aligned suspect is as independent of the key as the suspect and the reference are, and
the p-value of reading it stays what it was. The reference must therefore not tell the key either: a fit moves the
suspect's weights towards the reference a little, and a marked original would drag an innocent suspect towards the
mark. Callers hand in the original with its keyed projections set back to what they were before marking.

Only maps of a few numbers are kept for each layer; one matrix at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.suspects.roles import ATTENTION, READS_RESIDUAL, Block, Heads, Part, find_blocks, find_embedding
from hf_wmguard.suspects.sources import Suspect
from hf_wmguard.watermark.align import Basis, Neurons, best_cosines, fit_basis, fit_neurons
from hf_wmguard.watermark.align_heads import HeadMaps, fit_heads

_SAMPLE_ROWS = 16
# The mean of the best cosines of sampled rows: 1 for the same layer, 0.3 for another at a width of 128, less at more.
_RECOGNISED = 0.5
_EMBEDDING_CHUNKS = 64
_ROWS_PER_CHANNEL = 8
_ENOUGH_ROWS = 1 << 14
_Pair = tuple[dict[str, Tensor], dict[str, Tensor]]
# A gain smaller than this share of the norm's mean size cannot be divided by.
_SMALL_GAIN = 1e-2
# Relative change of a norm's gains that is left where it is.
_SAME_GAIN = 0.05


class _Weights:
    """Float32 matrices of a suspect by role, with gains; whatever is not finite is read as 0."""

    def __init__(self, suspect: Suspect, heads: Heads) -> None:
        self.suspect = suspect
        self.shapes = {
            name: tuple(shape)
            for name, shape in suspect.shapes().items()
            if len(shape) in (1, 2) and min(shape) > 0 and suspect.rows(name, 0, 1).is_floating_point()
        }
        self.blocks = find_blocks(self.shapes, heads)
        self._offset = heads.gain_offset

    def rows(self, name: str, start: int, count: int) -> Tensor:
        return torch.nan_to_num(self.suspect.rows(name, start, count).float(), nan=0.0, posinf=0.0, neginf=0.0)

    def stored(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shapes[name][0])

    def part(self, part: Part) -> Tensor:
        """Return [outputs, inputs]."""
        return part.take(self.stored(part.name))

    def gain(self, block: Block, role: str, width: int) -> Tensor:
        """Return what multiplies the inputs of a matrix, float32 [d]."""
        name = block.norm(role)
        if name is None or self.shapes[name] != (width,):
            return torch.ones(width)
        return self.stored(name) + self._offset

    def folded(self, block: Block, role: str) -> Tensor:
        """Return [outputs, inputs], for what reads the residual stream with the norm's gain multiplied in."""
        matrix = self.part(block.parts[role])
        return matrix * self.gain(block, role, matrix.shape[1]) if role in READS_RESIDUAL else matrix

    def sample(self, block: Block) -> Tensor:
        """Return a few rows of ``gate``, folded."""
        part = block.parts["gate"]
        count = self.shapes[part.name][0]
        if part.transposed or part.index is not None:
            matrix = self.part(part)
            rows = matrix[len(matrix) // 2 :][:_SAMPLE_ROWS]
        else:
            rows = self.rows(part.name, count // 2, min(_SAMPLE_ROWS, count - count // 2))
        return rows * self.gain(block, "gate", rows.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """How one block of the reference is found in the suspect: its number there, and the maps; None where none is."""

    source: int
    neurons: Neurons | None = None
    heads: HeadMaps | None = None
    gains_moved: bool = False


class Aligned(Suspect):
    """A suspect under the reference's names and shapes and in its coordinates; itself a `Suspect`.

    Only matrices of numbered blocks are given, as float32, and only those that could be mapped. A block that was
    recognised nowhere is given as it is, as long as its place was not taken by another.
    """

    def __init__(self, reference: _Weights, suspect: _Weights, basis: Basis, layers: Mapping[int, _Layer]) -> None:
        # Names, shapes and coordinates are the reference's, and so is how fused matrices are laid out.
        self.config = reference.suspect.config
        self._reference = reference
        self._suspect = suspect
        self._basis = basis
        self._layers = layers
        self._where = {
            name: (index, suffix) for index, block in reference.blocks.items() for suffix, name in block.names.items()
        }
        self._last: tuple[str, Tensor] | None = None
        self.tries = 1
        """How many alignments were compared by their fit to the reference; what a p-value may be multiplied by."""
        self.aligned = False
        """Whether any block of the reference was recognised in the suspect."""

    @property
    def description(self) -> str:
        """What was undone, such as ``residual permutation, neurons, layers 0-2,4-7``; ``none`` for nothing."""
        if not self.aligned:
            return "not aligned: no layer of the original was recognised"
        found = {index: layer for index, layer in self._layers.items() if layer.neurons or layer.heads}
        said = {
            f"residual {self._basis.kind}": self._basis.moves,
            "residual scale": self._basis.scale != 1,
            "norms": any(layer.gains_moved for layer in found.values()),
            "neurons": any(layer.neurons is not None and layer.neurons.moves for layer in found.values()),
            "heads": any(layer.heads is not None and layer.heads.moves for layer in found.values()),
            f"layers {_ranges(found)}": len(found) < len(self._reference.blocks),
            "layers moved": len(found) == len(self._reference.blocks)
            and any(index != layer.source for index, layer in found.items()),
        }
        return ", ".join(text for text, done in said.items() if done) or "none"

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the reference's matrices that the suspect has."""
        matrices = {name: self._reference.shapes[name] for name in self._where}
        return {
            name: shape
            for name, shape in matrices.items()
            if len(shape) == 2 and (self._in_place(name) is not None or self._is_mapped(name))
        }

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Return ``count`` rows of a matrix, float32, in the reference's coordinates.

        Raises:
            KeyError: `shapes` does not give it.
        """
        source = self._in_place(name)
        if source is not None:
            return self._suspect.suspect.rows(source, start, count).float()
        if not self._is_mapped(name):
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            self._last = (name, self._mapped(name, self._layers[self._where[name][0]]))
        return self._last[1][start : start + count]

    def _in_place(self, name: str) -> str | None:
        """Return the suspect's matrix that is a matrix of the reference as it stands, or None."""
        index, suffix = self._where[name]
        layer = self._layers.get(index)
        if layer is None or layer.source not in self._suspect.blocks or self._moved(layer):
            return None
        source = self._suspect.blocks[layer.source].names.get(suffix)
        same = source is not None and self._suspect.shapes[source] == self._reference.shapes[name]
        return source if same else None

    def _is_mapped(self, name: str) -> bool:
        """Return whether all parts of a matrix of the reference can be mapped."""
        roles, layer = self._roles(name), self._layers.get(self._where[name][0])
        if layer is None:
            return False
        return bool(roles) and all((layer.heads if role in ATTENTION else layer.neurons) is not None for role in roles)

    def _moved(self, layer: _Layer) -> bool:
        if layer.neurons is None and layer.heads is None:
            return False
        maps = (self._basis, layer.neurons, layer.heads)
        return self._basis.scale != 1 or layer.gains_moved or any(one is not None and one.moves for one in maps)

    def _roles(self, name: str) -> list[str]:
        block = self._reference.blocks[self._where[name][0]]
        return [role for role, part in block.parts.items() if part.name == name]

    def _mapped(self, name: str, layer: _Layer) -> Tensor:
        ours = self._reference.blocks[self._where[name][0]]
        theirs = self._suspect.blocks[layer.source]
        result = torch.zeros(self._reference.shapes[name])
        for role in self._roles(name):
            matrix = _undo_residual(self._suspect, theirs, role, self._basis)
            if role in ATTENTION and layer.heads is not None:
                matrix = layer.heads.undo(role, matrix)
            elif role == "down" and layer.neurons is not None:
                matrix = layer.neurons.undo_columns(matrix)
            elif layer.neurons is not None:
                matrix = layer.neurons.undo_rows(matrix, scaled=role == "up" or "up" not in ours.parts)
            if role in READS_RESIDUAL:
                gain = self._reference.gain(ours, role, matrix.shape[1])
                floor = _SMALL_GAIN * gain.abs().mean()
                matrix = matrix / torch.where(gain.abs() < floor, floor.copysign(gain), gain)
            ours.parts[role].put(result, matrix)
        return result


def align(reference: Suspect, suspect: Suspect, *, heads: Heads) -> Aligned:
    """Return a suspect mapped back into its original's coordinates.

    Undone are permuted, sign-changed and rotated residual streams, moved norm gains, permuted, scaled, split and dummy
    neurons, permuted heads, maps between Q and K and between V and O, and dropped, doubled and moved layers. An
    unrelated suspect comes out as it is, with ``aligned`` False. The result depends on the two sets of weights alone;
    see the module for why that matters.

    Args:
        reference: The owner's original, its keyed projections set back to what they were before marking.
        suspect: Somebody's weights. Names may differ by what stands before the blocks' numbers.
        heads: Of the original.
    """
    ours, theirs = _Weights(reference, heads), _Weights(suspect, heads)
    basis = _find_basis(ours, theirs)
    places, compared = _find_layers(ours, theirs, basis)
    layers = {}
    for index, block in ours.blocks.items():
        if index in places:
            layers[index] = _fit_layer((ours, block), (theirs, places[index]), basis, heads)
        elif index not in places.values():
            layers[index] = _Layer(source=index)
    result = Aligned(ours, theirs, basis, layers)
    result.tries = basis.tried + compared
    result.aligned = any(layer.neurons or layer.heads for layer in layers.values())
    return result


def _find_basis(ours: _Weights, theirs: _Weights) -> Basis:
    """Return what was done to the residual stream, from the tokens that both embeddings have."""
    names = find_embedding(ours.shapes), find_embedding(theirs.shapes)
    width = next(
        (ours.part(b.parts[r]).shape[1] for b in ours.blocks.values() for r in READS_RESIDUAL if r in b.parts), 1
    )
    if names[0] is None or names[1] is None:
        return Basis.identity(width)
    (count, size), (count_2, size_2) = ours.shapes[names[0]], theirs.shapes[names[1]]
    if size != width or size_2 != width:
        return Basis.identity(width)
    common = min(count, count_2)
    wanted = min(_ROWS_PER_CHANNEL * width, max(_ENOUGH_ROWS, 3 * width))
    chunk = min(common, max(1, wanted // _EMBEDDING_CHUNKS))
    starts = range(0, common - chunk + 1, max(chunk, common // _EMBEDDING_CHUNKS))
    reference, suspect = (
        torch.cat([weights.rows(name, start, chunk) for start in starts])
        for weights, name in ((ours, names[0]), (theirs, names[1]))
    )
    return fit_basis(reference, suspect)


def _find_layers(ours: _Weights, theirs: _Weights, basis: Basis) -> tuple[dict[int, int], int]:
    """Return the suspect's block for each of the reference's that it has, and how many other places were tried.

    A block in its place is not looked for elsewhere; of a doubled one the better copy is taken.
    """
    samples = {index: basis.apply(ours.sample(block)) for index, block in ours.blocks.items() if "gate" in block.parts}
    best: dict[int, tuple[float, int]] = {}
    compared = 0
    for source, block in theirs.blocks.items():
        if "gate" not in block.parts:
            continue
        rows = theirs.folded(block, "gate")
        alike = {index: sample for index, sample in samples.items() if sample.shape[1] == rows.shape[1]}
        index, score = source, best_cosines([alike[source]], rows)[0] if source in alike else 0.0
        if score < _RECOGNISED and alike:
            scores = dict(zip(alike, best_cosines(list(alike.values()), rows), strict=True))
            compared += len(scores)
            index = max(scores, key=scores.__getitem__)
            score = scores[index]
        if score >= _RECOGNISED and score > best.get(index, (0.0, 0))[0]:
            best[index] = (score, source)
    return {index: source for index, (_, source) in best.items()}, compared


def _undo_residual(weights: _Weights, block: Block, role: str, basis: Basis) -> Tensor:
    """Return a suspect's matrix, folded, with its residual side in the reference's coordinates."""
    matrix = weights.folded(block, role)
    if role in READS_RESIDUAL:
        return basis.undo(matrix)
    # Where no norm stands before the blocks, the stream's scale is not that of the embedding.
    scale = basis.scale if block.norm(role) is not None else 1.0
    return basis.undo(matrix.T).T / scale


def _fit_layer(ours: tuple[_Weights, Block], theirs: tuple[_Weights, int], basis: Basis, heads: Heads) -> _Layer:
    weights, block = ours
    suspect, source = theirs
    other = suspect.blocks[source]

    def matrices(*roles: str) -> _Pair | None:
        wanted = [role for role in roles if role in block.parts]
        if not all(role in other.parts for role in wanted):
            return None
        pair = (
            {role: weights.folded(block, role) for role in wanted},
            {role: _undo_residual(suspect, other, role, basis) for role in wanted},
        )
        # Of neurons there may be more or fewer.
        alike = all(pair[0][role].shape[1] == pair[1][role].shape[1] for role in wanted)
        return pair if alike else None

    # One after the other: the matrices of one fit are gone before those of the next are read.
    return _Layer(
        source=source,
        neurons=_fit_neurons(matrices("gate", "up")),
        heads=_fit_heads(matrices(*ATTENTION), heads),
        gains_moved=any(_gain_moved(ours, (suspect, other), role, basis) for role in ("q", "gate")),
    )


def _fit_neurons(matrices: _Pair | None) -> Neurons | None:
    return None if matrices is None or "gate" not in matrices[0] else fit_neurons(*matrices)


def _fit_heads(matrices: _Pair | None, heads: Heads) -> HeadMaps | None:
    """Return the maps of a layer's heads; None where the suspect has another number of heads, or not all matrices."""
    if matrices is None or len(matrices[0]) < len(ATTENTION):
        return None
    rows = {"q": heads.count, "k": heads.kv_count, "v": heads.kv_count}
    as_told = all(
        one[role].shape[0] == count * heads.size and one["o"].shape[1] == heads.count * heads.size
        for role, count in rows.items()
        for one in matrices
    )
    if not as_told:
        return None
    return fit_heads(*matrices, kv_count=heads.kv_count, size=heads.size, rotary=heads.rotary)


def _gain_moved(ours: tuple[_Weights, Block], theirs: tuple[_Weights, Block], role: str, basis: Basis) -> bool:
    """Return whether a norm's gain is another than training on would make it."""
    width = len(basis.order)
    gain, other = (weights.gain(block, role, width) for weights, block in (ours, theirs))
    back = other if basis.rotation is not None else basis.undo(other[None])[0] * basis.signs
    return float((back - gain).norm()) > _SAME_GAIN * float(gain.norm())


def _ranges(indices: Mapping[int, object]) -> str:
    """Return sorted numbers as ``0-2,4``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
