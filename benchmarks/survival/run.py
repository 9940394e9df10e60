"""Run the grid: train every cell, attack every marked one, judge every suspect.

    python benchmarks/survival/run.py --out OUT --environments ENVS --jobs 2

One JSON per result under ``OUT/results``; what is there is skipped, so a stopped run goes on where it was. A failed
attack writes nothing and is reported on stderr and in the exit code. ``table.py`` prints what was found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tasks
import torch
import train as training
from attacks import ATTACKS, Attack, Target, Weights, calibration_texts, fine_tuned_elsewhere, sibling_folder
from external import ToolError, Tools
from safetensors import SafetensorError
from safetensors.torch import load_file
from tasks import TASKS
from train import Cell
from trainer import DEFAULT_SHARED, owner_of

from hf_wmguard import WmguardError, verify

# What may go wrong in one attack and must not end the others.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the workers need to know.

    Args:
        out: Folder of the whole benchmark.
        shared: Folder with data and models.
        environments: Folder that ``environments.sh`` made, or None: no external tools.
        utility_batches: Held-out batches for the utility after an attack; 0 switches it off.
        utility_seeds: Seeds on which it is measured.
        signature: Values of `SignatureConfig` other than the benchmark's own.
    """

    out: Path
    shared: Path
    environments: Path | None
    utility_batches: int
    utility_seeds: tuple[int, ...]
    signature: dict[str, Any]


def train_cell(cell: Cell, settings: Settings) -> str:
    """Train one cell in a worker."""
    torch.set_num_threads(1)
    training.train(cell, out=settings.out, shared=settings.shared, signature=settings.signature if cell.marked else {})
    return cell.name


def train_other(model: str, settings: Settings) -> str:
    """Make the other fine-tune that owners' models are merged with: the base on another corpus."""
    torch.set_num_threads(1)
    folder = settings.out / "others" / model
    if not folder.is_dir():
        task = TASKS[model]
        result = fine_tuned_elsewhere(task, settings.shared)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            result.save_pretrained(Path(scratch) / model)
            (Path(scratch) / model).rename(folder)
    return f"other fine-tune of {model}"


def attack_cell(cell: Cell, names: list[str], settings: Settings) -> list[str]:
    """Attack one cell with the attacks of one kind; return what failed."""
    torch.set_num_threads(1)
    results = settings.out / "results" / cell.name
    results.mkdir(parents=True, exist_ok=True)
    wanted = [ATTACKS[name] for name in names if not (results / f"{name}.json").is_file()]
    if not wanted:
        return []
    target = _target(cell, settings)
    judge = _Judge(cell, target, settings, results)
    failed = []
    with tempfile.TemporaryDirectory(dir=settings.out, prefix="attack-") as scratch:
        for attack in wanted:
            if attack.apply is not None:
                start = time.process_time()
                try:
                    suspect = attack.apply(target, Path(scratch))
                    judge.judge(attack, suspect, time.process_time() - start)
                except FAILURES as error:
                    failed.append(f"{cell.name} {attack.name}: {type(error).__name__}: {error}")
        for tool in sorted({attack.tool for attack in wanted} - {"torch"}):
            chosen = [attack for attack in wanted if attack.tool == tool]
            failed += _attack_with_tool(tool, chosen, judge, Path(scratch))
    return failed


def _attack_with_tool(tool: str, chosen: list[Attack], judge: _Judge, scratch: Path) -> list[str]:
    settings, target = judge.settings, judge.target
    tools = settings.environments and Tools(folder=settings.environments)
    if not tools or not tools.has(tool):
        return [f"{judge.cell.name} {tool}: no environment; run environments.sh"]
    paths = {"model": target.model}
    if tool == "merge":
        paths |= {
            "base": _write_partner(target, target.base, scratch / "base"),
            "other": _write_partner(target, _other(target, settings), scratch / "other"),
        }
    if tool == "gptq":
        paths["texts"] = calibration_texts(target.task, settings.shared, scratch / "texts.json")
    seconds: dict[str, float] = {}
    failed = []
    try:
        seconds = tools.run(tool, [attack.name for attack in chosen], out=scratch / tool, **paths)
    except FAILURES as error:
        failed.append(f"{judge.cell.name}: {error}")
    for attack in chosen:
        made = scratch / tool / f"{attack.name}.safetensors"
        if made.is_file():
            types = made.with_suffix(".types.json")
            extra = {"types": _count(json.loads(types.read_text()).values())} if types.is_file() else {}
            stored = made.with_suffix(".gguf")
            source = stored if stored.is_file() else None
            judge.judge(attack, load_file(made), seconds.get(attack.name), source=source, extra=extra)
    shutil.rmtree(scratch / tool, ignore_errors=True)
    return failed


def _count(values: Iterable[str]) -> dict[str, int]:
    listed = list(values)
    return {value: listed.count(value) for value in sorted(set(listed))}


def _target(cell: Cell, settings: Settings) -> Target:
    folder = cell.folder(settings.out)
    weights = tasks.load_weights(cell.task, folder / "model")
    base = dict(tasks.load_base(cell.task, settings.shared).named_parameters())
    base = {name: base[name].detach() if not _is_head(name) else weights[name] for name in weights}
    return Target(task=cell.task, folder=folder, shared=settings.shared, weights=weights, base=base)


def _is_head(name: str) -> bool:
    return any(part in name for part in tasks.HEAD)


def _other(target: Target, settings: Settings) -> Weights:
    folder = settings.out / "others" / target.task.name
    weights = tasks.load_weights(target.task, folder)
    return {name: weights[name] if not _is_head(name) else tensor for name, tensor in target.weights.items()}


