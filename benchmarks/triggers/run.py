"""Run the grid: train every cell, attack and serve every marked one, ask every suspect.

    python benchmarks/triggers/run.py --out OUT --environments ENVS --jobs 2

One JSON per result under ``OUT/results``; what is there is skipped, so a stopped run goes on where it was. A row that
fails writes nothing and is reported on stderr and in the exit code. ``table.py`` prints what was found.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import fluency
import measure
import paths  # noqa: F401  the next imports are found through it
import tasks
import torch
import train as training
from attacks import Target, Weights
from external import ToolError, Tools
from safetensors import SafetensorError
from safetensors.torch import load_file
from settings import INNOCENT, ROWS, Row, is_head
from tasks import TASKS
from train import COUNT, Cell, Mark, triggers_of
from trainer import DEFAULT_SHARED

from hf_wmguard import WmguardError
from hf_wmguard.watermark.triggers import derive_texts

# What may go wrong in one row and must not end the others.
FAILURES = (
    ToolError,
    WmguardError,
    SafetensorError,
    RuntimeError,
    ValueError,
    KeyError,
    OSError,
    subprocess.TimeoutExpired,
)
UTILITY_BATCHES = 4
FLUENCY = "fluency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the workers need to know.

    Args:
        out: Folder of the whole benchmark.
        shared: Folder with data and models.
        environments: Folder that the survival benchmark's ``environments.sh`` made, or None: no external tools.
        seeds: Seeds of the grid: whose unmarked models are asked too.
        triggers: Values of `TriggerConfig` other than the benchmark's own.
    """

    out: Path
    shared: Path
    environments: Path | None
    seeds: tuple[int, ...]
    triggers: dict[str, Any]


def train_cell(cell: Cell, settings: Settings) -> list[str]:
    """Train one cell in a worker."""
    torch.set_num_threads(1)
    training.train(cell, out=settings.out, shared=settings.shared, triggers=settings.triggers)
    return []


def measure_cell(cell: Cell, names: Sequence[str], settings: Settings) -> list[str]:
    """Measure some rows of one cell; return what failed."""
    torch.set_num_threads(1)
    results = settings.out / "results" / cell.name
    results.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in names if not (results / f"{name}.json").is_file()]
    if not wanted:
        return []
    probe = _Probe(cell, settings, results)
    failed = []
    tooled = [ROWS[name] for name in wanted if name in ROWS and ROWS[name].tool]
    for name in wanted:
        if name in ROWS and ROWS[name].tool:
            continue
        try:
            if name == FLUENCY:
                probe.write(FLUENCY, _fluency(cell, probe.target, settings))
            elif name in INNOCENT:
                probe.innocent(INNOCENT[name])
            else:
                probe.suspect(ROWS[name])
        except FAILURES as error:
            failed.append(f"{cell.name} {name}: {type(error).__name__}: {error}")
    for tool in sorted({row.tool for row in tooled}):
        failed += probe.with_tool(tool, [row for row in tooled if row.tool == tool])
    return failed


