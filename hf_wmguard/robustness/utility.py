"""What an attack costs the thief: accuracy or perplexity on text the model was not attacked with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_wmguard.metrics import load_metric
from hf_wmguard.robustness.attacks import StateDict
from hf_wmguard.robustness.structure import layers_of

Task = Literal["classification", "causal_lm"]
_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Utility:
    """What a model is worth to its user.

    Args:
        name: ``accuracy`` (0 to 1, higher is better) or ``perplexity`` (1 and up, lower is better).
        value: The figure.
        loss: How much worse than the unattacked model, as a share of its figure; negative where it is better.
    """

    name: str
    value: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Rows for one model: one part to train and calibrate on, another to measure on.

    Args:
        task: What the model does.
        train: ``input_ids``, ``attention_mask`` and ``labels`` of one length.
        held_out: The same, never trained on.
    """

    task: Task
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def measure(model: nn.Module, corpus: Corpus, before: float | None = None) -> Utility:
    """Return accuracy or perplexity on the rows held out.

    Args:
        model: The attacked model.
        corpus: Whose rows.
        before: The unattacked model's figure; None where this is the unattacked model.
    """
    if corpus.task == "classification":
        value = _accuracy(model, corpus.held_out)
        reference = value if before is None else before
        return Utility(name="accuracy", value=value, loss=(reference - value) / reference if reference else 0.0)
    windows = [_unpadded(row) for row in corpus.held_out]
    value = load_metric("perplexity").compute(predictions=windows, model=model)["perplexity"]
    reference = value if before is None else before
    return Utility(name="perplexity", value=value, loss=(value - reference) / reference)


def _unpadded(row: dict[str, Any]) -> list[int]:
    return [token for token, seen in zip(row["input_ids"], row["attention_mask"], strict=True) if seen]


def _accuracy(model: nn.Module, rows: list[dict[str, Any]]) -> float:
    device = next(model.parameters()).device
    predictions: list[int] = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            inputs = {
                name: torch.tensor([row[name] for row in batch], device=device) for name in batch[0] if name != "labels"
            }
            predictions += model(**inputs).logits.argmax(dim=-1).tolist()
    metric = load_metric("accuracy")
    accuracy: float = metric.compute(predictions=predictions, references=[row["labels"] for row in rows])["accuracy"]
    return accuracy


def with_weights(model: nn.Module, tensors: StateDict) -> nn.Module:
    """Return a copy of a model with other weights, and with as many layers as they are for; nothing in it is tied.

    Args:
        model: Left as it is.
        tensors: A state dict under the model's own names; of dropped layers, renumbered.
    """
    attacked = copy.deepcopy(model)
    left = layers_of(tensors)
    for stack, layers in layers_of(model.state_dict()).items():
        module = attacked.get_submodule(stack.removesuffix("."))
        if isinstance(module, nn.ModuleList) and len(left.get(stack, ())) < len(layers):
            del module[len(left.get(stack, ())) :]
    own = attacked.state_dict()
    # Assigned and not copied: a head that was tied to the embedding may have become another.
    attacked.load_state_dict({name: tensor.to(own.get(name, tensor)) for name, tensor in tensors.items()}, assign=True)
    return attacked
