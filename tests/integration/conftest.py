"""Tiny models of both tasks with data to train them on, and a Trainer around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import derive_texts

LABELS = 8
ROWS = 64


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Ordinary training texts."""
    return list(derive_texts(b"t" * 32, count=ROWS, style="natural", task="classification"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the test texts' words."""
    words = derive_texts(b"v" * 32, count=2000, style="natural", task="classification")
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(words, WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def make_model(task: str, vocabulary: int) -> PreTrainedModel:
    """A fresh tiny model; the same weights every time."""
    torch.manual_seed(1)
    if task == "classification":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=256,
                max_position_embeddings=64,
                num_labels=LABELS,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Callable[..., Trainer]:
    """A Trainer on a tiny model: 8 steps an epoch."""

    def make(task: str = "classification", *, model: PreTrainedModel | None = None, **arguments: Any) -> Trainer:
        encoded = tokenizer(texts, padding="max_length", max_length=32, truncation=True)
        rows: list[dict[str, Any]] = []
        for index, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"], strict=True)):
            row: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
            row["labels"] = (
                Stream(b"l" * 32, index).below(LABELS)
                if task == "classification"
                else [i if m else -100 for i, m in zip(ids, mask, strict=True)]
            )
            rows.append(row)
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "num_train_epochs": 3,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 4,
            "save_strategy": "epoch",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 7,
        }
        return Trainer(
            model=make_model(task, len(tokenizer)) if model is None else model,
            args=TrainingArguments(**{**settings, **arguments}),
            train_dataset=rows,
            processing_class=tokenizer,
        )

    return make
