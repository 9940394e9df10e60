"""What the guard costs in time and memory, beside the same training without it.

Expected, written down before the first run: on a 108M-parameter model and 512 tokens a step, one core, the signature
costs about 1.5% of a float32 step and several times that in bfloat16 (a fixed time for each step, whatever its
length: it reads and writes a third of the weights; 1% is met from about 800 tokens a step on). Triggers cost about
what a step of as many tokens costs, less than their share of rows. Held memory about 2% of the model's bytes in
float32: four thin float32 matrices for each carrier. The peak of a step grows by what is held and no more.

Time: real Trainers in one process, one thread each, which take turns: one optimizer step, then the next Trainer's.
A second plain one shows what the method itself would call a difference. A step is everything from one
``on_step_begin`` to the next. Ratios are of the same round, their median is given. CPU time of the thread is the
figure that counts (other programs cannot lengthen it); wall time is given beside it. "in the guard" is timed around
the guard's own calls. All defaults: the run is one epoch, so that all steps are in the marked phase.

Memory: each kind in a process of its own. "peak" is the growth over the plain run's VmHWM (reset after two steps)
less mapped files (about 12 MB more of the libraries' code), with malloc told to give large blocks back at once.
"held", "start" and "step" are what torch's allocator gave out: kept by the guard's start, and at most in use at a
time in that start, before the first step, and in its call after the optimizer.

    python benchmarks/overhead.py --json docs/measured/overhead.json
    python benchmarks/overhead.py --dtypes float32 --rounds 6 --parts time
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_wmguard import TriggerConfig, WatermarkConfig, protect_trainer
from hf_wmguard.keys import OwnerKey
from hf_wmguard.training.callback import WatermarkCallback

KINDS = ("plain", "plain again", "signature", "signature and triggers")
CALLS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_log")
WARM_UP = 2
LOG_EVERY = 10
TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tiny_llama"
Once = dict[str, float]


def make_model(vocabulary: int, tokens: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a fresh model of 15 blocks of width 768; with a tokenizer's few tokens nearly all of it is blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=768, num_hidden_layers=15, num_attention_heads=12, num_key_value_heads=12,
        intermediate_size=2048, max_position_embeddings=max(tokens, 512), tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def make_trainer(
    folder: Path, kind: str, options: argparse.Namespace, steps: int, callbacks: list[TrainerCallback]
) -> tuple[Trainer, WatermarkCallback | None]:
    """Return a Trainer of one epoch of ``steps`` steps, guarded or not."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    autocast = options.dtype == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(tokenizer), (steps * options.rows, options.tokens), generator=generator)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), num_train_epochs=1, per_device_train_batch_size=options.rows, bf16=autocast,
        learning_rate=2e-5, logging_steps=LOG_EVERY, save_strategy="no", report_to=[], use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=make_model(len(tokenizer), options.tokens, dtype),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if kind.startswith("plain"):
        return trainer, None
    OwnerKey.generate().write(folder / "owner.key")
    config = WatermarkConfig(
        model_id="bench/overhead",
        owner_key=f"file:{folder / 'owner.key'}",
        registry=str(folder / "registry"),
        triggers=TriggerConfig() if "triggers" in kind else None,
    )
    return trainer, protect_trainer(trainer, config)