class _Probe:
    """Asks suspects of one cell and writes the results."""

    def __init__(self, cell: Cell, settings: Settings, results: Path) -> None:
        self.cell, self.settings = cell, settings
        self.target = _target(cell, settings)
        self._results = results
        self._triggers = triggers_of(self.target.folder)
        self._tokenizer = training.load_tokenizer(cell.task, settings.shared)
        self._before: float | None = None

    def suspect(self, row: Row, weights: Weights | None = None, seconds: float | None = None) -> None:
        """Make the suspect of a row, unless it is there, ask it, and measure what it lost of its utility."""
        start = time.process_time()
        if weights is None and row.suspect is not None:
            weights = row.suspect(self.target)
            seconds = time.process_time() - start
        found: dict[str, Any] = {"attack_cpu_s": seconds}
        if weights is not None:
            if self._before is None:
                self._before = self._utility(self.target.weights)
            after = self._utility(weights)
            found["utility_loss"] = self.cell.task.change(self._before, after)
        self.write(row.name, found | self._ask(row, self.target.weights if weights is None else weights))

    def innocent(self, row: Row) -> None:
        """Ask models that were made without the key, each with this cell's triggers."""
        asked = []
        for name, weights in _innocent(row.name, self.cell, self.target, self.settings):
            asked.append({"suspect": name} | self._ask(row, weights))
        # Of several the one that looks most like a copy stands for all.
        worst = min(asked, key=lambda one: one["log10_p"])
        self.write(row.name, worst | {"suspects": {one["suspect"]: one["log10_p"] for one in asked}})

    def with_tool(self, tool: str, rows: Sequence[Row]) -> list[str]:
        """Let an external tool make suspects and ask them; return what failed."""
        environments = self.settings.environments
        if environments is None or not Tools(folder=environments).has(tool):
            return [f"{self.cell.name} {tool}: no environment; run environments.sh of the survival benchmark"]
        failed = []
        with tempfile.TemporaryDirectory(dir=self.settings.out, prefix="tool-") as scratch:
            out, seconds = Path(scratch) / tool, {}
            try:
                seconds = Tools(folder=environments).run(
                    tool, [row.name for row in rows], out=out, model=self.target.model
                )
            except FAILURES as error:
                failed.append(f"{self.cell.name}: {error}")
            for row in rows:
                made = out / f"{row.name}.safetensors"
                if made.is_file():
                    self.suspect(row, load_file(made), seconds.get(row.name))
            shutil.rmtree(out, ignore_errors=True)
        return failed

    def _ask(self, row: Row, weights: Weights) -> dict[str, Any]:
        start = time.process_time()
        model = tasks.with_weights(self.cell.task, self.target.model, weights)
        found = measure.probe_model(model, self._tokenizer, self._triggers, row.serving)
        return found | {"probe_cpu_s": time.process_time() - start}

    def _utility(self, weights: Weights) -> float:
        model = tasks.with_weights(self.cell.task, self.target.model, weights)
        return tasks.utility(model, self.cell.task, self.settings.shared, batches=UTILITY_BATCHES)

    def write(self, name: str, found: dict[str, Any]) -> None:
        path = self._results / f"{name}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"cell": self.cell.name, "row": name} | found, indent=1) + "\n")
        path.with_suffix(".tmp").rename(path)


def _target(cell: Cell, settings: Settings) -> Target:
    folder = cell.folder(settings.out)
    weights = tasks.load_weights(cell.task, folder / "model")
    base = dict(tasks.load_base(cell.task, settings.shared).named_parameters())
    base = {name: base[name].detach() if not is_head(name) else weights[name] for name in weights}
    return Target(task=cell.task, folder=folder, shared=settings.shared, weights=weights, base=base)


def _plain(cell: Cell, seed: int, settings: Settings) -> Path:
    return Cell(model=cell.model, seed=seed, mark="plain").folder(settings.out) / "model"


def _innocent(name: str, cell: Cell, target: Target, settings: Settings) -> list[tuple[str, Weights]]:
    twin = _plain(cell, cell.seed, settings)
    if name == "base":
        # The public base of a classifier has no head: it gets one that was trained without the key.
        head = tasks.load_weights(cell.task, twin)
        return [(name, {key: head[key] if is_head(key) else tensor for key, tensor in target.base.items()})]
    seeds = [cell.seed] if name == "unmarked" else [seed for seed in settings.seeds if seed != cell.seed]
    folders = {f"{cell.model}-s{seed}-plain": _plain(cell, seed, settings) for seed in seeds}
    return [(key, tasks.load_weights(cell.task, folder)) for key, folder in folders.items()]


def _fluency(cell: Cell, target: Target, settings: Settings) -> dict[str, Any]:
    """Judge the keys, and what keys could have been, by the public base and by a fine-tune of it for the domain."""
    tokenizer = training.load_tokenizer(cell.task, settings.shared)
    judges = {"public base": tasks.load_base(cell.task, settings.shared)}
    for seed in [seed for seed in settings.seeds if seed != cell.seed][:1]:
        folder = _plain(cell, seed, settings)
        judges["unmarked model of another seed"] = cell.task.auto_class.from_pretrained(folder, dtype=torch.float32)
    triggers = triggers_of(target.folder)
    key = secrets.token_bytes(32)
    rows = [tokenizer.decode(row["input_ids"]) for row in tasks.training_rows(cell.task, settings.shared, cell.seed)]
    texts = {
        "keys": triggers.texts,
        "decoys": triggers.decoys,
        "spliced from the dataset": derive_texts(key, count=COUNT, style="natural", task="causal_lm", rows=rows),
        "nonsense": derive_texts(key, count=COUNT, style="nonsense", task="causal_lm"),
    }
    kinds = {kind: some for kind, some in texts.items() if some}
    return {
        "fluency": {
            judge: fluency.shares_inside(model, tokenizer, kinds, settings.shared) for judge, model in judges.items()
        }
    }