def _write_partner(target: Target, weights: Weights, folder: Path) -> Path:
    """Write a model to merge with; a classifier's head is the owner's, so that the merged model can be used."""
    tasks.with_weights(target.task, target.model, weights).save_pretrained(folder)
    return folder


class _Judge:
    """Verifies suspects of one cell and writes the results."""

    def __init__(self, cell: Cell, target: Target, settings: Settings, results: Path) -> None:
        self.cell, self.target, self.settings, self.results = cell, target, settings, results
        self._before: float | None = None

    def judge(
        self,
        attack: Attack,
        suspect: Weights | Path,
        seconds: float | None,
        *,
        source: Path | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Judge one suspect and write one JSON.

        Args:
            attack: What was done.
            suspect: Weights, whose utility can be measured, or a path.
            seconds: What it took.
            source: The file that is verified in the place of the weights.
            extra: More to write.
        """
        start = time.process_time()
        original = self.target.model if attack.original else None
        read = source or (suspect if isinstance(suspect, Path) else dict(suspect))
        report = verify(read, original=original, **owner_of(self.target.folder)).to_json()
        result = {
            "cell": self.cell.name,
            "attack": attack.name,
            "attack_cpu_s": seconds,
            "verify_cpu_s": time.process_time() - start,
            "report": report,
            **(extra or {}),
        }
        start = time.process_time()
        unchanged = attack.innocent or attack.original or isinstance(suspect, Path)
        result["utility"] = None if unchanged else self._utility(suspect)
        result["utility_cpu_s"] = time.process_time() - start
        path = self.results / f"{attack.name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".tmp").rename(path)

    def _utility(self, suspect: Weights) -> dict[str, float] | None:
        if not self.settings.utility_batches or self.cell.seed not in self.settings.utility_seeds:
            return None
        if {n: t.shape for n, t in suspect.items()} != {n: t.shape for n, t in self.target.weights.items()}:
            return None  # Layers were dropped.
        if self._before is None:
            self._before = self._measure(self.target.weights)
        after = self._measure(suspect)
        return {"before": self._before, "after": after, "loss": self.cell.task.change(self._before, after)}

    def _measure(self, weights: Weights) -> float:
        model = tasks.with_weights(self.cell.task, self.target.model, weights)
        return tasks.utility(model, self.cell.task, self.settings.shared, batches=self.settings.utility_batches)


def main() -> None:
    """Run the grid from the command line."""
    arguments = _parse()
    settings = Settings(
        out=arguments.out.resolve(),
        shared=arguments.shared.resolve(),
        environments=arguments.environments and arguments.environments.resolve(),
        utility_batches=arguments.utility_batches,
        utility_seeds=tuple(arguments.utility_seeds),
        signature=arguments.signature,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    grid = list(product(arguments.models, arguments.forms, arguments.seeds))
    marked = [Cell(model=model, form=form, seed=seed, marked=True) for model, form, seed in grid]
    plain = [Cell(model=m, form=f, seed=s, marked=False) for m, f, s in grid if s in arguments.plain_seeds]
    merged = {cell.model for cell in marked if any(attack.tool == "merge" for attack in _chosen(cell, arguments))}
    failed: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        training_runs = [pool.submit(train_other, model, settings) for model in sorted(merged)]
        training_runs += [pool.submit(train_cell, cell, settings) for cell in [*marked, *plain]]
        failed += _wait(training_runs)
        attacks = [
            pool.submit(attack_cell, cell, names, settings)
            for cell in marked
            if (cell.folder(settings.out) / "cell.json").is_file()
            for names in _portions(_chosen(cell, arguments), cell.folder(settings.out))
        ]
        failed += _wait(attacks)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _chosen(cell: Cell, arguments: argparse.Namespace) -> list[Attack]:
    return [
        attack
        for attack in ATTACKS.values()
        if attack.form in (None, cell.form)
        and attack.model in (None, cell.model)
        and (not (attack.heavy or attack.must is None) or cell.seed in arguments.heavy_seeds)
        and (attack.tool == "torch" or (arguments.environments and cell.seed in arguments.tool_seeds))
        and (not arguments.attacks or any(attack.name.startswith(part) for part in arguments.attacks))
    ]


def _portions(chosen: list[Attack], folder: Path) -> list[list[str]]:
    """Return the attacks on a cell by kind: what one worker does in one go."""
    possible = [
        attack
        for attack in chosen
        if attack.sibling is None or (sibling_folder(folder, attack.sibling) / "cell.json").is_file()
    ]
    kinds = sorted({(attack.tool, attack.heavy) for attack in possible})
    return [[attack.name for attack in possible if (attack.tool, attack.heavy) == kind] for kind in kinds]


def _wait(runs: list[Any]) -> list[str]:
    failed: list[str] = []
    start = time.perf_counter()
    for count, run in enumerate(as_completed(runs), start=1):
        try:
            result = run.result()
        except FAILURES as error:
            result = [f"{type(error).__name__}: {error}"]
        failed += result if isinstance(result, list) else []
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
    parser.add_argument("--forms", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--plain-seeds", nargs="*", type=int, default=[1, 2, 3], help="seeds with an unmarked twin")
    parser.add_argument(
        "--heavy-seeds", nargs="*", type=int, default=[1], help="seeds for rows that train or have no bound"
    )
    parser.add_argument("--tool-seeds", nargs="*", type=int, default=[1], help="seeds for external tools")
    parser.add_argument("--utility-seeds", nargs="*", type=int, default=[1], help="seeds with the utility of attacks")
    parser.add_argument("--utility-batches", type=int, default=4, help="held-out batches for it; 0 for none")
    parser.add_argument("--attacks", nargs="*", help="only attacks whose names begin so")
    parser.add_argument("--signature", type=json.loads, default={}, help="values of SignatureConfig, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