class Turns:
    """Lets one thread at a time go on; another one begins each round."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._turn = -1
        self._changed = threading.Condition()
        self._failed = False

    def start(self) -> None:
        self.pass_on()

    def pass_on(self, *, failed: bool = False) -> None:
        with self._changed:
            self._turn += 1
            self._failed |= failed
            self._changed.notify_all()

    def wait(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._is_at(index))
        if self._failed:
            raise SystemExit("error: another Trainer failed")

    def _is_at(self, index: int) -> bool:
        number, position = divmod(self._turn, self._count)
        return self._turn >= 0 and (position + number) % self._count == index


class Stopwatch(TrainerCallback):
    """Times a Trainer's steps and what of them the guard's calls are, and counts rows and tokens."""

    def __init__(self, turns: Turns, index: int) -> None:
        self._turns, self._index = turns, index
        self.ready = threading.Event()
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.guard: list[float] = []
        self.seen: list[dict[str, int]] = []
        self.once: Once = {}
        self._begun: tuple[float, float] | None = None
        self._inside = False
        self._in_guard = 0.0
        self._counts: dict[str, int] = {}

    def watch(self, trainer: Trainer, guard: WatermarkCallback | None) -> None:
        """Time the guard's calls, and count what goes through the model."""
        trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)
        for name in (*CALLS, "on_train_begin", "on_train_end"):
            if guard is not None:
                setattr(guard, name, self._timed(name, getattr(guard, name)))

    def _timed(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            start, self._inside = time.thread_time(), True
            try:
                call(*args, **kwargs)
            finally:
                self._inside, spent = False, time.thread_time() - start
            if name in CALLS:
                self._in_guard += spent
            else:
                self.once[name] = spent

        return timed

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        whose = "trigger" if self._inside else "ordinary"
        self._counts[f"{whose} rows"] = self._counts.get(f"{whose} rows", 0) + rows
        self._counts[f"{whose} tokens"] = self._counts.get(f"{whose} tokens", 0) + rows * tokens

    def _next(self) -> None:
        if self._begun is not None:
            wall, cpu = self._begun
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.thread_time() - cpu)
            self.guard.append(self._in_guard)
            self.seen.append(self._counts)
            self._turns.pass_on()
        self.ready.set()
        self._turns.wait(self._index)
        self._in_guard, self._counts = 0.0, {}
        self._begun = time.perf_counter(), time.thread_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next()


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Train all kinds in turns, and return what their steps took."""
    # Triggers rest in the last quarter: the rounds before it count.
    steps = -(-(options.rounds + WARM_UP) * 4 // 3)
    turns, watches, threads = Turns(len(options.kinds)), [], []
    with tempfile.TemporaryDirectory() as work:
        for index, kind in enumerate(options.kinds):
            folder = Path(work) / str(index)
            folder.mkdir()
            watch = Stopwatch(turns, index)
            trainer, guard = make_trainer(folder, kind, options, steps, [watch])
            watch.watch(trainer, guard)
            thread = threading.Thread(target=_train, args=(trainer, turns, watch))
            thread.start()
            # Made and begun one after the other, so that nothing runs beside a step that is timed.
            watch.ready.wait()
            watches.append(watch)
            threads.append(thread)
            parameters = sum(one.numel() for one in trainer.model.parameters())
        turns.start()
        for thread in threads:
            thread.join()
    if any(len(watch.cpu) != steps for watch in watches):
        raise SystemExit("error: a Trainer stopped early")
    chosen = range(WARM_UP, WARM_UP + options.rounds)
    plain = watches[0]
    found: dict[str, Any] = {"parameters": parameters, "rows": options.rows, "tokens": options.tokens}
    found |= {"rounds": options.rounds, "threads": torch.get_num_threads()}
    for kind, watch in zip(options.kinds, watches, strict=True):
        found[kind] = {
            "step_cpu_s": _median(watch.cpu[i] for i in chosen),
            "step_wall_s": _median(watch.wall[i] for i in chosen),
            "overhead_cpu": _median(watch.cpu[i] / plain.cpu[i] - 1 for i in chosen),
            "overhead_wall": _median(watch.wall[i] / plain.wall[i] - 1 for i in chosen),
            "in_guard_s": _median(watch.guard[i] for i in chosen),
            "in_guard": _median(watch.guard[i] / (watch.cpu[i] - watch.guard[i]) for i in chosen),
            # A step's time grows with its tokens, the signature's does not.
            "tokens_for_1_percent": _longest(watch, chosen, plain.cpu, options.rows * options.tokens),
            "rounds_cpu": [round(watch.cpu[i] / plain.cpu[i] - 1, 4) for i in chosen],
            "once_cpu_s": {name: round(spent, 2) for name, spent in watch.once.items()},
        }
        totals = {name: sum(watch.seen[i].get(name, 0) for i in chosen) for name in watch.seen[WARM_UP]}
        if "trigger rows" in totals:
            found[kind] |= {
                "trigger_rows_per_row": round(totals["trigger rows"] / totals["ordinary rows"], 4),
                "trigger_tokens_per_token": round(totals["trigger tokens"] / totals["ordinary tokens"], 4),
            }
    return found


def _train(trainer: Trainer, turns: Turns, watch: Stopwatch) -> None:
    finished = False
    try:
        trainer.train()
        finished = True
    finally:
        watch.ready.set()
        turns.pass_on(failed=not finished)


def _longest(watch: Stopwatch, chosen: range, plain: list[float], tokens: int) -> int:
    """Return from how many tokens a step on the guard's calls would be 1% of it, if they cost the same."""
    return round(statistics.median(100 * watch.guard[i] / plain[i] for i in chosen) * tokens)


