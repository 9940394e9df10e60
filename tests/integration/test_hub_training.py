"""The Hub of the tests, as transformers uses it: models and a Trainer that push, and models that come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi
from tiny import make_model
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast, Trainer

REPO = "acme/tiny"


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_model_goes_and_comes_back(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("classification", len(tokenizer))
    model.push_to_hub(REPO, private=True, max_shard_size="300KB")
    tokenizer.push_to_hub(REPO)
    assert HfApi().model_info(REPO).private
    assert hub.traffic.bytes_in("^PUT|/xorbs/") > 300_000
    back = BertForSequenceClassification.from_pretrained(REPO)
    for name, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(REPO).get_vocab() == tokenizer.get_vocab()


def test_trainer_pushes_its_saves(hub: Hub, make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(
        output_dir=tmp_path / "tiny",
        num_train_epochs=2,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_strategy="checkpoint",
        hub_private_repo=True,
        save_strategy="epoch",
    )
    trainer.train()
    trainer.push_to_hub()
    api = HfApi()
    files = set(api.list_repo_files(REPO))
    assert {"model.safetensors", "config.json", "training_args.bin", "README.md"} <= files
    assert "last-checkpoint/model.safetensors" in files
    assert len(api.list_repo_commits(REPO)) > 2
    back = BertForSequenceClassification.from_pretrained(REPO)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
