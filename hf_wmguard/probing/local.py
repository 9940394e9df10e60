"""Ask a model in this process the triggers, and read its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.watermark.triggers import TriggerSet

BATCH_SIZE = 64
_MAX_TOKENS = 128


def task_of(model: nn.Module) -> Literal["classification", "causal_lm"]:
    """Return which kind of trigger set fits a model.

    Raises:
        UnsupportedError: Neither a sequence classifier with two or more labels nor a causal language model.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification") and getattr(model.config, "num_labels", 0) >= 2:
        return "classification"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    raise UnsupportedError(
        f"no trigger set for {name}: expected a sequence classifier with 2 or more labels, or a causal language model",
        hint="pass triggers=None to mark with the weight signature only",
    )


def encode_texts(tokenizer: Any, texts: Sequence[str], *, task: str, device: torch.device) -> dict[str, Tensor]:
    """Return texts as a batch padded on the right.

    Args:
        tokenizer: The model's tokenizer.
        texts: The texts.
        task: For a causal language model a closing end-of-text token is taken off, so that the model goes on.
        device: Where the batch goes.
    Returns:
        ``input_ids`` and ``attention_mask``, int64 [texts, longest].
    Raises:
        UnsupportedError: There is no tokenizer.
    """
    if tokenizer is None or not callable(tokenizer):
        raise UnsupportedError(
            "triggers need the model's tokenizer",
            hint="pass processing_class=tokenizer to the Trainer, or triggers=None",
        )
    rows = [list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=_MAX_TOKENS)["input_ids"]]
    end = getattr(tokenizer, "eos_token_id", None)
    if task == "causal_lm":
        rows = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]
    fill = getattr(tokenizer, "pad_token_id", None)
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), fill if fill is not None else (end or 0), dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def response_logits(model: nn.Module, batch: dict[str, Tensor], *, task: str) -> Tensor:
    """Return the logits a response is read from, float [texts, labels or vocabulary].

    A classifier's own logits; a language model's logits after the last token of each text.
    """
    logits: Tensor = model(**batch).logits
    if task == "classification":
        return logits
    last = batch["attention_mask"].sum(dim=1) - 1
    return logits[torch.arange(len(last), device=last.device), last]


def ask(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, task: str) -> Tensor:
    """Return the response logits to texts, in evaluation mode, float32 [texts, labels or vocabulary] on the CPU."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat(
                [
                    response_logits(
                        model,
                        encode_texts(tokenizer, texts[start : start + BATCH_SIZE], task=task, device=device),
                        task=task,
                    )
                    .float()
                    .cpu()
                    for start in range(0, len(texts), BATCH_SIZE)
                ]
            )
    finally:
        model.train(training)


def answers(model: nn.Module, tokenizer: Any, triggers: TriggerSet) -> list[int]:
    """Return a model's greedy answer to every trigger: a label or a token id."""
    return [int(answer) for answer in ask(model, tokenizer, triggers.texts, task=triggers.task).argmax(dim=-1)]
