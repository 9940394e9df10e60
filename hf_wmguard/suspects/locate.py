"""Where a matrix of the owner's lies in a suspect: under its name or another, fused, split, stacked or transposed.

Every rule looks at names and shapes alone, never at weights, so that finding a place is no test to correct for.
What two places answer to is not found at all. Where names say nothing, `Layout.locations` gives every place that
has the shape, in a fixed order: whoever tries several must count them.

Layouts of fused matrices are those of transformers 5.23: rows q | k | v (Phi-3, MPT, DBRX, ModernBERT), GPT-2's
transposed [in, q | k | v], per head q, k, v (GPT-NeoX, BLOOM, Persimmon), per group (Falcon), four shards of
q, v, k (CodeGen); rows gate | up; and experts stacked as [E, 2I, H] and [E, H, I].
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import eq

import torch
from torch import Tensor

from hf_wmguard.suspects.fusing import Runs, model_type, qkv_runs
from hf_wmguard.suspects.sources import Suspect, matrix_shape

_ATTENTION = re.compile(
    r"(?P<parent>.+)\.(?:(?P<q>q_proj|query|q_lin)|(?P<k>k_proj|key|k_lin)|(?P<v>v_proj|value|v_lin))\.weight"
)
_FUSED_ATTENTION = ("qkv_proj", "qkv", "Wqkv", "W_pack", "c_attn", "query_key_value")
_MLP = re.compile(r"(?P<parent>.+)\.(?P<part>gate_proj|up_proj)\.weight")
_EXPERT = re.compile(r"(?P<parent>.+)\.experts\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight")
_STACKED = re.compile(r"(?P<parent>.+)\.experts\.(?P<part>gate_up_proj|down_proj)(\.weight)?")
_SPLIT = re.compile(r"(?P<parent>.+)\.(?P<part>qkv_proj|gate_up_proj)\.weight")
# Mixtral's own names of the three matrices of an expert, and of the block that holds them.
_LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_GENERIC = {short: long for long, short in _LEAVES.items()}
_BLOCKS = (".mlp", ".block_sparse_moe")
# These store an expert as [in, out]; others that do (gpt-oss) interleave gate and up besides.
_EXPERTS_TRANSPOSED = frozenset({"llama4", "llama4_text"})
_MAX_GROUPS = 128
_CHUNK_VALUES = 1 << 22
_TOGETHER = Runs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of a matrix that lie in one tensor.

    Args:
        tensor: The suspect's name of the tensor.
        rows: How many rows of the matrix lie here.
        columns: Columns of the matrix.
        block: First row of the tensor's block that holds them (an expert), as `Suspect.rows` counts.
        runs: Where in the block they lie.
        transposed: The rows of the matrix are columns of the block.
    """

    tensor: str
    rows: int
    columns: int
    block: int = 0
    runs: Runs = _TOGETHER
    transposed: bool = False

    def read(self, suspect: Suspect, start: int, count: int) -> Tensor:
        """Return rows of the matrix, counted from the first one here."""
        spans = list(self.runs.spans(start, count))
        if not self.transposed:
            return torch.cat([suspect.rows(self.tensor, self.block + first, size) for first, size in spans])
        columns = []
        # The tile is a column of every row: the whole block must be read, but need not be held.
        width = suspect.shapes()[self.tensor][-1]
        step = max(1, _CHUNK_VALUES // width)
        for first in range(0, self.columns, step):
            rows = suspect.rows(self.tensor, self.block + first, min(step, self.columns - first))
            columns.append(torch.cat([rows[:, begin : begin + size] for begin, size in spans], dim=1).T)
        return torch.cat(columns, dim=1)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a matrix lies: its pieces, in the order of its rows."""

    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> str | None:
        """The name of the tensor of which this is all, as it lies; None of a part or a transpose."""
        first = self.pieces[0]
        plain = Piece(tensor=first.tensor, rows=first.rows, columns=first.columns)
        return first.tensor if self.pieces == (plain,) else None

    @property
    def transposed(self) -> bool:
        """Whether rows of it are columns of what is stored."""
        return any(piece.transposed for piece in self.pieces)

    def read(self, suspect: Suspect, start: int, count: int) -> Tensor:
        """Return ``count`` rows of the matrix from row ``start`` on, in the dtype of the suspect [count, columns].

        Raises:
            FormatError: What is stored there cannot be read.
        """
        tiles, first = [], 0
        for piece in self.pieces:
            begin, end = max(start - first, 0), min(start + count - first, piece.rows)
            if begin < end:
                tiles.append(piece.read(suspect, begin, end - begin))
            first += piece.rows
        return torch.cat(tiles)


class Layout:
    """The names and shapes of a suspect, prepared for looking matrices up.

    Args:
        suspect: An opened suspect; its weights are not looked at.
    """

    def __init__(self, suspect: Suspect) -> None:
        self._suspect = suspect
        self._shapes = suspect.shapes()
        self._ending: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._shapes:
            for suffix in _suffixes(name):
                self._ending[suffix].append(name)

    def locate(self, name: str, shape: tuple[int, int]) -> Location | None:
        """Return where a matrix lies by its name, or None where no place or more than one answers to it.

        Args:
            name: The owner's name of the matrix.
            shape: Its rows and columns; of stacked experts, all experts' rows together.
        """
        whole = self._whole(name, shape)
        if whole is not None:
            return Location((whole,))
        single = [*self._in_attention(name, shape), *self._in_mlp(name, shape), *self._in_experts(name, shape)]
        if single:
            return Location((single[0],)) if len(set(single)) == 1 else None
        pieces = self._split(name, shape) or self._unstacked(name, shape)
        return Location(pieces) if pieces else None

    def locations(self, shape: tuple[int, int]) -> tuple[Location, ...]:
        """Return every place that could hold a matrix of a shape, as a whole or as a part, in the order of names.

        A square tensor gives two places, as it lies and transposed. Interleaved layouts are found by name only.
        """
        return tuple(
            Location((piece,)) for name in sorted(self._shapes, key=_natural) for piece in self._fits(name, shape)
        )

    def _fits(self, name: str, shape: tuple[int, int]) -> Iterator[Piece]:
        stored = self._shapes[name]
        if len(stored) not in (2, 3):
            return
        rows, columns = shape
        height, width = stored[-2:]
        for block in range(0, matrix_shape(stored)[0], max(1, height)):
            for transposed, (out, inside) in ((False, (height, width)), (True, (width, height))):
                for offset in _offsets(rows, out) if inside == columns else ():
                    yield Piece(
                        tensor=name,
                        rows=rows,
                        columns=columns,
                        block=block,
                        runs=Runs(offset=offset),
                        transposed=transposed,
                    )

    def _pick(self, name: str, fits: Callable[[tuple[int, ...]], bool]) -> str | None:
        """Return the tensor of a name: the same, the suspect's own for it, or the only one that differs by a prefix."""
        for known in (name, self._suspect.alias(name)):
            if known is not None and known in self._shapes and fits(self._shapes[known]):
                return known
        shorter = [suffix for suffix in _suffixes(name) if suffix in self._shapes]
        same = [other for other in {*self._ending.get(name, ()), *shorter} if fits(self._shapes[other])]
        return same[0] if len(same) == 1 else None

    def _whole(self, name: str, shape: tuple[int, int]) -> Piece | None:
        for transposed, wanted in ((False, shape), (True, shape[::-1])):
            found = {self._pick(spelt, partial(_is_matrix, wanted)) for spelt in _spellings(name)}
            found.discard(None)
            if found:
                tensor = found.pop()
                if found or tensor is None:
                    return None
                return Piece(tensor=tensor, rows=shape[0], columns=shape[1], transposed=transposed)
        return None

    def _in_attention(self, name: str, shape: tuple[int, int]) -> Iterator[Piece]:
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return
        rows, columns = shape
        part = next(index for index, key in enumerate("qkv") if match[key])
        for fused in _FUSED_ATTENTION:
            for transposed in (False, True):
                tensor = self._pick(
                    f"{match['parent']}.{fused}.weight",
                    partial(_is_attention, part, rows, columns, transposed),
                )
                if tensor is not None:
                    runs = qkv_runs(fused, part, rows, self._shapes[tensor][int(transposed)], self._suspect.config)
                    if runs is not None:
                        yield Piece(tensor=tensor, rows=rows, columns=columns, runs=runs, transposed=transposed)
                    break

    def _in_mlp(self, name: str, shape: tuple[int, int]) -> Iterator[Piece]:
        match = _MLP.fullmatch(name)
        if match is None:
            return
        rows, columns = shape
        for transposed, wanted in ((False, (2 * rows, columns)), (True, (columns, 2 * rows))):
            tensor = self._pick(f"{match['parent']}.gate_up_proj.weight", partial(eq, wanted))
            if tensor is not None:
                offset = rows if match["part"] == "up_proj" else 0
                yield Piece(tensor=tensor, rows=rows, columns=columns, runs=Runs(offset=offset), transposed=transposed)

    def _in_experts(self, name: str, shape: tuple[int, int]) -> list[Piece]:
        match = _EXPERT.fullmatch(name)
        leaf = match and _GENERIC.get(match["part"], match["part"])
        if match is None or leaf not in _LEAVES:
            return []
        expert, (rows, columns) = int(match["expert"]), shape
        fused = [] if leaf == "down_proj" else [("gate_up_proj", 2 * rows, rows if leaf == "up_proj" else 0)]
        # As transformers stacks them, and as GGUF does: each of the three apart.
        found = []
        for stacked, out, offset in (*fused, (leaf, rows, 0), (_LEAVES[leaf], rows, 0)):
            transposed = model_type(self._suspect.config) in _EXPERTS_TRANSPOSED
            inner = (columns, out) if transposed else (out, columns)
            for parent in _parents(match["parent"]):
                for ending in ("", ".weight"):
                    tensor = self._pick(
                        f"{parent}.experts.{stacked}{ending}",
                        partial(_is_stack, expert, inner),
                    )
                    if tensor is not None:
                        found.append(
                            Piece(
                                tensor=tensor,
                                rows=rows,
                                columns=columns,
                                block=expert * inner[0],
                                runs=Runs(offset=offset),
                                transposed=transposed,
                            )
                        )
        return found

    def _split(self, name: str, shape: tuple[int, int]) -> tuple[Piece, ...]:
        """Return the pieces of a fused matrix of the owner's that the suspect holds apart."""
        match = _SPLIT.fullmatch(name)
        if match is None:
            return ()
        parts = ("q_proj", "k_proj", "v_proj") if match["part"] == "qkv_proj" else ("gate_proj", "up_proj")
        return self._joined([f"{match['parent']}.{part}.weight" for part in parts], shape)

    def _unstacked(self, name: str, shape: tuple[int, int]) -> tuple[Piece, ...]:
        """Return the pieces of the owner's stacked experts that the suspect holds one by one, or stacked apart."""
        match = _STACKED.fullmatch(name)
        if match is None:
            return ()
        parts = ("down_proj",) if match["part"] == "down_proj" else ("gate_proj", "up_proj")
        for parent in _parents(match["parent"]):
            first = self._named(f"{parent}.experts.0.{parts[0]}.weight", shape[1])
            stack = self._pick(
                f"{parent}.experts.{parts[0]}.weight", lambda size: len(size) == 3 and size[2] == shape[1]
            )
            rows = first.rows if first else self._shapes[stack][1] if stack else 0
            if rows and shape[0] % (rows * len(parts)) == 0:
                names = (
                    f"{parent}.experts.{expert}.{part}.weight"
                    for expert in range(shape[0] // (rows * len(parts)))
                    for part in parts
                )
                pieces = [self.locate(one, (rows, shape[1])) for one in names]
                if all(pieces):
                    return tuple(piece for place in pieces if place for piece in place.pieces)
        return ()

    def _joined(self, names: list[str], shape: tuple[int, int]) -> tuple[Piece, ...]:
        pieces = tuple(piece for name in names if (piece := self._named(name, shape[1])))
        whole = len(pieces) == len(names) and sum(piece.rows for piece in pieces) == shape[0]
        return pieces if whole else ()

    def _named(self, name: str, columns: int) -> Piece | None:
        """Return a whole matrix of a name whose rows are not known."""
        found = {self._pick(spelt, lambda size: len(size) == 2 and size[1] == columns) for spelt in _spellings(name)}
        found.discard(None)
        tensor = found.pop() if len(found) == 1 else None
        return None if tensor is None else Piece(tensor=tensor, rows=self._shapes[tensor][0], columns=columns)


def _is_matrix(wanted: tuple[int, ...], size: tuple[int, ...]) -> bool:
    return matrix_shape(size) == wanted


def _is_attention(part: int, rows: int, columns: int, transposed: bool, size: tuple[int, ...]) -> bool:
    if len(size) != 2:
        return False
    out, inside = size[::-1] if transposed else size
    return inside == columns and _heads(part, rows, out)


def _is_stack(expert: int, inner: tuple[int, int], size: tuple[int, ...]) -> bool:
    return len(size) == 3 and size[0] > expert and size[1:] == inner


def _suffixes(name: str) -> Iterator[str]:
    """Yield what a name ends in, by whole parts, itself left out."""
    while "." in name:
        name = name.split(".", 1)[1]
        yield name


def _parents(parent: str) -> list[str]:
    """Return the names of a block of experts: as it is, and as the other convention has it."""
    others = [parent.removesuffix(end) + other for end in _BLOCKS if parent.endswith(end) for other in _BLOCKS]
    return list(dict.fromkeys((parent, *others)))


def _spellings(name: str) -> list[str]:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return [name]
    leaf = match["part"]
    leaves = dict.fromkeys((leaf, _LEAVES.get(leaf, leaf), _GENERIC.get(leaf, leaf)))
    return [
        f"{parent}.experts.{match['expert']}.{one}.weight" for parent in _parents(match["parent"]) for one in leaves
    ]


def _heads(part: int, rows: int, fused: int) -> bool:
    """Return whether q (part 0), k or v of some rows can be part of so many fused rows."""
    kv = (fused - rows) // 2 if part == 0 else rows
    queries = fused - 2 * kv
    return (
        kv > 0 and fused == queries + 2 * kv and (part > 0 or queries == rows) and queries >= kv and queries % kv == 0
    )


def _offsets(rows: int, stored: int) -> list[int]:
    """Return where so many rows could begin in a matrix: the whole, gate | up, q | k | v with any share of k and v."""
    if rows == stored:
        return [0]
    offsets: set[int] = set()
    if stored == 2 * rows:
        offsets |= {0, rows}
    if _heads(0, rows, stored):
        offsets.add(0)
    if _heads(1, rows, stored) and stored <= _MAX_GROUPS * rows:
        offsets |= {stored - 2 * rows, stored - rows}
    return sorted(offsets)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that puts layer 2 before layer 10; numbers are compared by length first, however long."""
    parts = re.split(r"(\d+)", name)
    numbers = [part.lstrip("0") if part.isdigit() else part for part in parts]
    return [(len(text) if part.isdigit() else 0, text) for part, text in zip(parts, numbers, strict=True)], name
