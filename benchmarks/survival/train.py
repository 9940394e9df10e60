"""Train one cell of the grid: a model, a form, a seed, marked or not.

    python benchmarks/survival/train.py --model minilm --form full --seed 1 --marked --out OUT

Writes ``OUT/cells/NAME``: ``model/`` (plain, of a LoRA the merged one), ``adapter/`` (LoRA), ``cell.json``, and for a
marked cell ``keys/`` and ``registry/``. A marked and an unmarked cell of one seed see the same data in the same order.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
from tasks import TASKS, Form, Task
from trainer import BUDGET, DEFAULT_SHARED, identity_of, make_keys, make_trainer, owner_of
from transformers import set_seed

from hf_wmguard import ProtectionConfig, SignatureConfig, WatermarkConfig, protect_trainer
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.loading import decrypt_folder

LORA_RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training run.

    Args:
        model: Name in `TASKS`.
        form: ``full`` or ``lora``.
        seed: Of data, order and fresh weights.
        marked: Whether it carries the owner's signature.
    """

    model: str
    form: Form
    seed: int
    marked: bool

    @property
    def name(self) -> str:
        return f"{self.model}-{self.form}-s{self.seed}-{'marked' if self.marked else 'plain'}"

    @property
    def task(self) -> Task:
        return TASKS[self.model]

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.name


def train(cell: Cell, *, out: Path, shared: Path, signature: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a cell unless it is there already; return what ``cell.json`` says.

    Args:
        cell: Which one.
        out: Folder of the whole benchmark.
        shared: Folder with ``data/`` and ``models/``.
        signature: Values of `SignatureConfig` other than the budget in `BUDGET`.
    """
    folder = cell.folder(out)
    if (folder / "cell.json").is_file():
        return json.loads((folder / "cell.json").read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=out, prefix="train-") as scratch:
        result = _train(cell, folder, Path(scratch), shared, {"budget": BUDGET[cell.form]} | (signature or {}))
    (folder / "cell.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _train(cell: Cell, folder: Path, scratch: Path, shared: Path, signature: dict[str, Any]) -> dict[str, Any]:
    task = cell.task
    set_seed(cell.seed)
    rows = tasks.training_rows(task, shared, cell.seed)
    model = tasks.load_base(task, shared)
    if cell.form == "lora":
        model = _with_adapter(task, model)
    before = tasks.utility(model, task, shared)
    set_seed(cell.seed)
    tokenizer = tasks.load_tokenizer(task, shared)
    trainer = make_trainer(task, model, rows, form=cell.form, seed=cell.seed, scratch=scratch, tokenizer=tokenizer)
    if cell.marked:
        protect_trainer(trainer, _config(cell, folder, signature))
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds = {"train_s": time.perf_counter() - start, "train_cpu_s": time.process_time() - cpu}
    trainer.save_model(str(scratch / "final"))
    result: dict[str, Any] = {"cell": cell.name, **seconds, "steps": trainer.state.global_step}
    saved = folder / ("adapter" if cell.form == "lora" else "model")
    if cell.marked:
        manifest, _ = read_manifest(scratch / "final")
        result["manifest"] = json.loads(manifest.to_bytes())["signature"]
        decrypt_folder(scratch / "final", saved, identity=identity_of(folder))
    else:
        shutil.copytree(scratch / "final", saved)
    if cell.form == "lora":
        merge_adapter(task, saved, folder / "model", shared)
    finished = task.auto_class.from_pretrained(folder / "model", dtype=torch.float32)
    result |= {"utility_before": before, "utility": tasks.utility(finished, task, shared)}
    result["history"] = [row for row in trainer.state.log_history if "loss" in row][-1:]
    return result


def _with_adapter(task: Task, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS" if task.name == "minilm" else "CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        target_modules=task.lora_targets,
        modules_to_save=list(tasks.HEAD) if task.name == "minilm" else None,
    )
    return get_peft_model(model, config)


def merge_adapter(task: Task, adapter: Path, merged: Path, shared: Path) -> None:
    """Write the base with an adapter merged into it, as a plain model folder."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(tasks.load_base(task, shared), adapter).merge_and_unload()
    model.save_pretrained(merged)
    tasks.load_tokenizer(task, shared).save_pretrained(merged)


def _config(cell: Cell, folder: Path, signature: dict[str, Any]) -> WatermarkConfig:
    return WatermarkConfig(
        model_id=f"survival/{cell.name}",
        signature=SignatureConfig(**signature),
        triggers=None,
        protection=ProtectionConfig(recipients=make_keys(folder)),
        **owner_of(folder),
    )


def main() -> None:
    """Train one cell from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(TASKS), required=True)
    parser.add_argument("--form", choices=("full", "lora"), default="full")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--marked", action="store_true")
    parser.add_argument("--shared", type=Path, default=DEFAULT_SHARED)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--signature", type=json.loads, default={}, help="values of SignatureConfig, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cell = Cell(model=arguments.model, form=arguments.form, seed=arguments.seed, marked=arguments.marked)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = train(cell, out=out, shared=arguments.shared.resolve(), signature=arguments.signature)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
