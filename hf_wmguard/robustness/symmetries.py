"""What a thief can do to weights without changing what the network computes, so that no tile lies where it did.

Each function takes a state dict and returns another one; the input is left alone. Unless its docstring says
otherwise the function of the network stays the same, up to rounding. All of them know the Llama family (RMSNorm
before the blocks, gated neurons, rotary heads in groups) and BERT; those that need a norm before the blocks refuse
BERT by name. Random choices come from a seed. All of them raise `UnsupportedError` where a block lacks a matrix of a
known name, such as a mixture of experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.suspects.roles import ATTENTION, READS_RESIDUAL, Block, Heads, find_blocks, find_embedding

StateDict = Mapping[str, Tensor]

# A pooler reads the residual stream; its bias, and the classifier behind it, stand in another space.
_POOLER = re.compile(r"(^|\.)(pooler\.dense|pre_classifier|classifier\.dense)\.")
_CLASSIFIER = re.compile(r"(^|\.)classifier\.(out_proj\.)?(weight|bias)$")
_FINAL_NORM = re.compile(r"(^|\.)(norm|ln_f|final_layernorm)\.weight$")
_NORM = re.compile(r"norm\.weight$")
_QUERY_NORM = ("q_norm.weight", "q_layernorm.weight")
_HEAD = "lm_head.weight"
_SCORE = "score.weight"
_NUMBER = re.compile(r"^(.*?\.)(\d+)(\..+)$")


class _Model:
    """A copy of a state dict whose matrices are read and written by role, [outputs, inputs], with their biases."""

    def __init__(self, tensors: StateDict, heads: Heads) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.blocks = find_blocks({name: tuple(tensor.shape) for name, tensor in tensors.items()}, heads)
        self.heads = heads
        lacks = sorted(
            {role for block in self.blocks.values() for role in (*ATTENTION, "gate", "down") if role not in block.parts}
        )
        if lacks or not self.blocks:
            raise UnsupportedError(
                f"no matrices of known names for {', '.join(lacks)}" if lacks else "no blocks of known names",
                hint="symmetries are known for dense transformers whose names `suspects.roles` lists",
            )

    def get(self, block: Block, role: str) -> Tensor:
        part = block.parts[role]
        return part.take(self.tensors[part.name])

    def set(self, block: Block, role: str, matrix: Tensor) -> None:
        """Replace a matrix; one that is fused with others keeps its size."""
        part = block.parts[role]
        old = self.tensors[part.name]
        if part.index is None:
            self.tensors[part.name] = (matrix.T if part.transposed else matrix).to(old.dtype).contiguous()
        else:
            part.put(old, matrix.to(old.dtype))

    def outputs(self, block: Block, role: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change a matrix [outputs, inputs] and its bias, as [outputs, 1], alike."""
        self.set(block, role, change(self.get(block, role)))
        part = block.parts[role]
        bias = self.tensors.get(part.name.removesuffix("weight") + "bias")
        if bias is not None:
            index = slice(None) if part.index is None else part.index
            changed = change(bias[index][:, None])[:, 0].to(bias.dtype)
            if part.index is None:
                self.tensors[part.name.removesuffix("weight") + "bias"] = changed.contiguous()
            else:
                bias[index] = changed

    def inputs(self, block: Block, role: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change a matrix, given as [inputs, outputs]."""
        self.set(block, role, change(self.get(block, role).T).T)

    def by_head(self, block: Block, role: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change the head side of an attention matrix, given as [heads, size, anything]."""

        def on_rows(rows: Tensor) -> Tensor:
            return change(rows.reshape(-1, self.heads.size, rows.shape[1])).reshape(rows.shape)

        (self.inputs if role == "o" else self.outputs)(block, role, on_rows)

    def neurons(self, block: Block, change: Callable[[Tensor], Tensor]) -> None:
        """Change gate, up and, as [neurons, residual], down alike."""
        for role in ("gate", "up"):
            if role in block.parts:
                self.outputs(block, role, change)
        self.inputs(block, "down", change)


def neuron_count(tensors: StateDict, heads: Heads) -> int:
    """Return the number of neurons of a block."""
    model = _Model(tensors, heads)
    return len(model.get(next(iter(model.blocks.values())), "gate"))


def is_gated(tensors: StateDict, heads: Heads) -> bool:
    """Return whether neurons are gated."""
    return any("up" in block.parts for block in _Model(tensors, heads).blocks.values())


def permute_neurons(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return the neurons of every block in another order."""
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    for block in model.blocks.values():
        order = torch.randperm(len(model.get(block, "gate")), generator=draw)
        model.neurons(block, lambda rows, order=order: rows[order])  # type: ignore[misc]
    return model.tensors


def scale_neurons(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return neurons scaled by 0.25 to 4, in gated networks with either sign, and scaled back in ``down``.

    Without gating this keeps the function of ReLU networks alone.
    """
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    for block in model.blocks.values():
        gated = "up" in block.parts
        count = len(model.get(block, "gate"))
        scale = 4 ** (2 * torch.rand(count, 1, generator=draw) - 1)
        if gated:
            scale *= 2 * torch.randint(0, 2, (count, 1), generator=draw) - 1
        model.outputs(block, "up" if gated else "gate", lambda rows, scale=scale: rows * scale)  # type: ignore[misc]
        model.inputs(block, "down", lambda rows, scale=scale: rows / scale)  # type: ignore[misc]
    return model.tensors


def add_neurons(tensors: StateDict, heads: Heads, *, count: int, seed: int) -> dict[str, Tensor]:
    """Return every block with ``count`` more neurons, anywhere among the others, whose output is multiplied by 0."""
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    for block in model.blocks.values():
        order = torch.randperm(len(model.get(block, "gate")) + count, generator=draw)
        for role in ("gate", "up"):
            if role in block.parts:
                model.outputs(block, role, lambda rows, order=order: _with_noise(rows, count, draw)[order])  # type: ignore[misc]
        model.inputs(
            block,
            "down",
            lambda rows, order=order: torch.cat([rows, rows.new_zeros(count, rows.shape[1])])[order],  # type: ignore[misc]
        )
    return model.tensors


def _with_noise(rows: Tensor, count: int, draw: torch.Generator) -> Tensor:
    noise = torch.randn(count, rows.shape[1], generator=draw) * rows.float().square().mean().sqrt()
    return torch.cat([rows, noise.to(rows.dtype)])


def split_neurons(tensors: StateDict, heads: Heads, *, count: int, seed: int) -> dict[str, Tensor]:
    """Return every block with ``count`` neurons made two, whose outputs add up to the one's, anywhere."""
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    for block in model.blocks.values():
        size = len(model.get(block, "gate"))
        twice = torch.randperm(size, generator=draw)[:count]
        share = torch.rand(count, 1, generator=draw)
        whole = torch.ones(size, 1)
        whole[twice] = share
        order = torch.randperm(size + count, generator=draw)
        parts = torch.cat([torch.arange(size), twice])[order]
        shares = torch.cat([whole, 1 - share])[order]
        for role in ("gate", "up"):
            if role in block.parts:
                model.outputs(block, role, lambda rows, parts=parts: rows[parts])  # type: ignore[misc]
        model.inputs(block, "down", lambda rows, parts=parts, shares=shares: rows[parts] * shares)  # type: ignore[misc]
    return model.tensors


def permute_heads(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return key and value heads, each with its query heads, in another order, and these in another inside."""
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    for block in model.blocks.values():
        kv = torch.randperm(heads.kv_count, generator=draw)
        inside = torch.stack([torch.randperm(heads.group, generator=draw) for _ in range(heads.kv_count)])
        queries = (kv[:, None] * heads.group + inside).flatten()
        for role in ATTENTION:
            order = kv if role in ("k", "v") else queries
            model.by_head(block, role, lambda rows, order=order: rows[order])  # type: ignore[misc]
    return model.tensors


def scale_queries(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return the keys of each head scaled by 0.25 to 4 and its queries scaled back."""

    def draw_maps(draw: torch.Generator) -> Tensor:
        return 4 ** (2 * torch.rand(heads.kv_count, 1, 1, generator=draw) - 1) * torch.eye(heads.size)

    return _map_pairs(tensors, heads, ("k", "q"), draw_maps, seed=seed)


def rotate_queries(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return keys mapped in every head and queries mapped back, by maps that the position embedding commutes with.

    With rotary embeddings each pair of rows is turned and scaled by 0.5 to 2; without, the map is any invertible one.
    """

    def draw_maps(draw: torch.Generator) -> Tensor:
        if not heads.rotary:
            return _invertible(heads.kv_count, heads.size, draw)
        half = heads.rotary // 2
        angle = 2 * torch.pi * torch.rand(heads.kv_count, half, generator=draw)
        scale = 2 ** (2 * torch.rand(heads.kv_count, half, generator=draw) - 1)
        maps = torch.eye(heads.size).repeat(heads.kv_count, 1, 1)
        one = torch.arange(half)
        two = one + half
        maps[:, one, one] = maps[:, two, two] = scale * angle.cos()
        maps[:, one, two] = scale * angle.sin()
        maps[:, two, one] = -maps[:, one, two]
        return maps

    return _map_pairs(tensors, heads, ("k", "q"), draw_maps, seed=seed)


def map_values(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return the values of each head under an invertible map, of condition 4 or less, undone in O."""
    return _map_pairs(tensors, heads, ("v", "o"), lambda draw: _invertible(heads.kv_count, heads.size, draw), seed=seed)


def _invertible(count: int, size: int, draw: torch.Generator) -> Tensor:
    left, right = torch.linalg.qr(torch.randn(2, count, size, size, generator=draw)).Q
    stretches = 2 ** (2 * torch.rand(count, 1, size, generator=draw) - 1)
    return torch.bmm(left * stretches, right)


def _map_pairs(
    tensors: StateDict,
    heads: Heads,
    roles: tuple[str, str],
    draw_maps: Callable[[torch.Generator], Tensor],
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Return the first role's heads under maps [kv heads, size, size], and the second's under what undoes them."""
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    if "k" in roles and any(name.endswith(_QUERY_NORM) for name in tensors):
        raise UnsupportedError("queries and keys are normalised behind their matrices", hint="map the values instead")
    for block in model.blocks.values():
        maps = draw_maps(draw)
        back = torch.linalg.inv(maps).mT.repeat_interleave(heads.group, dim=0)
        for role, one in zip(roles, (maps, back), strict=True):
            model.by_head(block, role, lambda rows, one=one: one @ rows.float())  # type: ignore[misc]
    return model.tensors


def permute_residual(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return the channels of the residual stream in another order, from the embeddings to the head."""
    model, draw = _Model(tensors, heads), torch.Generator().manual_seed(seed)
    order = torch.randperm(_width(model), generator=draw)
    _move_residual(model, lambda rows: rows[:, order])
    return model.tensors


def rotate_residual(tensors: StateDict, heads: Heads, *, seed: int) -> dict[str, Tensor]:
    """Return the residual stream turned by a random orthogonal matrix, its norms' gains folded first.

    A tied head comes out as a tensor of its own: the config must say ``tie_word_embeddings`` false.

    Raises:
        UnsupportedError: A norm has a bias, and so is a LayerNorm, or stands behind its matrices (Gemma 2): only
            permutations commute with those.
    """
    model, draw = _Model(fold_norms(tensors, heads), heads), torch.Generator().manual_seed(seed)
    width = _width(model)
    gains = [gain for name, gain in model.tensors.items() if _NORM.search(name) and gain.shape == (width,)]
    if any(bool((gain != gain[0]).any()) for gain in gains):
        raise UnsupportedError(
            "a norm behind the matrices has gains that cannot be folded", hint="permute the residual stream instead"
        )
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    _move_residual(model, lambda rows: rows if len(rows) == 1 else (rows.float() @ turn).to(rows.dtype))
    return model.tensors


def _width(model: _Model) -> int:
    return model.get(next(iter(model.blocks.values())), "gate").shape[1]


def _move_residual(model: _Model, change: Callable[[Tensor], Tensor]) -> None:
    """Change every tensor's residual side, given as [anything, channels]; a norm is one row."""
    width = _width(model)
    seen = set()
    for block in model.blocks.values():
        for role, part in block.parts.items():
            bias = part.name.removesuffix("weight") + "bias"
            seen.add(part.name)
            if role in READS_RESIDUAL:
                seen.add(bias)
                model.set(block, role, change(model.get(block, role)))
            else:
                model.set(block, role, change(model.get(block, role).T).T)
    last = _CLASSIFIER if any(map(_POOLER.search, model.tensors)) else None
    for name, tensor in model.tensors.items():
        behind = (_POOLER.search(name) and name.endswith("bias")) or (last and last.search(name))
        if name in seen or behind or tensor.shape[-1:] != (width,):
            continue
        rows = tensor if tensor.dim() == 2 else tensor[None]
        model.tensors[name] = change(rows).reshape(tensor.shape).contiguous()


def fold_norms(tensors: StateDict, heads: Heads) -> dict[str, Tensor]:
    """Return norms without a gain, theirs moved into the matrices behind them.

    A tied head comes out as a tensor of its own: the config must say ``tie_word_embeddings`` false.

    Raises:
        UnsupportedError: The blocks do not begin with an RMSNorm.
    """
    model = _Model(tensors, heads)
    for block in model.blocks.values():
        for role in READS_RESIDUAL:
            if role in block.parts:
                gain = _rms_gain(model, block.norm(role))
                model.set(block, role, model.get(block, role) * gain)
        for name in {block.norm("q"), block.norm("gate")} - {None}:
            model.tensors[str(name)].fill_(1 - heads.gain_offset)
    final = next((name for name in tensors if _FINAL_NORM.search(name) and not _NUMBER.match(name)), None)
    gain = _rms_gain(model, final)
    embedding = find_embedding({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    # A classifier's head, or a causal model's, which may be the embedding.
    for name in [name for name in (_HEAD, _SCORE) if name in tensors] or [_HEAD]:
        head = tensors.get(name, tensors[str(embedding)])
        model.tensors[name] = (head * gain).to(head.dtype)
    model.tensors[str(final)].fill_(1 - heads.gain_offset)
    return model.tensors


def _rms_gain(model: _Model, name: str | None) -> Tensor:
    if name is None or name.removesuffix("weight") + "bias" in model.tensors:
        raise UnsupportedError(
            "norms can be folded only where an RMSNorm stands before the matrices",
            hint="for a model with LayerNorm, permute the residual stream instead",
        )
    return model.tensors[name] + model.heads.gain_offset


def keep_layers(tensors: StateDict, heads: Heads, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return only some blocks, in the order given, a doubled one twice. This does change the function.

    The config's number of layers must be set to ``len(layers)``.
    """
    blocks = _Model(tensors, heads).blocks
    inside = {name: index for index, block in blocks.items() for name in block.names.values()}
    result = {name: tensor.clone() for name, tensor in tensors.items() if name not in inside}
    for place, index in enumerate(layers):
        for name in blocks[index].names.values():
            result[_renumbered(name, place)] = tensors[name].clone()
    return result


def _renumbered(name: str, index: int) -> str:
    match = _NUMBER.match(name)
    return name if match is None else f"{match[1]}{index}{match[3]}"


def resize_vocabulary(tensors: StateDict, heads: Heads, *, rows: int, seed: int) -> dict[str, Tensor]:
    """Return embedding and head cut to ``rows`` tokens, or lengthened by random ones.

    The function stays the same for the tokens that both have.
    """
    draw = torch.Generator().manual_seed(seed)
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    embedding = find_embedding({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name in [name for name in (embedding, _HEAD) if name in tensors]:
        old = result[str(name)]
        more = max(0, rows - len(old))
        result[str(name)] = _with_noise(old, more, draw)[:rows].contiguous()
    return result
