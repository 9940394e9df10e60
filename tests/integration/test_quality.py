"""The quality gate: measured before and after, a jump of the loss makes the mark wait, a breach saves nothing."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import Recorder, StopAt, make_model, make_rows
from transformers import EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from hf_wmguard import WatermarkCallback, protect_trainer
from hf_wmguard.config import ProtectionConfig, QualityConfig, SignatureConfig
from hf_wmguard.errors import ConfigError, QualityError, UnsupportedError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.metrics import load_metric
from hf_wmguard.training.measuring import measure_with
from hf_wmguard.training.quality import AFTER, BEFORE, QualityGate

Make = Callable[..., Any]
FIRST, STEPS = 8, 16


class _Spoil(TrainerCallback):
    """Makes the classifier worse after one step, as a bad batch would, and well again after another."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in (self._first, self._last):
            kwargs["model"].classifier.weight.data *= 64.0 if state.global_step == self._first else 1 / 64


@pytest.fixture
def train(
    tmp_path: Path, make_trainer: Make, make_config: Make, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> Callable[..., Trainer]:
    """A guarded run of two epochs, the second of them marked."""

    def run(
        *,
        quality: QualityConfig | None,
        callbacks: tuple[TrainerCallback, ...] = (),
        resume: bool = False,
        start: bool = True,
        **changes: Any,
    ) -> Trainer:
        settings: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "no", "logging_steps": 1, **changes}
        config = settings.pop("config", {})
        trainer = make_trainer(
            trainer={
                "callbacks": list(callbacks),
                "eval_dataset": settings.pop("eval_dataset", make_rows("classification", tokenizer, texts[:8])),
                "compute_metrics": settings.pop("compute_metrics", None),
            },
            **settings,
        )
        signature = SignatureConfig(budget=0.06, last_epochs=1.0, ramp=1.0)
        protect_trainer(trainer, make_config(signature=signature, triggers=None, quality=quality, **config))
        if start:
            trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    return run


def _logged(trainer: Trainer, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def test_both_values_are_logged_and_training_is_not_touched(train: Make, tmp_path: Path) -> None:
    with_gate, without = Recorder(), Recorder()
    quality = QualityConfig(metric="loss", tolerance=1.0)
    trainer = train(quality=quality, callbacks=(with_gate,))
    trainer.save_model(str(tmp_path / "final"))
    before, after = _logged(trainer, BEFORE), _logged(trainer, AFTER)
    assert list(before) == [FIRST]
    assert list(after) == [STEPS]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after[STEPS])
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    train(quality=None, callbacks=(without,), output_dir=tmp_path / "other")
    # The rounding key is each commitment's own: they part where the mark begins, and no step before.
    assert {step: with_gate.digests[step] for step in range(1, FIRST + 1)} == {
        step: without.digests[step] for step in range(1, FIRST + 1)
    }
    assert _logged(trainer, "learning_rate").keys() == set(range(1, STEPS + 1))


def test_a_breach_stops_every_save_with_the_numbers(train: Make, tmp_path: Path, identity_file: Path) -> None:
    protection = ProtectionConfig(recipients=(f"file:{identity_file}.pub",), destination=str(tmp_path / "delivered"))
    trainer = train(
        quality=QualityConfig(metric="loss", tolerance=0.05),
        callbacks=(_Spoil(STEPS, 0),),
        config={"protection": protection},
        start=False,
    )
    with pytest.raises(QualityError, match=r"loss went from [0-9.]+ to [0-9.]+") as caught:
        trainer.train()
    assert "quality.on_breach: warn" in caught.value.hint
    before, after = _logged(trainer, BEFORE)[FIRST], _logged(trainer, AFTER)[STEPS]
    assert f"from {before:.6g} to {after:.6g}" in caught.value.message
    for save in (
        lambda: trainer.save_model(str(tmp_path / "a")),
        lambda: trainer.model.save_pretrained(tmp_path / "b"),
    ):
        with pytest.raises(QualityError) as again:
            save()
        assert again.value.message == caught.value.message
    assert not (tmp_path / "delivered").exists()
    assert list(tmp_path.rglob("*.safetensors")) == []
    # Another run of the same trainer begins anew.
    trainer.callback_handler.remove_callback(_Spoil)
    trainer.model.classifier.weight.data /= 64
    trainer.train()
    assert read_manifest(tmp_path / "delivered")[0].state == "complete"


