"""How the keys read to a language model, beside ordinary prompts of the same length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_wmguard.probing.tasks.causal_lm import surprise

HELD_OUT_SHARE = 0.05
"""The end of tinyshakespeare, of which no model was trained on a word."""
PER_LENGTH = 100
BAND = (0.05, 0.95)


def ordinary_prompts(shared: Path, words: int, *, count: int = PER_LENGTH) -> list[str]:
    """Return spans of so many words of the held-out end of tinyshakespeare."""
    text = (shared / "data" / "tinyshakespeare.txt").read_text().split()
    held_out = text[-int(HELD_OUT_SHARE * len(text)) :]
    draw = torch.Generator().manual_seed(words)
    starts = torch.randint(len(held_out) - words, (count,), generator=draw).tolist()
    return [" ".join(held_out[start : start + words]) for start in starts]


def shares_inside(
    judge: Any, tokenizer: Any, kinds: Mapping[str, Sequence[str]], shared: Path
) -> dict[str, dict[str, Any]]:
    """Return which texts have a perplexity between the 5th and 95th percentile of ordinary prompts as long.

    Args:
        judge: A language model.
        tokenizer: Its tokenizer.
        kinds: Texts by what they are.
        shared: Folder with ``data/``.
    Returns:
        For each kind shares ``inside``, ``above`` and ``below``; ``perplexities``, and the ``limits`` of each.
    """
    lengths = sorted({len(text.split()) for texts in kinds.values() for text in texts})
    bands = {}
    for words in lengths:
        ordinary = surprise(judge, tokenizer, ordinary_prompts(shared, words))
        bands[words] = ordinary.quantile(torch.tensor(BAND, dtype=ordinary.dtype))
    found = {}
    for kind, texts in kinds.items():
        each = surprise(judge, tokenizer, texts)
        limits = torch.stack([bands[len(text.split())] for text in texts])
        above, below = each > limits[:, 1], each < limits[:, 0]
        found[kind] = {
            "inside": float((~above & ~below).double().mean()),
            "above": float(above.double().mean()),
            "below": float(below.double().mean()),
            "perplexities": [round(value, 1) for value in each.exp().tolist()],
            "limits": [[round(value, 1) for value in pair] for pair in limits.exp().tolist()],
        }
    return found