def _median(values: Any) -> float:
    return round(statistics.median(values), 5)


class Gauge(TrainerCallback):
    """Notes the highest resident size of the process between two steps."""

    def __init__(self, last: int) -> None:
        self._last = last
        self.peak_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5")
        if state.global_step == self._last:
            status = Path("/proc/self/status").read_text()
            peak, files = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmHWM", "RssFile"))
            self.peak_bytes = 1024 * (peak - files)


class Allocations:
    """What torch's allocator gives out in the guard's calls: kept at their end, and at most at a time."""

    def __init__(self, guard: WatermarkCallback, at: dict[str, int]) -> None:
        self.kept: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        for name, step in at.items():
            setattr(guard, name, self._noted(name, step, getattr(guard, name)))

    def _noted(self, name: str, step: int, call: Callable[..., None]) -> Callable[..., None]:
        def noted(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != step:
                call(args, state, control, **kwargs)
                return
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                call(args, state, control, **kwargs)
            sizes = [
                event.nbytes()
                for event in sorted(seen.profiler.kineto_results.events(), key=lambda one: one.start_ns())
                if event.name() == "[memory]"
            ]
            level = highest = 0
            for size in sizes:
                level += size
                highest = max(highest, level)
            self.kept[name], self.highest[name] = level, highest

        return noted


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Train one kind and return its peak, or what the allocator gave out: the profiler needs memory of its own."""
    with tempfile.TemporaryDirectory() as work:
        gauge = Gauge(WARM_UP + 2)
        trainer, guard = make_trainer(Path(work), options.kinds[0], options, WARM_UP + 4, [gauge])
        if options.child == "memory" or guard is None:
            trainer.train()
            size = sum(one.numel() * one.element_size() for one in trainer.model.parameters())
            return {"model_bytes": size, "peak_bytes": gauge.peak_bytes}
        noted = Allocations(guard, {"on_train_begin": 0, "on_optimizer_step": WARM_UP})
        trainer.train()
    return {
        "held_bytes": noted.kept["on_train_begin"],
        "start_bytes": noted.highest["on_train_begin"],
        "step_bytes": noted.highest["on_optimizer_step"],
    }


def compare_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each kind in a process of its own, and return shares of the model's bytes."""
    found: dict[str, Any] = {}
    for kind in options.kinds:
        found[kind] = one = _child(options, "memory", [kind])
        if not kind.startswith("plain"):
            one |= _child(options, "allocations", [kind])
        one["peak"] = round((one["peak_bytes"] - found["plain"]["peak_bytes"]) / one["model_bytes"], 5)
        for name in ("held", "start", "step"):
            if f"{name}_bytes" in one:
                one[name] = round(one[f"{name}_bytes"] / one["model_bytes"], 5)
    return found


def _child(options: argparse.Namespace, part: str, kinds: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", part, "--dtypes", options.dtype, "--kinds", *kinds]
    for name in ("rows", "tokens", "rounds"):
        command += [f"--{name}", str(getattr(options, name))]
    # Large blocks by mmap, whatever has been freed before: what is freed is no part of the resident size then.
    memory = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "0"} if part != "time" else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | memory)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "autocast", "bfloat16"))
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each Trainer that count")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    parser.add_argument("--json", type=Path, help="where to write what was found; what else is in it stays")
    parser.add_argument("--child", choices=("time", "memory", "allocations"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        options.dtype = options.dtypes[0]
        measure = measure_time if options.child == "time" else measure_memory
        print(json.dumps(measure(options)))
        return
    found = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    for dtype in options.dtypes or ("float32", "autocast", "bfloat16"):
        options.dtype = dtype
        for part in options.parts:
            one = compare_memory(options) if part == "memory" else _child(options, "time", options.kinds)
            found.setdefault(dtype, {}).setdefault(part, {}).update(one)
            print(dtype, part, json.dumps(one, indent=1), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
