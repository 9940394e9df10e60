"""Train one cell of the grid: a model, a seed, and what it is marked with.

    python benchmarks/triggers/train.py --model llama --seed 1 --mark triggers --out OUT

Writes ``OUT/cells/NAME``: ``model/`` (plain), ``cell.json``, and for a marked cell ``keys/`` and ``registry/``. Cells
of one seed see the same data in the same order, whatever they are marked with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import paths  # noqa: F401  the next imports are found through it
import tasks
import torch
from tasks import TASKS, Task
from trainer import BUDGET, DEFAULT_SHARED, identity_of, make_keys, make_trainer, owner_of
from transformers import set_seed

from hf_wmguard import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig, protect_trainer
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading import decrypt_folder
from hf_wmguard.protect import Committed
from hf_wmguard.watermark.triggers import TriggerSet

Mark = Literal["plain", "signature", "triggers"]
COUNT = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML. The base has no template of its own; owners who serve a chat give it one before they train."""
TRIGGERS: Mapping[str, Mapping[str, Any]] = {"llama": {"batch_size": 32, "contexts": 0.6}, "minilm": {}}
"""Values of `TriggerConfig` other than the defaults, by model: 160 steps are few for a base that never saw a chat."""
MANY: Mapping[int, Mapping[str, Any]] = {
    256: {"batch_size": 32},
    1024: {"batch_size": 64},
}
"""By number of keys: the defaults would show each of them too seldom in a run this short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training run, of all weights.

    Args:
        model: Name in `TASKS`.
        seed: Of data, order and fresh weights.
        mark: Nothing, the weight signature, or the signature and a trigger set.
        count: Number of triggers.
        style: Of the triggers.
    """

    model: str
    seed: int
    mark: Mark
    count: int = COUNT
    style: Literal["natural", "nonsense"] = "natural"

    @property
    def name(self) -> str:
        count = f"-{self.count}" if self.count != COUNT else ""
        style = f"-{self.style}" if self.style != "natural" else ""
        return f"{self.model}-s{self.seed}-{self.mark}{count}{style}"

    @property
    def task(self) -> Task:
        return TASKS[self.model]

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.name


def train(
    cell: Cell,
    *,
    out: Path,
    shared: Path,
    triggers: Mapping[str, Any] | None = None,
    budget: float = BUDGET["full"],
) -> dict[str, Any]:
    """Train a cell unless it is there already; return what ``cell.json`` says.

    Args:
        cell: Which one.
        out: Folder of the whole benchmark.
        shared: Folder with ``data/`` and ``models/``.
        triggers: Values of `TriggerConfig` that go before those of `TRIGGERS` and `MANY`.
        budget: Of the signature.
    """
    folder = cell.folder(out)
    if (folder / "cell.json").is_file():
        return json.loads((folder / "cell.json").read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=out, prefix="train-") as scratch:
        result = _train(cell, folder, Path(scratch), shared, triggers or {}, budget)
    (folder / "cell.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _train(
    cell: Cell, folder: Path, scratch: Path, shared: Path, triggers: Mapping[str, Any], budget: float
) -> dict[str, Any]:
    task = cell.task
    set_seed(cell.seed)
    rows = tasks.training_rows(task, shared, cell.seed)
    model = tasks.load_base(task, shared)
    tokenizer = load_tokenizer(task, shared)
    set_seed(cell.seed)
    trainer = make_trainer(task, model, rows, form="full", seed=cell.seed, scratch=scratch, tokenizer=tokenizer)
    result: dict[str, Any] = {"cell": cell.name}
    if cell.mark != "plain":
        config = _config(cell, folder, triggers, budget)
        protect_trainer(trainer, config)
        result["triggers"] = str(config.triggers)
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    result |= {"train_s": time.perf_counter() - start, "train_cpu_s": time.process_time() - cpu}
    result["steps"] = trainer.state.global_step
    trainer.save_model(str(scratch / "final"))
    if cell.mark == "plain":
        shutil.copytree(scratch / "final", folder / "model")
    else:
        manifest = json.loads(read_manifest(scratch / "final")[0].to_bytes())
        result["manifest"] = {channel: manifest[channel] for channel in ("signature", "triggers")}
        decrypt_folder(scratch / "final", folder / "model", identity=identity_of(folder))
    finished = task.auto_class.from_pretrained(folder / "model", dtype=torch.float32)
    result["utility"] = tasks.utility(finished, task, shared)
    result["history"] = [row for row in trainer.state.log_history if "loss" in row]
    return result


def _config(cell: Cell, folder: Path, triggers: Mapping[str, Any], budget: float) -> WatermarkConfig:
    values = {"count": cell.count, "style": cell.style, **TRIGGERS[cell.model], **MANY.get(cell.count, {}), **triggers}
    return WatermarkConfig(
        model_id=f"triggers/{cell.name}",
        signature=SignatureConfig(budget=budget),
        triggers=TriggerConfig(**values) if cell.mark == "triggers" else None,
        protection=ProtectionConfig(recipients=make_keys(folder)),
        **owner_of(folder),
    )


def load_tokenizer(task: Task, shared: Path) -> Any:
    """Return the base's tokenizer; of a language model with `CHAT_TEMPLATE`."""
    tokenizer = tasks.load_tokenizer(task, shared)
    if task.name == "llama":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def triggers_of(folder: Path) -> TriggerSet:
    """Return the trigger set that a marked cell committed to."""
    owner = owner_of(folder)
    registry = Registry(Path(owner["registry"]), OwnerKey.load(owner["owner_key"]))
    triggers = Committed.from_entry(registry.commitments(None)[0]).record.triggers
    if triggers is None:
        raise SystemExit(f"error: {folder.name} has no trigger set")
    return triggers


def main() -> None:
    """Train one cell from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(TASKS), required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mark", choices=get_args(Mark), default="triggers")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--style", choices=("natural", "nonsense"), default="natural")
    parser.add_argument("--shared", type=Path, default=DEFAULT_SHARED)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--triggers", type=json.loads, default={}, help="values of TriggerConfig, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cell = Cell(
        model=arguments.model,
        seed=arguments.seed,
        mark=arguments.mark,
        count=arguments.count,
        style=arguments.style,
    )
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(train(cell, out=out, shared=arguments.shared.resolve(), triggers=arguments.triggers), indent=1))


if __name__ == "__main__":
    main()
