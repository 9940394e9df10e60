"""Forms of training in the mark: decoupled or by gradient, and into 16-bit parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_wmguard import protect_trainer, verify
from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.errors import ConfigError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.training.callback import WatermarkCallback
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.signature import CarrierKey, Reading, loss_gradient, read_projections, read_signature

MakeTrainer = Callable[..., Trainer]
MakeConfig = Callable[..., WatermarkConfig]


class _Judge(TrainerCallback):
    """Reads the mark from the weights in memory before and after every optimizer step."""

    def __init__(self) -> None:
        self.callback: WatermarkCallback | None = None
        self.before: dict[int, Reading] = {}
        self.random: dict[int, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.random[state.global_step] = torch.get_rng_state()
        if self.callback is not None and self.callback.mark.committed is not None:
            keys = self.callback.mark.committed.record.carrier_keys(self.callback.mark.owner)
            weights = dict(kwargs["model"].named_parameters())
            self.before[state.global_step] = read_signature(
                keys, lambda one: weights[one.name].data[one.row_start : one.row_start + one.rows]
            )


def _train(
    make_trainer: MakeTrainer, config: WatermarkConfig, folder: Path, dtype: torch.dtype, **arguments: Any
) -> tuple[Trainer, _Judge]:
    judge = _Judge()
    model = make_model("classification", 1600).to(dtype)
    settings: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "epoch", "learning_rate": 1e-4, **arguments}
    trainer = make_trainer(model=model, output_dir=folder / "out", trainer={"callbacks": [judge]}, **settings)
    judge.callback = protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return trainer, judge


def _config(make_config: MakeConfig, **signature: Any) -> WatermarkConfig:
    return make_config(signature=SignatureConfig(budget=0.06, last_epochs=2, **signature), triggers=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters_read_back(
    dtype: torch.dtype, tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    config = _config(make_config)
    # float16 without loss scaling does not stand Adam's second moments.
    optimizer = {"optim": "sgd", "learning_rate": 1e-3} if dtype == torch.float16 else {}
    trainer, _ = _train(make_trainer, config, tmp_path, dtype, **optimizer)
    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert manifest.signature.payload_decoded
    assert manifest.signature.weight_change <= 1.2 * 0.06
    assert trainer.model.dtype == dtype
    report = verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry)
    assert report.verdict == "detected"
    ramping, _ = read_manifest(tmp_path / "out" / "checkpoint-16")
    assert ramping.state == "ramping"
    assert ramping.signature is not None
    assert ramping.signature.log10_p < -20


def test_rounding_draws_nothing_from_the_training_run(
    tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    _, guarded = _train(make_trainer, _config(make_config), tmp_path, torch.bfloat16)
    plain = _Judge()
    trainer = make_trainer(
        model=make_model("classification", 1600).bfloat16(),
        trainer={"callbacks": [plain]},
        num_train_epochs=3,
        save_strategy="no",
    )
    trainer.train()
    assert guarded.random.keys() == plain.random.keys()
    assert all(torch.equal(state, plain.random[step]) for step, state in guarded.random.items())


def test_resumed_sixteen_bit_run_rounds_alike(
    tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    config = _config(make_config)
    first, _ = _train(make_trainer, config, tmp_path, torch.bfloat16)
    again = make_trainer(
        model=make_model("classification", 1600).bfloat16(), output_dir=tmp_path / "out",
        num_train_epochs=3, learning_rate=1e-4, save_strategy="no",
    )  # fmt: skip
    protect_trainer(again, config)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-16"))
    again.save_model(str(tmp_path / "again"))
    expected = first.model.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("form", ["decoupled", "gradient"])
def test_saved_mark_is_exact_and_the_last_step_is_logged(
    form: str,
    tmp_path: Path,
    make_trainer: MakeTrainer,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="hf_wmguard")
    trainer, _ = _train(make_trainer, _config(make_config, form=form), tmp_path, torch.float32)
    for folder in ("out/checkpoint-24", "final"):
        manifest, _ = read_manifest(tmp_path / folder)
        assert manifest.state == "complete"
        assert manifest.signature is not None
        assert manifest.signature.bit_error_rate == 0.0
        assert manifest.signature.payload_decoded
    assert read_manifest(tmp_path / "out" / "checkpoint-16")[0].state == "ramping"
    assert "last step to the lattice: relative weight change" in caplog.text
    snaps = [entry["wmguard/snap"] for entry in trainer.state.log_history if "wmguard/snap" in entry]
    assert 0 < snaps[-1] < 0.06


def test_adam_takes_most_of_the_gradient_form_away(
    tmp_path: Path, make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    last = {}
    for form in ("decoupled", "gradient"):
        _, judge = _train(make_trainer, _config(make_config, form=form), tmp_path / form, torch.float32)
        # Before the optimizer's last step, and so before the snap.
        last[form] = judge.before[23].correlation
    assert last["decoupled"] > 0.99
    assert 0.02 < last["gradient"] < last["decoupled"] - 0.1


def test_gradient_is_that_of_the_loss() -> None:
    carrier = Carrier(name="h.0.w", shape=(64, 48), row_start=8, rows=40, sides=(4, 4), rms=0.05)
    steps = torch.linspace(0.75, 3.0, 16, dtype=torch.float64)
    key = CarrierKey.derive(b"k" * 32, carrier, torch.randint(2, (16,)), steps)
    tile = (0.05 * torch.randn(40, 48)).requires_grad_()
    projections = key.left.T.double() @ tile.double() @ key.right.double()
    loss = ((1 - torch.cos(2 * math.pi * (projections - key.dither - key.bits * key.step / 2) / key.step)) / 2).sum()
    (expected,) = torch.autograd.grad(loss, tile)
    made = key.left @ loss_gradient(read_projections(tile, key), key).float() @ key.right.T
    assert torch.allclose(made, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", [{"form": "both"}, {"strength": 0.0}, {"strength": math.inf}])
def test_settings_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SignatureConfig(**changes)
