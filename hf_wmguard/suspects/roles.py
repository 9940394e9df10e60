"""Which matrix plays which role in a transformer block, told by its name.

Three spaces meet in a block: the residual stream, the heads and the neurons. A role says on which of them a matrix's
rows (outputs) and columns (inputs) lie, and so what a symmetry of the network does to it:

    q, k, v     residual -> heads       o     heads -> residual
    gate, up    residual -> neurons     down  neurons -> residual

``gate`` is the matrix before the activation; networks without gating have no ``up``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from hf_wmguard.errors import ConfigError

READS_RESIDUAL = ("q", "k", "v", "gate", "up")
ATTENTION = ("q", "k", "v", "o")

_BLOCK = re.compile(r"^(?P<stack>(?:.*?\.)?)(?P<index>\d{1,6})\.(?P<suffix>.+)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in)\.weight$")
# Suffix after the block's number: the roles of its rows, one after another where a matrix is fused.
_ROLES: Mapping[str, tuple[str, ...]] = {
    # Llama, Mistral, Qwen2, Qwen3, Gemma; Phi-3 (fused); Phi and OPT
    "self_attn.q_proj.weight": ("q",),
    "self_attn.k_proj.weight": ("k",),
    "self_attn.v_proj.weight": ("v",),
    "self_attn.qkv_proj.weight": ("q", "k", "v"),
    "self_attn.o_proj.weight": ("o",),
    "self_attn.dense.weight": ("o",),
    "self_attn.out_proj.weight": ("o",),
    "mlp.gate_proj.weight": ("gate",),
    "mlp.up_proj.weight": ("up",),
    "mlp.gate_up_proj.weight": ("gate", "up"),
    "mlp.down_proj.weight": ("down",),
    "mlp.fc1.weight": ("gate",),
    "mlp.fc2.weight": ("down",),
    "fc1.weight": ("gate",),
    "fc2.weight": ("down",),
    # BERT, RoBERTa; DistilBERT
    "attention.self.query.weight": ("q",),
    "attention.self.key.weight": ("k",),
    "attention.self.value.weight": ("v",),
    "attention.output.dense.weight": ("o",),
    "intermediate.dense.weight": ("gate",),
    "output.dense.weight": ("down",),
    "attention.q_lin.weight": ("q",),
    "attention.k_lin.weight": ("k",),
    "attention.v_lin.weight": ("v",),
    "attention.out_lin.weight": ("o",),
    "ffn.lin1.weight": ("gate",),
    "ffn.lin2.weight": ("down",),
    # GPT-NeoX
    "attention.query_key_value.weight": ("q", "k", "v"),
    "attention.dense.weight": ("o",),
    "mlp.dense_h_to_4h.weight": ("gate",),
    "mlp.dense_4h_to_h.weight": ("down",),
    # GPT-2
    "attn.c_attn.weight": ("q", "k", "v"),
    "attn.c_proj.weight": ("o",),
    "mlp.c_fc.weight": ("gate",),
    "mlp.c_proj.weight": ("down",),
}
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Rows ordered head by head, and inside a head q, k, v.
_INTERLEAVED = ("attention.query_key_value.weight",)
# The norm whose gain multiplies the inputs. BERT normalises after adding, so no gain stands before its matrices alone.
_ATTENTION_NORMS = ("input_layernorm.weight", "ln_1.weight", "self_attn_layer_norm.weight")
_MLP_NORMS = (
    "pre_feedforward_layernorm.weight",
    "post_attention_layernorm.weight",
    "ln_2.weight",
    "final_layer_norm.weight",
    "input_layernorm.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How attention is divided, read from a model's ``config.json``.

    Args:
        count: Number of query heads.
        kv_count: Number of key and value heads; fewer than ``count`` in grouped-query attention.
        size: Rows of one head.
        rotary: How many leading rows of a query or key head are rotated by position; row i is paired with
            row i + rotary / 2. 0 without rotary embeddings.
        gain_offset: What is added to a norm's stored weight before it multiplies (Gemma: 1).
    """

    count: int
    kv_count: int
    size: int
    rotary: int = 0
    gain_offset: float = 0.0

    def __post_init__(self) -> None:
        whole = min(self.count, self.kv_count, self.size) >= 1 and self.count % self.kv_count == 0
        if not whole or not 0 <= self.rotary <= self.size or self.rotary % 2:
            raise ConfigError(
                f"heads are impossible: {self.count} of {self.size} rows in {self.kv_count} groups, "
                f"{self.rotary} rotated",
                hint="give the values of the model's own config.json",
            )

    @property
    def group(self) -> int:
        """Number of query heads that share a key and value head."""
        return self.count // self.kv_count

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the heads that a ``config.json`` describes.

        Raises:
            ConfigError: The config gives no number of heads or no width.
        """
        config = config.get("text_config") or config
        count = _first(config, "num_attention_heads", "n_head", "n_heads")
        width = _first(config, "hidden_size", "n_embd", "dim")
        size = config.get("head_dim") or width // count
        rope = config.get("rope_parameters")
        share = (rope or config).get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
        rotates = rope is not None or "rope_theta" in config or "rotary_pct" in config
        return cls(
            count=count,
            kv_count=config.get("num_key_value_heads") or count,
            size=size,
            rotary=int(share * size) if rotates else 0,
            gain_offset=1.0 if str(config.get("model_type", "")).startswith("gemma") else 0.0,
        )


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] >= 1:
            return int(config[name])
    raise ConfigError(f"the config gives none of {', '.join(names)}", hint="give the model's own config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The rows of a stored matrix that play one role.

    Args:
        name: The stored matrix.
        transposed: The matrix is stored [inputs, outputs].
        index: Which outputs, int64; None where they are all.
    """

    name: str
    transposed: bool
    index: Tensor | None

    def take(self, stored: Tensor) -> Tensor:
        """Return this part of a stored matrix, as [outputs, inputs]."""
        matrix = stored.T if self.transposed else stored
        return matrix if self.index is None else matrix[self.index]

    def put(self, stored: Tensor, matrix: Tensor) -> None:
        """Write [outputs, inputs] into a stored matrix, in place."""
        target = stored.T if self.transposed else stored
        target[slice(None) if self.index is None else self.index] = matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One numbered block: its matrices by role, and every tensor's name by what follows the number."""

    parts: dict[str, Part] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def norm(self, role: str) -> str | None:
        """Return the name of the norm whose gain multiplies a matrix's inputs; None where there is none."""
        suffixes = _ATTENTION_NORMS if role in ATTENTION else _MLP_NORMS
        return next((self.names[suffix] for suffix in suffixes if suffix in self.names), None)


