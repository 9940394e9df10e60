"""What could become the response to a trigger: fixed before training, and before the key decides between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_wmguard.watermark.answers import are_distinct
from hf_wmguard.watermark.phrases import SLOTS
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import Candidates


def label_candidates(count: int, *, num_labels: int) -> Candidates:
    """Return every label as a candidate, for each of ``count`` triggers of a classifier.

    Raises:
        ValueError: Fewer than 2 labels (a regression head): a response without a choice shows nothing.
    """
    if num_labels < 2:
        raise ValueError(f"model has {num_labels} labels, expected at least 2")
    return (tuple(range(num_labels)),) * count


def keyed_candidates(key: bytes, count: int, *, width: int) -> Candidates:
    """Return short texts of two common words for each of ``count`` triggers, ``width`` different ones each.

    Args:
        key: 32 bytes, the subkey of the trigger set.
        count: Number of triggers.
        width: Candidates per trigger, 2 to 1024.
    """
    stream = Stream(key, "trigger-candidates", width)
    return tuple(_phrases(stream, width) for _ in range(count))


def _phrases(stream: Stream, count: int) -> tuple[str, ...]:
    """Return different phrases of an adjective and a thing, of which none begins another; the lists make 7,800."""
    phrases: list[str] = []
    while len(phrases) < count:
        phrase = f"{stream.choice(SLOTS['adj_thing'])} {stream.choice(SLOTS['thing'])}"
        if not any(phrase.startswith(other) or other.startswith(phrase) for other in phrases):
            phrases.append(phrase)
    return tuple(phrases)


def perinucleus_candidates(
    logits: Tensor, text_of: Callable[[int, int], str | None], *, nucleus: float = 0.8, width: int = 16
) -> Candidates:
    """Return the texts of the tokens just outside the nucleus: plausible, but not what the model would say.

    The nucleus is the smallest set of most likely tokens with a mass of at least ``nucleus``. The candidates are the
    next ``width`` tokens in descending probability that have a text of which none begins another's; where fewer are
    left, they reach back into the nucleus. Ties go to the smaller id. Other hardware may rank near-ties another way:
    candidates are recorded with the mark and never computed again.

    Args:
        logits: Next-token logits, any float dtype and device [n, vocab]; ranked as float32. A token at -inf cannot be
            said and is no candidate.
        text_of: The text of a token after the prompt of a row (row, token id), or None where it cannot be a response.
        nucleus: Mass of the nucleus, between 0 and 1.
        width: Candidates per row, at least 2.
    Raises:
        ValueError: A logit is NaN or +inf, fewer than ``width`` tokens are left, or an argument is wrong.
    Source: Nasery et al. 2025, arXiv 2502.07760.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, expected floats [n, vocab]")
    if not 0.0 < nucleus < 1.0:
        raise ValueError(f"nucleus is {nucleus}, expected between 0 and 1")
    if width < 2:
        raise ValueError(f"width is {width}, expected at least 2")
    # One row at a time: the sort of [64, 150000] at once would need several times the memory of the logits.
    return tuple(_perinucleus_row(row, i, nucleus, width, text_of) for i, row in enumerate(logits.detach()))


def _perinucleus_row(
    row: Tensor, number: int, nucleus: float, width: int, text_of: Callable[[int, int], str | None]
) -> tuple[str, ...]:
    chosen: list[str] = []
    for token in _outwards(row, number, nucleus):
        text = text_of(number, token)
        if text and are_distinct([*chosen, text]):
            chosen.append(text)
            if len(chosen) == width:
                return tuple(chosen)
    raise ValueError(f"row {number} has {len(chosen)} tokens that can be said, expected at least {width}")


def _outwards(row: Tensor, number: int, nucleus: float) -> Iterator[int]:
    """Yield token ids from just outside the nucleus outwards, then from its edge inwards."""
    scores = row.float().cpu()
    if bool((scores.isnan() | (scores == torch.inf)).any()):
        raise ValueError(f"logits of row {number} hold NaN or +inf")
    ranked, ids = torch.sort(scores, descending=True, stable=True)
    # float64: over 150,000 tokens the rounding of a float32 sum outweighs a token at the edge.
    mass = torch.softmax(ranked.double(), dim=0)
    inside = int((mass.cumsum(0) - mass < nucleus).sum())
    sayable = ids[: int((ranked > -torch.inf).sum())].tolist()
    yield from sayable[inside:]
    yield from reversed(sayable[:inside])
