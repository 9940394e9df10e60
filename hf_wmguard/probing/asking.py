"""Whom one can ask: a model in this process, a function, a server. All of them answer prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_wmguard.watermark.answers import Answer, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a generative model chooses its words.

    Args:
        temperature: 0 for the likeliest word, else at least 0.
        top_p: Share of the probability that is sampled from, above 0 and at most 1.
        max_tokens: Length of an answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 12


class Asker(Protocol):
    """Something that answers."""

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """Yield one answer per prompt, in their order, each as soon as it is there.

        Raises:
            EndpointError: Nothing can be asked any more; what was yielded before it stands.
        """
        ...
