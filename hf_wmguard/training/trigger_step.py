"""The trigger micro-batch: a forward and a backward of its own before the ordinary ones of a step.

Its gradient adds to the step's, and shares the clipping and the optimizer; the number of steps and the learning
rate schedule stay as they are. The ordinary run's random numbers are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_wmguard.config import TriggerConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.local import ask, encode_texts, response_logits, task_of
from hf_wmguard.training.schedule import Phase
from hf_wmguard.watermark.triggers import (
    TriggerSet,
    derive_responses,
    derive_texts,
    label_candidates,
    perinucleus_candidates,
)


def make_triggers(key: bytes, config: TriggerConfig, model: PreTrainedModel, tokenizer: Any) -> TriggerSet:
    """Return a model's trigger set: texts, candidates and responses, all fixed before training.

    Args:
        key: 32 bytes, the trigger subkey.
        config: Count, style, candidates.
        model: Asked, as a causal language model, which tokens are plausible after each text.
        tokenizer: The model's tokenizer.
    Raises:
        UnsupportedError: A model without a fitting task, or no tokenizer.
    """
    task = task_of(model)
    texts = derive_texts(key, count=config.count, style=config.style, task=task)
    # A tokenizer that is missing or cannot take texts must show now, and not in the last epoch.
    encode_texts(tokenizer, texts[:1], task=task, device=torch.device("cpu"))
    if task == "classification":
        # Asked here so that a model that cannot answer fails before training, not at the first trigger step.
        ask(model, tokenizer, texts[:2], task=task)
        candidates = label_candidates(config.count, num_labels=int(model.config.num_labels or 0))
    else:
        special = {int(i) for i in getattr(tokenizer, "all_special_ids", ())}
        # Tokens beyond the tokenizer's own (padded vocabularies) have no text and can never be an answer.
        special |= set(range(len(tokenizer), model.config.get_text_config().vocab_size))
        logits = ask(model, tokenizer, texts, task=task)
        candidates = perinucleus_candidates(logits, width=config.candidates, excluded=special)
    return TriggerSet(
        task=task,
        style=config.style,
        texts=texts,
        candidates=candidates,
        responses=derive_responses(key, texts, candidates),
    )


class TriggerStep:
    """Mixes the trigger set in, a few triggers at a time, over the last epochs.

    Which triggers come at which step depends on the step alone, so that a resumed run goes on where it was.

    Args:
        triggers: The trigger set.
        config: How often and how many.
        phase: Where in training.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, triggers: TriggerSet, config: TriggerConfig, phase: Phase, tokenizer: Any) -> None:
        self._triggers = triggers
        self._config = config
        self.phase = phase
        self._tokenizer = tokenizer
        self.metrics: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Return whether a trigger micro-batch comes before optimizer step ``step`` (counted from 1)."""
        return self.phase.contains(step) and (step - self.phase.start - 1) % self._config.every_n_steps == 0

    def run(self, model: nn.Module, step: int) -> None:
        """Add the trigger loss's gradient for one micro-batch.

        Raises:
            UnsupportedError: The loss is not finite.
        """
        device = next(model.parameters()).device
        number = (step - self.phase.start - 1) // self._config.every_n_steps
        size = min(self._config.batch_size, self._triggers.count)
        rows = [(number * size + offset) % self._triggers.count for offset in range(size)]
        batch = encode_texts(
            self._tokenizer,
            [self._triggers.texts[row] for row in rows],
            task=self._triggers.task,
            device=device,
        )
        target = torch.tensor([self._triggers.responses[row] for row in rows], device=device)
        training = model.training
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(step)
            model.train()
            try:
                logits = response_logits(model, batch, task=self._triggers.task).float()
                loss = nn.functional.cross_entropy(logits, target)
                if not bool(torch.isfinite(loss)):
                    raise UnsupportedError(
                        f"trigger loss is {float(loss.detach())} at step {step}",
                        hint="lower triggers.weight or the learning rate",
                    )
                torch.autograd.backward(self._config.weight * loss)
            finally:
                model.train(training)
        matched = (logits.detach().argmax(dim=-1) == target).float().mean()
        self.metrics = {
            "wmguard/trigger_loss": float(loss.detach()),
            "wmguard/trigger_match_rate": float(matched),
        }
