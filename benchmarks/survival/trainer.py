"""What a training run and its owner are in every benchmark of this repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tasks
from datasets import Dataset
from tasks import Form, Task
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.keys import OwnerKey, write_key_pair

DEFAULT_SHARED = Path(__file__).resolve().parents[2].parent / "shared"
BUDGET: dict[Form, float] = {"full": 0.012, "lora": 0.011}
"""So that the relative weight change stays below 1.2%: an adapter that trains on pulls back, which adds to it."""


def make_trainer(
    task: Task, model: Any, rows: tasks.Rows, *, form: Form, seed: int, scratch: Path, tokenizer: Any
) -> Trainer:
    """Return the Trainer of one run; runs of one seed see the same rows in the same order."""
    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        num_train_epochs=task.epochs,
        per_device_train_batch_size=task.batch,
        warmup_steps=20,
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        optimizers=(tasks.optimizer(task, model, form), None),
    )


def make_keys(folder: Path) -> tuple[str, ...]:
    """Write a fresh owner key and a fresh inference key beside a cell; return the recipients of its saves."""
    keys = folder / "keys"
    keys.mkdir()
    OwnerKey.generate().write(keys / "owner.key")
    identity = generate_identity()
    write_key_pair(keys / "inference.key", identity.to_text().encode(), identity.recipient().to_text().encode())
    return (f"file:{keys / 'inference.key.pub'}",)


def identity_of(folder: Path) -> str:
    """Return the reference to the key that opens a marked cell's saves."""
    return f"file:{folder / 'keys' / 'inference.key'}"


def owner_of(folder: Path) -> dict[str, str]:
    """Return the arguments by which `verify` finds the owner of a marked cell."""
    return {"owner_key": f"file:{folder / 'keys' / 'owner.key'}", "registry": str(folder / "registry")}
