"""What the training of triggers and the asking of a local model need to know of a kind of model: three methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_wmguard.probing.asking import Sampling
from hf_wmguard.watermark.answers import Answer, Prompt, Response
from hf_wmguard.watermark.triggers import Candidates, Task

BATCH_SIZE = 64


class TriggerTask(Protocol):
    """One kind of model.

    Attributes:
        name: As a trigger set records it.
    """

    name: Task

    def candidates(self, model: nn.Module, processor: Any, texts: Sequence[str], *, width: int) -> Candidates:
        """Return what could become the response to each text; fixed before training.

        Args:
            model: The model before training; asked in evaluation mode, and left as it was.
            processor: Its tokenizer or image processor.
            texts: The triggers.
            width: Candidates per trigger, where the model's labels do not say how many there are.
        Raises:
            UnsupportedError: No processor, one that cannot take the triggers, or a model that cannot answer them.
        """
        ...

    def loss(
        self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of answering as wanted, masked to the responses, and what was answered so.

        The model's mode is the caller's; gradients flow.

        Returns:
            The mean loss, float32 []; whether the model's likeliest answer is the response, bool [prompts].
        """
        ...

    def answer(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one answer per prompt, in evaluation mode; the model is left as it was."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without gradients, and back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
