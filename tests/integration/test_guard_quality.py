"""The quality gate of an own loop: the Trainer's, with the loop's own way to evaluate and the losses it tells."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from loops import STEPS_PER_EPOCH, Loop, make_loader
from tiny import make_model, make_rows
from transformers import PreTrainedTokenizerFast

from hf_wmguard import QualityConfig, SignatureConfig
from hf_wmguard.config import ProtectionConfig
from hf_wmguard.errors import ConfigError, FormatError, QualityError, UsageError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.metrics import load_metric
from hf_wmguard.training.loop_gate import QUALITY_NAME
from hf_wmguard.training.quality import AFTER, BEFORE

Make = Callable[..., Any]
EPOCHS = 4
STEPS = EPOCHS * STEPS_PER_EPOCH
FIRST = STEPS - 2 * STEPS_PER_EPOCH
BOTH = pytest.mark.parametrize("accelerated", [True, False], ids=["accelerate", "plain"])


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Evaluation:
    """Evaluates on some of the rows, and spoils what a careless function of somebody's would spoil."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.loader = make_loader(rows)
        self.seen: list[dict[str, float]] = []

    def __call__(self, model: Any) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        found, right, losses = [], [], []
        for batch in self.loader:
            output = model(**batch)
            losses.append(output.loss.item())
            found += output.logits.argmax(dim=-1).tolist()
            right += batch["labels"].tolist()
        f1 = load_metric("f1").compute(predictions=found, references=right)
        self.seen.append({"eval_loss": sum(losses) / len(losses), **f1})
        return self.seen[-1]


@pytest.fixture
def start(tokenizer: PreTrainedTokenizerFast, texts: list[str], make_config: Make) -> Make:
    """A guarded loop whose last two of four epochs are marked, what evaluates it, and its guard."""

    def run(
        quality: QualityConfig | None, *, accelerated: bool = True, evaluate: Any = None, **changes: Any
    ) -> tuple[Loop, Evaluation]:
        rows = make_rows("classification", tokenizer, texts)
        evaluation = Evaluation(rows[:16])
        loop = Loop(
            make_model("classification", len(tokenizer)),
            tokenizer,
            rows,
            epochs=EPOCHS,
            accelerated=accelerated,
            guarding={"evaluate": evaluate or evaluation} if quality is not None else {},
        )
        signature = SignatureConfig(budget=0.06, last_epochs=2, ramp=1.0)
        loop.protect(make_config(signature=signature, triggers=None, quality=quality, **changes))
        return loop, evaluation

    return run


def _spoil(loop: Loop, *steps: int) -> Callable[[int], None]:
    """Make the model worse after one step, and well again after another."""

    def at_step(step: int) -> None:
        if step in steps:
            model: Any = loop.guard.model if loop.guard is not None else loop.model
            model.classifier.weight.data *= 64.0 if step == steps[0] else 1 / 64

    return at_step


def _exact(folder: Path) -> None:
    manifest, _ = read_manifest(folder)
    assert manifest.state == "complete"
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0


@BOTH
def test_both_values_are_measured_and_the_loop_is_not_touched(start: Make, tmp_path: Path, accelerated: bool) -> None:
    plain, _ = start(None, accelerated=accelerated)
    plain.run(until=FIRST)
    loop, evaluation = start(QualityConfig(metric="f1", tolerance=1.0), accelerated=accelerated)
    with loop.guard as guard:
        loop.run(until=FIRST)
        assert evaluation.seen == []
        assert guard.metrics() == {}
        loop.run(until=FIRST + 1)
        assert guard.metrics()[BEFORE] == evaluation.seen[0]["f1"]
        loop.run()
        assert len(evaluation.seen) == 1
    assert [guard.metrics()[name] for name in (BEFORE, AFTER)] == [one["f1"] for one in evaluation.seen]
    assert {step: loop.digests[step] for step in plain.digests} == plain.digests
    assert guard.model.training
    guard.save(tmp_path / "final")
    _exact(tmp_path / "final")


@BOTH
def test_a_breach_stops_every_save_with_the_numbers(
    start: Make, tmp_path: Path, identity_file: Path, accelerated: bool
) -> None:
    protection = ProtectionConfig(recipients=(f"file:{identity_file}.pub",), destination=str(tmp_path / "delivered"))
    loop, evaluation = start(QualityConfig(tolerance=0.05), accelerated=accelerated, protection=protection)
    with pytest.raises(QualityError, match=r"loss went from [0-9.]+ to [0-9.]+") as caught, loop.guard as guard:
        loop.run(at_step=_spoil(loop, STEPS))
    before, after = (one["eval_loss"] for one in evaluation.seen)
    assert f"from {before:.6g} to {after:.6g}" in caught.value.message
    saves = [lambda: guard.save(tmp_path / "a"), lambda: guard.model.save_pretrained(tmp_path / "b")]
    saves += [lambda: loop.save(tmp_path / "c")]
    for save in saves:
        with pytest.raises(QualityError) as again:
            save()
        assert again.value.message == caught.value.message
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert not (tmp_path / "delivered").exists()


