"""What a suspect was asked and what it said: one rule that turns an answer into at most one candidate.

The rule knows the candidates and not the key, and picks at most one of them. Whatever a model says, the chance that the
pick is the keyed response is therefore at most 1/k for a model that was made without the key.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

Response = int | str
"""A label of a classifier, or the text that a generative model says."""

READ_WORDS: Final = 8
"""How far into an answer a response is looked for: chat models begin with phrases of their own."""

_OPENING: Final = " \t\r\n\"'`*_#>-([{.,:;!?\u2026\u201c\u201d\u2018\u2019\u00ab\u00bb\u2581\u0120"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question to a model.

    Args:
        text: The question; for images the seed that `trigger_image` draws from.
        system: A system prompt before it, or None.
        chat: Whether it goes through the chat template, as a message of the user.
    """

    text: str
    system: str | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model answered.

    Args:
        text: What a generative model said; empty for a classifier.
        label: What a classifier said, or None.
        ranked: First tokens of a generative model, the most likely first; empty where the model does not tell.
        refused: The model or its server did not answer this question.
    """

    text: str = ""
    label: int | None = None
    ranked: tuple[str, ...] = ()
    refused: bool = False


def normalise(text: str) -> str:
    """Return a text without opening spaces and punctuation, in one case and one Unicode form (NFKC)."""
    return unicodedata.normalize("NFKC", text).lstrip(_OPENING).casefold()


def are_distinct(candidates: Sequence[str]) -> bool:
    """Return whether no candidate, normalised, is empty or begins another one: an answer then names at most one."""
    ordered = sorted(normalise(candidate) for candidate in candidates)
    # Sorted, a text stands right before one of those that it begins.
    return all(ordered) and not any(b.startswith(a) for a, b in pairwise(ordered))


def read_answer(answer: Answer, candidates: Sequence[Response]) -> int | None:
    """Return the index of the candidate that an answer names, or None.

    A text names the first candidate that begins at one of its first `READ_WORDS` words. Where it names none, the
    candidate that begins with the likeliest of the ranked tokens counts.

    Args:
        answer: What the suspect said.
        candidates: Labels, or texts of which none begins another (`are_distinct`).
    """
    if answer.refused:
        return None
    if answer.label is not None:
        return next((i for i, candidate in enumerate(candidates) if candidate == answer.label), None)
    texts = [normalise(candidate) for candidate in candidates if isinstance(candidate, str)]
    rest = normalise(answer.text)
    for _ in range(READ_WORDS):
        for i, text in enumerate(texts):
            if rest.startswith(text):
                return i
        _, _, rest = rest.partition(" ")
        rest = rest.lstrip(_OPENING)
    for token in map(normalise, answer.ranked):
        # A token may be the whole of a candidate or its beginning; of two candidates that it begins, it names neither.
        named = [i for i, text in enumerate(texts) if token and (text.startswith(token) or token.startswith(text))]
        if len(named) == 1:
            return named[0]
    return None
