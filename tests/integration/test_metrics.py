"""The watermark's metrics stand wherever the loss stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import FIRST_SIGNATURE_STEP, FIRST_TRIGGER_STEP, Recorder, Run
from transformers import Trainer

from hf_wmguard import WatermarkCallback
from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.evidence.manifest import read_manifest

SIGNATURE = {"wmguard/signature_loss", "wmguard/bit_error_rate", "wmguard/log10_p", "wmguard/weight_change"}
TRIGGERS = {"wmguard/trigger_loss", "wmguard/trigger_match_rate"}


def _marked(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in logs if any(name.startswith("wmguard/") for name in entry)]


def test_reporters_that_came_before_see_the_metrics(guarded: Run) -> None:
    # The recorder was in the Trainer before the guard: its on_log has run when the guard's turn comes.
    marked = _marked(guarded.recorder.logs)
    assert len(marked) == len([entry for entry in guarded.recorder.logs if "loss" in entry]) - 16 // 4
    assert marked[0].keys() >= TRIGGERS
    both = [entry for entry in marked if entry.keys() >= TRIGGERS | SIGNATURE]
    assert both
    # The cooldown: no triggers any more, and no old figures of theirs.
    after = marked[marked.index(both[-1]) + 1 :]
    assert after
    assert all(entry.keys() >= SIGNATURE and not entry.keys() & TRIGGERS for entry in after)
    assert all(isinstance(value, float) for name, value in marked[-1].items() if name.startswith("wmguard/"))
    assert marked[-1]["wmguard/bit_error_rate"] == 0.0
    assert marked[-1]["wmguard/log10_p"] < -1000


def test_log_history_has_them_once_per_logged_step(guarded: Run) -> None:
    history = guarded.trainer.state.log_history
    steps = [entry["step"] for entry in _marked(history)]
    assert steps == [entry["step"] for entry in history if "loss" in entry and entry["step"] >= FIRST_TRIGGER_STEP]
    assert next(entry["step"] for entry in history if "wmguard/log10_p" in entry) >= FIRST_SIGNATURE_STEP


def test_bare_callback_writes_them_to_log_history_and_guards_saves(
    tmp_path: Path, make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig]
) -> None:
    recorder = Recorder()
    trainer = make_trainer(num_train_epochs=2, trainer={"callbacks": [recorder]})
    trainer.add_callback(
        WatermarkCallback(make_config(signature=SignatureConfig(budget=0.06, last_epochs=1), triggers=None))
    )
    trainer.train()
    assert [entry["step"] for entry in _marked(trainer.state.log_history)] == [12, 16]
    assert _marked(recorder.logs) == []
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("out/checkpoint-8", "out/checkpoint-16", "final"):
        read_manifest(tmp_path / folder)

    # Its checkpoints are ciphertext, and a bare callback cannot teach the Trainer to read them: loud, never noise.
    again = make_trainer(num_train_epochs=2)
    again.add_callback(WatermarkCallback(make_config(triggers=None)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.train(resume_from_checkpoint=True)


def test_bare_callback_refuses_load_best_model_at_end(
    make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig]
) -> None:
    trainer = make_trainer(load_best_model_at_end=True, eval_strategy="epoch", trainer={"eval_dataset": [{}]})
    trainer.add_callback(WatermarkCallback(make_config()))
    with pytest.raises(UnsupportedError, match="load_best_model_at_end") as caught:
        trainer.train()
    assert "protect_trainer" in caught.value.hint
    assert trainer.state.global_step == 0