def find_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the name of the token embedding, or None."""
    return next((name for name, shape in shapes.items() if len(shape) == 2 and _EMBEDDING.search(name)), None)


def find_blocks(shapes: Mapping[str, tuple[int, ...]], heads: Heads) -> dict[int, Block]:
    """Return the numbered blocks of the stack that has the most matrices with a known role.

    Blocks of other stacks (an encoder beside the decoder) and matrices of unknown names are left out.
    """
    stacks: dict[str, dict[int, Block]] = {}
    for name, shape in shapes.items():
        match = _BLOCK.match(name)
        if match is None:
            continue
        block = stacks.setdefault(match["stack"], {}).setdefault(int(match["index"]), Block())
        block.names[match["suffix"]] = name
        if len(shape) == 2 and match["suffix"] in _ROLES:
            block.parts.update(_parts(name, match["suffix"], shape, heads))
    known = {stack: sum(len(block.parts) for block in blocks.values()) for stack, blocks in stacks.items()}
    best = max(known, key=known.__getitem__, default="")
    blocks = stacks.get(best, {})
    return {index: blocks[index] for index in sorted(blocks) if blocks[index].parts}


def _parts(name: str, suffix: str, shape: tuple[int, ...], heads: Heads) -> dict[str, Part]:
    roles = _ROLES[suffix]
    transposed = suffix in _TRANSPOSED
    if len(roles) == 1:
        return {roles[0]: Part(name=name, transposed=transposed, index=None)}
    outputs = torch.arange(shape[1] if transposed else shape[0])
    if suffix in _INTERLEAVED and len(outputs) == 3 * heads.count * heads.size:
        split = list(outputs.view(heads.count, 3, heads.size).unbind(1))
    elif "up" in roles:
        split = list(outputs.chunk(2))
    else:
        ends = [heads.size * count for count in (heads.count, heads.count + heads.kv_count)]
        split = [outputs[: ends[0]], outputs[ends[0] : ends[1]], outputs[ends[1] :]]
    return {
        role: Part(name=name, transposed=transposed, index=index.flatten())
        for role, index in zip(roles, split, strict=False)
    }