def test_a_breach_can_be_saved_with_a_warning(train: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quality = QualityConfig(metric="perplexity", tolerance=0.05, on_breach="warn")
    trainer = train(quality=quality, callbacks=(_Spoil(STEPS, 0),))
    assert "perplexity went from" in caplog.text
    trainer.save_model(str(tmp_path / "final"))
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0


def test_a_jump_of_the_loss_makes_the_mark_wait_also_after_a_resume(
    train: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="hf_wmguard")
    spoil, quality = _Spoil(10, 13), QualityConfig(tolerance=1.0, on_breach="warn")
    whole, part = Recorder(), Recorder()
    trainer = train(quality=quality, callbacks=(whole, spoil), save_strategy="steps", save_steps=12)
    changes = _logged(trainer, "wmguard/weight_change")
    # Step 11 is the first whose batch sees the damage; 14 the first without it, and its loss tells so afterwards.
    assert changes[11] == changes[12] == changes[13] == changes[14]
    assert changes[10] < changes[11] < changes[15]
    assert "the mark waits" in caplog.text
    trainer.save_model(str(tmp_path / "final"))
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0

    shutil.rmtree(tmp_path / "out" / "checkpoint-16")
    # In the wait: what was measured and what the loss was before lie in the checkpoint.
    again = train(quality=quality, callbacks=(part, spoil), save_strategy="no", resume=True)
    assert _logged(again, BEFORE) == _logged(trainer, BEFORE)
    assert sorted(part.digests) == [13, 14, 15, 16]
    assert part.digests == {step: whole.digests[step] for step in part.digests}


def test_a_run_cut_short_before_the_phase_is_measured_too(train: Make) -> None:
    trainer = train(quality=QualityConfig(metric="accuracy", tolerance=1.0), callbacks=(StopAt(3, save=False),))
    assert list(_logged(trainer, BEFORE)) == list(_logged(trainer, AFTER)) == [3]


def test_what_cannot_be_measured_is_refused_before_training(
    train: Make, tmp_path: Path, make_trainer: Make, make_config: Make
) -> None:
    for data in (None, {}):
        with pytest.raises(ConfigError, match="data to evaluate on"):
            train(quality=QualityConfig(), eval_dataset=data)
    trainer = make_trainer(num_train_epochs=1)
    trainer.add_callback(WatermarkCallback(make_config(triggers=None, quality=QualityConfig())))
    with pytest.raises(UnsupportedError, match="bare callback") as caught:
        trainer.train()
    assert "protect_trainer" in caught.value.hint
    # Without compute_metrics that is known at once; with it, when it has run.
    with pytest.raises(ConfigError, match="is none of accuracy, loss, perplexity"):
        train(quality=QualityConfig(metric="no_such_metric"), start=False)
    with pytest.raises(ConfigError, match="is none of epoch, f1, loss"):
        train(quality=QualityConfig(metric="no_such_metric"), compute_metrics=lambda predicted: {"f1": 1.0})
    assert not list(tmp_path.rglob("*.safetensors"))


def _f1(prediction: EvalPrediction) -> dict[str, float]:
    """As in a script: `evaluate`'s metrics, and figures of one's own."""
    labels, logits = prediction.label_ids, prediction.predictions
    found = load_metric("f1").compute(predictions=logits.argmax(axis=-1), references=labels)
    return {**found, "margin": float(np.sort(logits, axis=-1)[:, -1].mean()), "report": "not a number"}  # type: ignore[dict-item]


@pytest.mark.parametrize("metric", ["f1", "eval_f1"])
def test_what_compute_metrics_gives_can_be_named(train: Make, metric: str) -> None:
    quality = QualityConfig(metric=metric, tolerance=1.0)
    trainer = train(quality=quality, compute_metrics=_f1, start=False)
    expected: dict[int, float] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == FIRST:
                expected[FIRST] = Trainer.evaluate(trainer)["eval_f1"]

    trainer.add_callback(Look())
    trainer.train()
    # What a Trainer itself says is what was compared.
    assert _logged(trainer, BEFORE) == expected
    assert _logged(trainer, AFTER)[STEPS] == trainer.evaluate()["eval_f1"] > 0


@pytest.mark.parametrize(("greater", "breached"), [(True, False), (False, True), (None, False)])
def test_a_metric_has_the_direction_that_is_said(train: Make, greater: bool | None, breached: bool) -> None:
    quality = QualityConfig(metric="margin", tolerance=0.05, greater_is_better=greater)
    trainer = train(quality=quality, compute_metrics=_f1, callbacks=(_Spoil(STEPS, 0),), start=False)
    with pytest.raises(QualityError, match="margin went from") if breached else contextlib.nullcontext():
        trainer.train()
    assert _logged(trainer, AFTER)[STEPS] > 10 * _logged(trainer, BEFORE)[FIRST]


def test_a_lower_f1_is_a_breach(train: Make, tmp_path: Path) -> None:
    class Forget(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                kwargs["model"].classifier.weight.data *= -1.0

    trainer = train(quality=QualityConfig(metric="f1"), compute_metrics=_f1, callbacks=(Forget(),), start=False)
    with pytest.raises(QualityError, match=r"f1 went from 0\.\d+ to 0") as caught:
        trainer.train()
    with pytest.raises(QualityError) as again:
        trainer.save_model(str(tmp_path / "final"))
    assert again.value.message == caught.value.message


def test_one_of_several_sets_is_named_by_the_metric(
    train: Make, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    rows = make_rows("classification", tokenizer, texts)
    sets = {"near": rows[:8], "far": rows[8:24]}
    with pytest.raises(ConfigError, match="none of the sets") as caught:
        train(quality=QualityConfig(), eval_dataset=sets)
    assert "near_loss" in caught.value.hint
    trainer = train(quality=QualityConfig(metric="far_perplexity", tolerance=1.0), eval_dataset=sets)
    loss = trainer.evaluate()["eval_far_loss"]
    assert _logged(trainer, AFTER)[STEPS] == pytest.approx(math.exp(loss))


def test_what_is_no_number_or_not_there_is_refused_by_name(train: Make) -> None:
    with pytest.raises(ConfigError, match="'report' is str, expected a number"):
        train(quality=QualityConfig(metric="report"), compute_metrics=_f1)
    with pytest.raises(ConfigError, match=r"'f2' is none of .*f1, loss, margin"):
        train(quality=QualityConfig(metric="f2"), compute_metrics=_f1)


def test_measuring_leaves_no_trace(train: Make) -> None:
    heard: list[str] = []

    class Listener(TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            heard.append("evaluate")

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            heard.append("prediction")

    trainer = train(quality=QualityConfig(metric="f1", tolerance=1.0), compute_metrics=_f1, callbacks=(Listener(),))
    assert heard == []
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)
    assert not {"evaluation_loop", "evaluate"} & vars(trainer).keys()
    trainer.evaluate()
    assert heard[-1] == "evaluate"
    assert "eval_f1" in trainer.state.log_history[-1]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_metric_that_a_trainer_adds_itself_can_be_named(
    tmp_path: Path, make_config: Make, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    rows = Dataset.from_list([{"text": text} for text in texts])
    trainer = SFTTrainer(
        model=make_model("causal_lm", len(tokenizer)),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=8, max_length=32,
            save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
    )  # fmt: skip
    quality = QualityConfig(metric="mean_token_accuracy", tolerance=1.0)
    signature = SignatureConfig(budget=0.06, last_epochs=1.0)
    protect_trainer(trainer, make_config(signature=signature, triggers=None, quality=quality))
    trainer.train()
    assert _logged(trainer, AFTER)[STEPS] == pytest.approx(trainer.evaluate()["eval_mean_token_accuracy"])


def test_resuming_inside_the_phase_needs_the_first_value(train: Make) -> None:
    train(quality=None, callbacks=(StopAt(12, save=True),))
    with pytest.raises(ConfigError, match="inside the marked phase") as caught:
        train(quality=QualityConfig(), resume=True)
    assert "step 8 or before" in caught.value.hint


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss", False),
        ("eval_loss", False),
        ("logloss", False),
        ("error_rate", False),
        ("mean_squared_error", False),
        ("rmse", False),
        ("wer", False),
        ("accuracy", True),
        ("f1", True),
        ("exact_answer", True),
    ],
)
def test_a_name_says_what_is_better(metric: str, greater: bool) -> None:
    gate = QualityGate(QualityConfig(metric=metric), iter([1.0, 0.5]).__next__)
    gate.measure_before()
    if greater:
        with pytest.raises(QualityError, match=metric):
            gate.measure_after()
    else:
        assert gate.measure_after() == 0.5


def test_accuracy_of_a_language_model_is_that_of_the_next_token(
    make_trainer: Make, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    rows = make_rows("causal_lm", tokenizer, texts[:8])
    trainer = make_trainer("causal_lm", num_train_epochs=8, save_strategy="no", trainer={"eval_dataset": rows})
    trainer.train()
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    trainer.model.eval()
    with torch.no_grad():
        right = trainer.model(**batch).logits.argmax(dim=-1)[:, :-1] == batch["labels"][:, 1:]
    expected = float(right[batch["labels"][:, 1:] != -100].float().mean())
    assert expected > 0.1
    assert measure_with(trainer, "accuracy") == pytest.approx(expected)
    assert trainer.preprocess_logits_for_metrics is None
