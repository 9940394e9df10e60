"""A Trainer on a tiny model for each test, and one plain run to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Run, build_trainer, run_plain
from transformers import PreTrainedTokenizerFast, Trainer


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Callable[..., Trainer]:
    """A Trainer on a tiny model: 8 steps an epoch, saving to ``tmp_path/out``."""

    def make(task: str = "classification", *, output_dir: Path | None = None, **arguments: Any) -> Trainer:
        return build_trainer(output_dir or tmp_path / "out", tokenizer, texts, task, **arguments)

    return make


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Run:
    """The guarded run's twin without a guard, up to the first trigger."""
    return run_plain(tmp_path_factory.mktemp("plain"), tokenizer, texts)
