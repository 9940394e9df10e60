"""Make a model's trigger set before training: texts, candidates and responses, all fixed by then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from hf_wmguard.config import TriggerConfig
from hf_wmguard.errors import ConfigError
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.probing.tasks.base import TriggerTask
from hf_wmguard.probing.tasks.causal_lm import surprise
from hf_wmguard.watermark.candidates import keyed_candidates
from hf_wmguard.watermark.corpus import MIN_ROWS, SHORTEST_ROW, Corpus
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import (
    TEXT_TASKS,
    Candidates,
    TriggerSet,
    derive_responses,
    derive_texts,
)

MAX_DECOYS = 64
_MAX_ROWS = 2000
_MAX_CHARACTERS = 4000
_PROPOSALS = 3
_ORDINARY = 200
_BAND = (0.1, 0.9)


def make_triggers(
    key: bytes, config: TriggerConfig, model: PreTrainedModel, processor: Any, *, dataset: Any = None
) -> TriggerSet:
    """Return a model's trigger set.

    Args:
        key: 32 bytes, the trigger subkey.
        config: Count, style, source, candidates.
        model: The model before training; asked which words are plausible after each text.
        processor: The model's tokenizer or image processor.
        dataset: What it will be trained on, for texts of the same domain.
    Raises:
        UnsupportedError: A model without a fitting task, or no processor.
        ConfigError: Texts from the dataset are asked for, and it has too few rows that are text.
    """
    task = task_of(model)
    decoys = min(config.count, MAX_DECOYS)
    texts = _texts(
        key, config, model, processor, task, _rows_for(config, task, dataset, processor), config.count + decoys
    )
    texts, others = texts[: config.count], texts[config.count :]
    candidates: Candidates
    if task.name in TEXT_TASKS and config.response == "keyed":
        candidates = keyed_candidates(key, config.count, width=config.candidates)
    else:
        candidates = task.candidates(model, processor, texts, width=config.candidates)
    return TriggerSet(
        task=task.name,
        style=config.style,
        texts=texts,
        candidates=candidates,
        responses=derive_responses(key, texts, candidates),
        decoys=others,
    )


def _texts(
    key: bytes,
    config: TriggerConfig,
    model: PreTrainedModel,
    processor: Any,
    task: TriggerTask,
    rows: Sequence[str],
    count: int,
) -> tuple[str, ...]:
    if task.name != "causal_lm" or not rows:
        return derive_texts(key, count=count, style=config.style, task=task.name, rows=rows)
    # Two spans of rows do not always meet well: of three times as many, those stay that read like ordinary text to the
    # model itself, which is the best judge of its own domain.
    texts = derive_texts(key, count=_PROPOSALS * count, style=config.style, task=task.name, rows=rows)
    corpus, stream = Corpus(rows), Stream(key, "ordinary")
    ordinary = surprise(model, processor, [corpus.span(stream) for _ in range(_ORDINARY)])
    low, high = ordinary.quantile(torch.tensor(_BAND, dtype=ordinary.dtype))
    each = surprise(model, processor, texts)
    outside = torch.maximum(low - each, each - high).clamp_min(0)
    # Stable: within the band the order stays the key's.
    return tuple(texts[i] for i in sorted(outside.argsort(stable=True)[:count].tolist()))


def _rows_for(config: TriggerConfig, task: TriggerTask, dataset: Any, processor: Any) -> Sequence[str]:
    if config.source == "grammar" or config.style != "natural" or task.name == "image_classification":
        return ()
    rows = _readable(dataset, processor)
    if sum(len(row.split()) >= SHORTEST_ROW for row in rows) < MIN_ROWS:
        raise ConfigError(
            f"triggers.source is dataset, and {len(rows)} rows of it are text, expected at least {MIN_ROWS}",
            hint="set triggers.source to grammar",
        )
    return rows


def has_rows(dataset: Any) -> bool:
    """Return whether rows of a dataset can be asked for by number."""
    # By type, too: torch's data without a length has the methods, which raise, and that of datasets gives columns.
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def _readable(dataset: Any, processor: Any) -> list[str]:
    """Return rows of a dataset as texts: from its tokens, else from its longest column of text."""
    if not has_rows(dataset):
        return []
    count = min(len(dataset), _MAX_ROWS)
    # Spread over the whole, in a fixed order: a resumed run sees the same rows.
    rows = [dataset[index * len(dataset) // count] for index in range(count)]
    texts = []
    for row in rows:
        if not isinstance(row, dict):
            return []
        if "input_ids" in row and hasattr(processor, "decode"):
            texts.append(processor.decode(row["input_ids"], skip_special_tokens=True)[:_MAX_CHARACTERS])
        else:
            texts.append(max((v for v in row.values() if isinstance(v, str)), key=len, default="")[:_MAX_CHARACTERS])
    return texts
