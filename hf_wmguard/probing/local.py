"""Ask a model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.probing.tasks.base import BATCH_SIZE, evaluating
from hf_wmguard.watermark.answers import Answer, Prompt
from hf_wmguard.watermark.triggers import TriggerSet


class LocalAsker:
    """An `Asker` over a model in this process.

    Args:
        model: A model of one of the kinds that `task_of` knows.
        processor: Its tokenizer or image processor.
    Raises:
        UnsupportedError: A model of another kind.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.task = task_of(model)
        self._model = model
        self._processor = processor

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """See `Asker`; answers come batch by batch."""
        for start in range(0, len(prompts), BATCH_SIZE):
            yield from self.task.answer(self._model, self._processor, prompts[start : start + BATCH_SIZE], sampling)


def count_learned(model: nn.Module, processor: Any, triggers: TriggerSet) -> int:
    """Return how many triggers a model's likeliest answer is the response to: what was learned, no evidence."""
    task, learned = task_of(model), 0
    with evaluating(model):
        for start in range(0, triggers.count, BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            prompts = [Prompt(text=text) for text in triggers.texts[part]]
            _, matched = task.loss(model, processor, prompts, triggers.responses[part])
            learned += int(matched.sum())
    return learned
