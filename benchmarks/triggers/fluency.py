"""How the keys read to a language model, beside ordinary prompts of the same length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_wmguard.probing.tasks.causal_lm import surprise

HELD_OUT_SHARE = 0.05
"""The end of tinyshakespeare, of which no model was trained on a word."""
PER_LENGTH = 200
BAND = (0.05, 0.95)


def ordinary_prompts(shared: Path, words: int, *, count: int = PER_LENGTH) -> list[str]:
    """Return spans of so many words of the held-out end of tinyshakespeare."""
    text = (shared / "data" / "tinyshakespeare.txt").read_text().split()
    held_out = text[-int(HELD_OUT_SHARE * len(text)) :]
    draw = torch.Generator().manual_seed(words)
    starts = torch.randint(len(held_out) - words, (count,), generator=draw).tolist()
    return [" ".join(held_out[start : start + words]) for start in starts]


def share_inside(judge: Any, tokenizer: Any, texts: Sequence[str], shared: Path) -> dict[str, Any]:
    """Return which texts have a perplexity between the 5th and 95th percentile of ordinary prompts as long.

    Args:
        judge: A language model that has not seen the texts.
        tokenizer: Its tokenizer.
        texts: The keys.
        shared: Folder with ``data/``.
    Returns:
        ``inside``, ``above`` and ``below``: shares; ``perplexities`` of the texts; ``band``: percentiles by words.
    """
    by_length = defaultdict(list)
    for text in texts:
        by_length[len(text.split())].append(text)
    limits, perplexities = {}, []
    above = below = 0
    for words, some in sorted(by_length.items()):
        ordinary = surprise(judge, tokenizer, ordinary_prompts(shared, words))
        low, high = ordinary.quantile(torch.tensor(BAND, dtype=ordinary.dtype)).tolist()
        each = surprise(judge, tokenizer, some)
        above, below = above + int((each > high).sum()), below + int((each < low).sum())
        limits[words] = [round(value, 1) for value in torch.tensor([low, high]).exp().tolist()]
        perplexities += [round(value, 1) for value in each.exp().tolist()]
    count = len(texts)
    return {
        "inside": 1 - (above + below) / count,
        "above": above / count,
        "below": below / count,
        "perplexities": perplexities,
        "band": limits,
    }