def test_a_breach_can_be_saved_with_a_warning(start: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop, _ = start(QualityConfig(metric="perplexity", tolerance=0.05, on_breach="warn"))
    with loop.guard as guard:
        loop.run(at_step=_spoil(loop, STEPS))
    assert "perplexity went from" in caplog.text
    guard.save(tmp_path / "final")
    _exact(tmp_path / "final")


@BOTH
def test_a_jump_of_the_loss_makes_the_mark_wait_also_after_a_resume(
    start: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, accelerated: bool
) -> None:
    caplog.set_level(logging.WARNING, logger="hf_wmguard")
    quality = QualityConfig(tolerance=1.0, on_breach="warn")
    loop, _ = start(quality, accelerated=accelerated)
    worse, well = FIRST + 2, FIRST + 5
    spoil, changes, stop = _spoil(loop, worse, well), {}, worse + 2

    def at_step(step: int) -> None:
        changes[step] = loop.guard.metrics().get("wmguard/weight_change")
        spoil(step)
        if step == stop:
            loop.save(tmp_path / "state")

    with loop.guard as guard:
        loop.run(at_step=at_step)
    # The step after the damage is the first whose batch sees it; the first without it says so afterwards.
    assert changes[worse + 1] == changes[well] == changes[well + 1]
    assert changes[worse] < changes[worse + 1] < changes[well + 2]
    assert "the mark waits" in caplog.text
    guard.save(tmp_path / "final")
    _exact(tmp_path / "final")

    told = json.loads((tmp_path / "state" / QUALITY_NAME).read_text())
    assert told["paused"] is True
    again, evaluation = start(quality, accelerated=accelerated)
    again.resume(tmp_path / "state")
    assert again.step == stop
    with again.guard as resumed:
        again.run(at_step=_spoil(again, 0, well))
    assert len(evaluation.seen) == 1
    assert resumed.metrics()[BEFORE] == guard.metrics()[BEFORE] == told["before"]
    assert again.digests == {step: loop.digests[step] for step in again.digests}


@pytest.mark.parametrize("found", [0.5, torch.tensor(0.5)])
def test_one_number_is_enough(start: Make, found: Any) -> None:
    loop, _ = start(QualityConfig(metric="whatever"), evaluate=lambda model: found)
    with loop.guard as guard:
        loop.run()
    assert guard.metrics()[BEFORE] == guard.metrics()[AFTER] == 0.5


def test_a_run_cut_short_before_the_phase_is_measured_too(start: Make) -> None:
    loop, evaluation = start(QualityConfig(tolerance=1.0))
    with loop.guard as guard:
        loop.run(until=2)
    assert len(evaluation.seen) == 2
    assert guard.mark.state == "complete"


def test_what_cannot_be_measured_is_refused(start: Make, make_config: Make, tmp_path: Path) -> None:
    loop, _ = start(None)
    with pytest.raises(UsageError, match="a way to evaluate") as caught:
        loop.protect(make_config(triggers=None, quality=QualityConfig()))
    assert "evaluate=" in caught.value.hint
    for found, what in (({"f1": 0.5}, "is none of f1"), ({"loss": "low"}, "is str"), (None, "is NoneType")):
        loop, _ = start(QualityConfig(), evaluate=lambda model, found=found: found)
        with pytest.raises(ConfigError, match=what):
            loop.run()
    loop, _ = start(QualityConfig(), evaluate=lambda model: float("nan"))
    with pytest.raises(QualityError, match="loss is nan"):
        loop.run()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_resuming_inside_the_phase_needs_the_first_value(start: Make, tmp_path: Path) -> None:
    loop, _ = start(None, accelerated=False)
    for step in (FIRST, FIRST + 2):
        loop.run(until=step)
        loop.guard.save(tmp_path / str(step), resumable=True)
    # Without a gate, later, or earlier with one.
    loop, evaluation = start(QualityConfig(tolerance=1.0), accelerated=False)
    with pytest.raises(ConfigError, match="inside the marked phase") as caught:
        loop.guard.resume(tmp_path / str(FIRST + 2))
    assert f"step {FIRST} or before" in caught.value.hint
    loop, evaluation = start(QualityConfig(tolerance=1.0), accelerated=False)
    loop.resume(tmp_path / str(FIRST))
    loop.run(until=FIRST + 2)
    assert len(evaluation.seen) == 1

    folder = tmp_path / "again"
    loop.guard.save(folder, resumable=True)
    for spoilt in ("", "[]", '{"before": null}', '{"before": 1, "losses": [NaN], "paused": false}'):
        (folder / QUALITY_NAME).write_text(spoilt)
        other, _ = start(QualityConfig(tolerance=1.0), accelerated=False)
        with pytest.raises(FormatError, match=QUALITY_NAME):
            other.guard.resume(folder)
    # A save that cannot be resumed leaves none of an older one.
    loop.guard.save(folder)
    assert not (folder / QUALITY_NAME).exists()


def test_what_the_docs_tell_to_type(start: Make, make_config: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    text = (Path(__file__).parents[2] / "docs" / "quality.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    loop, evaluation = start(None)
    quality = QualityConfig(metric="perplexity", tolerance=1.0)
    names = {
        "config": make_config(signature=SignatureConfig(budget=0.06), triggers=None, quality=quality),
        "model": loop.model,
        "optimizer": loop.optimizer,
        "accelerator": loop.accelerator,
        "tokenizer": tokenizer,
        "max_steps": STEPS,
        "loader": loop.loader,
        "eval_loader": evaluation.loader,
    }
    exec(snippet, names)  # noqa: S102
    loop.guard = names["guard"]
    with loop.guard:
        loop.run()
    assert loop.guard.metrics().keys() >= {BEFORE, AFTER}
