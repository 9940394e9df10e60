"""Perplexity as an `evaluate` metric that loads from the installed package, so that it works without a network."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import torch

# Beyond this a double overflows; a model whose logits are not finite is reported there too.
_MAX_NATS = 700.0


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """Perplexity of a causal language model in memory, over windows of tokens: exp of the mean over all tokens.

    Every token but the first of its window is predicted, and counts once: a long window weighs more than a short one.
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="exp of the mean negative log likelihood of all predicted tokens.",
            citation="",
            inputs_description="predictions: windows of token ids, each int64 [n >= 2]; model; batch_size",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, *, predictions: Any, model: Any, batch_size: int = 8) -> dict[str, float]:
        device = next(model.parameters()).device
        training, total, tokens = model.training, 0.0, 0
        model.eval()
        with torch.no_grad():
            for start in range(0, len(predictions), batch_size):
                windows = [torch.tensor(window) for window in predictions[start : start + batch_size]]
                ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True).to(device)
                lengths = torch.tensor([len(window) for window in windows], device=device)
                mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
                logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
                nats = torch.nn.functional.cross_entropy(
                    logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
                )
                total += float(nats[mask[:, 1:]].double().sum())
                tokens += int(mask[:, 1:].sum())
        model.train(training)
        mean = total / tokens
        return {"perplexity": math.exp(mean) if mean < _MAX_NATS else math.exp(_MAX_NATS)}