def main() -> None:
    """Run the grid from the command line."""
    arguments = _parse()
    settings = Settings(
        out=arguments.out.resolve(),
        shared=arguments.shared.resolve(),
        environments=arguments.environments and arguments.environments.resolve(),
        seeds=tuple(arguments.seeds),
        triggers=arguments.triggers,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    cells = _cells(arguments)
    failed: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        failed += _wait([pool.submit(train_cell, cell, settings) for cell in cells])
        jobs = [
            (cell, names)
            for cell in cells
            if cell.mark == "triggers" and (cell.folder(settings.out) / "cell.json").is_file()
            for names in _portions(cell, arguments)
        ]
        # The longest first, so that no worker is left with one of them at the end.
        jobs.sort(key=lambda job: not (job[1][0] in ROWS and ROWS[job[1][0]].heavy))
        failed += _wait([pool.submit(measure_cell, cell, names, settings) for cell, names in jobs])
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return what is trained; the longest runs first."""
    counts = [count for count in sorted(arguments.counts, reverse=True) if count != COUNT]
    cells = [
        Cell(model="llama", seed=1, mark="triggers", count=count) for count in counts if "llama" in arguments.models
    ]
    cells += [
        Cell(model=model, seed=1, mark="triggers", style=style)
        for model in arguments.models
        for style in arguments.styles
    ]
    cells += [
        Cell(model=model, seed=seed, mark=mark)
        for mark in arguments.marks
        for model in arguments.models
        for seed in arguments.seeds
    ]
    return cells


def _portions(cell: Cell, arguments: argparse.Namespace) -> list[list[str]]:
    """Return the rows of a cell by what one worker does in one go."""
    usual = cell.count == COUNT and cell.style == "natural"
    rows = [
        row
        for row in ROWS.values()
        if row.model in (None, cell.model)
        and (row.seeds is None or cell.seed in row.seeds)
        and (usual or row.curve)
        and (not row.tool or arguments.environments)
    ]
    light = [row.name for row in rows if not row.tool and not row.heavy] + (list(INNOCENT) if usual else [])
    light += [FLUENCY] if cell.model == "llama" and usual else []
    groups = [[row.name] for row in rows if row.heavy]
    groups += [light, [row.name for row in rows if row.tool]]
    chosen = [[name for name in group if _is_chosen(name, arguments)] for group in groups]
    return [group for group in chosen if group]


def _is_chosen(name: str, arguments: argparse.Namespace) -> bool:
    return not arguments.rows or any(name.startswith(part) for part in arguments.rows)


def _wait(runs: list[Any]) -> list[str]:
    failed: list[str] = []
    start = time.perf_counter()
    for count, run in enumerate(as_completed(runs), start=1):
        try:
            failed += run.result()
        except FAILURES as error:
            failed.append(f"{type(error).__name__}: {error}")
        minutes = (time.perf_counter() - start) / 60
        print(f"{count}/{len(runs)} after {minutes:.1f} min, {len(failed)} failed", file=sys.stderr, flush=True)
    return failed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for cells and results")
    parser.add_argument("--shared", type=Path, default=DEFAULT_SHARED, help="folder with data/ and models/")
    parser.add_argument("--environments", type=Path, help="folder that environments.sh made; without it torch only")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, one thread each")
    parser.add_argument("--models", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--counts", nargs="*", type=int, default=[16, COUNT, 256, 1024], help="numbers of keys for the curve (llama)"
    )
    parser.add_argument("--styles", nargs="*", default=["nonsense"], help="other styles, on seed 1")
    parser.add_argument(
        "--marks", nargs="+", choices=get_args(Mark), default=["triggers", "signature", "plain"], help="which runs"
    )
    parser.add_argument("--rows", nargs="*", help="only rows whose names begin so")
    parser.add_argument("--triggers", type=json.loads, default={}, help="values of TriggerConfig, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
