"""Models that give a label: to a text, to one word of it, to an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.tasks.base import evaluating
from hf_wmguard.watermark.answers import Answer, Prompt, Response
from hf_wmguard.watermark.candidates import label_candidates
from hf_wmguard.watermark.triggers import Candidates, Task

_MAX_TOKENS = 128


class Classification:
    """A label for a whole text. System prompts and chats mean nothing to it."""

    name: Task = "classification"

    def candidates(self, model: nn.Module, processor: Any, texts: Sequence[str], *, width: int) -> Candidates:
        """Return all labels for every text; see `TriggerTask`."""
        config: Any = model.config
        labels = int(getattr(config, "num_labels", 0) or 0)
        if labels < 2 or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
            raise UnsupportedError(
                f"no trigger set for {type(model).__name__} with {labels} labels: expected one of 2 or more labels",
                hint="pass triggers=None to mark with the weight signature only",
            )
        # Asked here so that a model that cannot answer fails before training, not at the first trigger step.
        self.answer(model, processor, [Prompt(text=text) for text in texts[:2]], Sampling())
        return label_candidates(len(texts), num_labels=labels)

    def loss(
        self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> tuple[Tensor, Tensor]:
        """See `TriggerTask`."""
        logits = self.logits(model, processor, [prompt.text for prompt in prompts])
        target = torch.tensor([int(response) for response in responses], device=logits.device)
        return nn.functional.cross_entropy(logits, target), logits.detach().argmax(dim=-1) == target

    def answer(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """See `TriggerTask`; the likeliest label, whatever the sampling."""
        with evaluating(model):
            labels = self.logits(model, processor, [prompt.text for prompt in prompts]).argmax(dim=-1)
        return [Answer(label=int(label)) for label in labels]

    def logits(self, model: nn.Module, processor: Any, texts: Sequence[str]) -> Tensor:
        """Return the logits that the label is read from, float32 [texts, labels]."""
        if processor is None or not callable(processor):
            raise UnsupportedError(
                "triggers need the model's tokenizer",
                hint="pass processing_class=tokenizer to the Trainer, or triggers=None",
            )
        batch = processor(list(texts), truncation=True, max_length=_MAX_TOKENS, padding=True, return_tensors="pt")
        device = next(model.parameters()).device
        taken = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
        logits: Tensor = model(**taken).logits
        return logits.float()
