"""Everything an attack may need: the marked model, other models, and text, read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_wmguard.container.recipients import X25519Identity
from hf_wmguard.errors import ConfigError, FormatError, NotFoundError
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading import load_suspect
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.robustness.attacks import StateDict, is_block_matrix
from hf_wmguard.robustness.calibrated import Inputs, collect_inputs
from hf_wmguard.robustness.utility import Corpus, Task
from hf_wmguard.suspects.reader import weight_files

WINDOW_TOKENS = 256
MAX_ROWS: dict[Task, tuple[int, int]] = {"causal_lm": (256, 64), "classification": (2048, 1024)}
"""Rows to train on, and rows to measure on: minutes on a CPU."""
MAX_ROWS_QUICK: dict[Task, tuple[int, int]] = {"causal_lm": (32, 8), "classification": (64, 64)}
_CALIBRATION_ROWS = 64
_BATCH = 8
_HELD_OUT_EVERY = 5
_READERS: dict[str, Callable[[Path], pyarrow.Table]] = {
    ".parquet": pyarrow.parquet.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
}


# No slots: the activations are collected once, when the first attack asks for them.
@dataclass(frozen=True, kw_only=True)
class Target:
    """A marked model and what is at hand to attack it with.

    Args:
        model: The marked model; attacks work on copies.
        tensors: Its state dict.
        base: State dict of what it was fine-tuned from, under the model's names.
        other: State dict of another fine-tune of the base.
        corpus: Rows to train, calibrate and measure on.
    """

    model: PreTrainedModel
    tensors: StateDict
    base: StateDict | None = None
    other: StateDict | None = None
    corpus: Corpus | None = None

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        """What the linear layers see of the first training rows.

        Raises:
            ConfigError: There is no text.
        """
        if self.corpus is None:
            raise ConfigError("activations need text", hint="pass --data or --text")
        rows = self.corpus.train[:_CALIBRATION_ROWS]
        batches = [_batch(rows[start : start + _BATCH], self.model.device) for start in range(0, len(rows), _BATCH)]
        return collect_inputs(self.model, batches)


def _batch(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask")
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in names}


def load_target(
    folder: Path,
    owner: OwnerKey,
    *,
    base: Path | None = None,
    other: Path | None = None,
    text: Path | None = None,
    data: Path | None = None,
    quick: bool = False,
) -> Target:
    """Return a marked model and everything that was given to attack it with.

    Args:
        folder: The marked model, plain, or protected and opened by the owner key.
        owner: The owner key.
        base: Folder of what it was fine-tuned from, plain.
        other: Folder of another fine-tune, plain.
        text: Plain text, for a causal language model.
        data: A ``.parquet``, ``.csv`` or ``.jsonl`` file with columns ``text`` and ``label``, for a classifier.
        quick: Fewer rows.
    Raises:
        ConfigError: The text does not suit the model, or a model shares no matrix with the marked one.
        NotFoundError, FormatError, UnsupportedError: Something cannot be read.
    """
    weight_files(folder)
    model, tokenizer = load_suspect(folder, identity=X25519Identity.from_owner(owner))
    if torch.cuda.is_available():
        model.to("cuda")
    corpus = None
    if text is not None and data is not None:
        raise ConfigError("both text and data were given", hint="text is for causal models, data for classifiers")
    if text is not None or data is not None:
        name = task_of(model).name
        task: Task = "causal_lm" if text is not None else "classification"
        if name != task:
            raise ConfigError(
                f"this model's task is {name}",
                hint="pass --text for a causal language model, --data for a classifier",
            )
        rows = _text_rows(text, model, tokenizer) if text else _label_rows(data or Path(), model, tokenizer)
        corpus = _split(task, rows, *(MAX_ROWS_QUICK if quick else MAX_ROWS)[task])
    return Target(
        model=model,
        tensors={name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        base=None if base is None else _relative_weights(base, model),
        other=None if other is None else _relative_weights(other, model),
        corpus=corpus,
    )


def _relative_weights(folder: Path, model: PreTrainedModel) -> StateDict:
    """Return what another folder has of the model's own tensors, under the model's names."""
    weight_files(folder)
    model_class: Any = type(model)
    try:
        loaded, report = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{folder} cannot be loaded: {' '.join(str(error).split())[:150]}",
            hint="give a plain folder of a model of the same architecture",
        ) from None
    # What the folder lacks was drawn at random: merging with that would be another attack.
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {
        name: tensor.detach()
        for name, tensor in loaded.state_dict().items()
        if name not in absent and shapes.get(name) == tensor.shape
    }
    if not any(is_block_matrix(name, tensor) for name, tensor in tensors.items()):
        raise ConfigError(
            f"{folder} has no matrix of the marked model's", hint="give a model of the same architecture and size"
        )
    return tensors


def _text_rows(path: Path, model: PreTrainedModel, tokenizer: Any) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(f"no text file at {path}", hint="give a plain text file") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not UTF-8 text", hint="give a plain text file") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = min(WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", WINDOW_TOKENS))
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return [{"input_ids": window, "attention_mask": [1] * size, "labels": list(window)} for window in windows]


def _label_rows(path: Path, model: PreTrainedModel, tokenizer: Any) -> list[dict[str, Any]]:
    if path.suffix not in _READERS:
        raise ConfigError(f"{path}: unknown kind of data {path.suffix!r}", hint=f"expected {', '.join(_READERS)}")
    if not path.is_file():
        raise NotFoundError(f"no data file at {path}", hint="give a file with columns text and label")
    try:
        table = _READERS[path.suffix](path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise FormatError(f"{path} cannot be read: {reason}", hint="the file is damaged") from None
    if not {"text", "label"} <= set(table.column_names):
        raise ConfigError(
            f"{path} has the columns {', '.join(table.column_names)}", hint="expected text and label; rename them"
        )
    texts = [str(text) for text in table["text"].to_pylist()]
    labels = [_label(label, model, path) for label in table["label"].to_pylist()]
    size = min(WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", WINDOW_TOKENS))
    encoded = tokenizer(texts, truncation=True, max_length=size, padding="longest") if texts else {}
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    return [{**{name: encoded[name][index] for name in names}, "labels": label} for index, label in enumerate(labels)]


def _label(value: Any, model: PreTrainedModel, path: Path) -> int:
    config: Any = model.config
    found = value if type(value) is int else (config.label2id or {}).get(str(value), -1)
    if not 0 <= found < config.num_labels:
        raise ConfigError(
            f"{path}: label {value!r} is none of the model's {config.num_labels}",
            hint="labels are numbers, or names in the model's label2id",
        )
    return int(found)


def _split(task: Task, rows: list[dict[str, Any]], most_train: int, most_held_out: int) -> Corpus:
    """Hold out every fifth row, so that both parts come from all over the file."""
    held_out = rows[::_HELD_OUT_EVERY]
    train = [row for index, row in enumerate(rows) if index % _HELD_OUT_EVERY]
    if not train:
        raise ConfigError(f"{len(rows)} rows are too few", hint="two rows or windows of 256 tokens are the least")
    return Corpus(task=task, train=_spread(train, most_train), held_out=_spread(held_out, most_held_out))


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    # From all over the file, and not its first pages.
    return rows if len(rows) <= most else [rows[index * len(rows) // most] for index in range(most)]
