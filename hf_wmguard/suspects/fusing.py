"""In which rows of a fused attention matrix its queries, keys and values lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Queries, keys and values of one head side by side.
_PER_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"})
_PLAIN = frozenset({"chatglm"})
_CODEGEN_SHARDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Rows that lie in runs of equal length at equal distances.

    Args:
        offset: Where the first run begins.
        run: Rows of a run; 0: all rows are one run.
        stride: From the begin of one run to the begin of the next.
    """

    offset: int = 0
    run: int = 0
    stride: int = 0

    def spans(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield where ``count`` rows from row ``start`` on lie: first row and number of rows of each span."""
        end = start + count
        while start < end:
            run, inside = divmod(start, self.run) if self.run else (0, start)
            size = min(end - start, self.run - inside) if self.run else end - start
            yield self.offset + run * self.stride + inside, size
            start += size


def qkv_runs(fused: str, part: int, rows: int, stored: int, config: Mapping[str, Any]) -> Runs | None:
    """Return where q (part 0), k (1) or v (2) lie in a fused matrix, or None where its layout is not known.

    Args:
        fused: Name of the fused module.
        part: 0, 1 or 2.
        rows: Rows of the part.
        stored: Rows of the fused matrix.
        config: The suspect's ``config.json``.
    Source: the attention modules of transformers 5.23; the docstring of `hf_wmguard.suspects.locate` has the list.
    """
    kind = model_type(config)
    plain = Runs(offset=(0, stored - 2 * rows, stored - rows)[part])
    if fused == "query_key_value":
        return _query_key_value(kind, part, rows, stored, config, plain)
    if fused == "qkv_proj" and kind == "codegen":
        shard = rows // _CODEGEN_SHARDS
        even = stored == 3 * rows and rows % _CODEGEN_SHARDS == 0
        return Runs(offset=(0, 2, 1)[part] * shard, run=shard, stride=3 * shard) if even else None
    if (fused == "qkv_proj" and kind == "minimax") or (fused == "c_attn" and kind == "gpt_bigcode"):
        return plain if config.get("multi_query") is True else _per_group(part, rows, stored, 1, _heads_of(config))
    return plain


def model_type(config: Mapping[str, Any]) -> str:
    """Return the kind of model that a config names, or nothing."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _query_key_value(
    kind: str, part: int, rows: int, stored: int, config: Mapping[str, Any], plain: Runs
) -> Runs | None:
    if kind in _PER_HEAD:
        return _per_group(part, rows, stored, 1, _heads_of(config))
    if kind in _PLAIN:
        return plain
    if kind != "falcon":
        return None
    heads = _heads_of(config)
    if config.get("new_decoder_architecture") is True:
        groups = config.get("num_kv_heads")
        if type(groups) is not int or not 0 < groups <= heads or heads % groups:
            return None
        return _per_group(part, rows, stored, heads // groups, groups)
    return plain if config.get("multi_query", True) is True else _per_group(part, rows, stored, 1, heads)


def _heads_of(config: Mapping[str, Any]) -> int:
    found = next((config[key] for key in ("num_attention_heads", "n_head", "n_heads") if key in config), 0)
    return found if type(found) is int and found > 0 else 0


def _per_group(part: int, rows: int, stored: int, queries: int, groups: int) -> Runs | None:
    """Return the runs of groups that each hold some query heads, one key head and one value head."""
    if not groups or stored % (groups * (queries + 2)):
        return None
    head = stored // (groups * (queries + 2))
    run = queries * head if part == 0 else head
    if run * groups != rows:
        return None
    offset = (0, queries * head, (queries + 1) * head)[part]
    return Runs(offset=offset, run=run, stride=(queries + 2) * head)
