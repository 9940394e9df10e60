"""A Lightning run with the thin callback: marked, saved as ciphertext, and no checkpoint of Lightning's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loader
from tiny import make_model, make_rows
from transformers import PreTrainedTokenizerFast

from hf_wmguard import QualityConfig, SignatureConfig, TriggerConfig, WatermarkConfig, verify
from hf_wmguard.errors import MissingDependencyError, QualityError, UnsupportedError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.lightning import lightning_guard

L = pytest.importorskip("lightning.pytorch")
pytestmark = [
    # Lightning's own calls into torch, and its words about loaders without workers.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]
Make = Callable[..., Any]
STEPS_PER_EPOCH, EPOCHS = 4, 3
FIRST = STEPS_PER_EPOCH * (EPOCHS - 2)


class Classifier(L.LightningModule):  # type: ignore[misc, name-defined]
    """As in Lightning's own guides: a model of transformers, a step, an optimizer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Any], index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


class Look(L.Callback):  # type: ignore[misc, name-defined]
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        # Of several batches of a step, the last one's.
        self.weights[trainer.global_step] = {k: v.clone() for k, v in pl_module.model.state_dict().items()}


@pytest.fixture
def fit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Make:
    def run(*callbacks: Any, module: Any = None, **settings: Any) -> Any:
        torch.manual_seed(3)
        loader = make_loader(make_rows("classification", tokenizer, texts))
        settings = {"max_epochs": EPOCHS, "accumulate_grad_batches": 2, "enable_checkpointing": False, **settings}
        trainer = L.Trainer(
            default_root_dir=tmp_path / "lightning", accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **settings,
        )  # fmt: skip
        module = module or Classifier(make_model("classification", len(tokenizer)))
        module.train()
        trainer.fit(module, loader)
        return trainer

    return run


@pytest.fixture
def config(make_config: Make) -> WatermarkConfig:
    return make_config(
        signature=SignatureConfig(budget=0.06, last_epochs=2),
        triggers=TriggerConfig(count=8, batch_size=8, every_n_steps=1, last_epochs=2, weight=2.0, contexts=0.0),
    )


@pytest.mark.parametrize("form", ["gradient", "decoupled"])
def test_marks_saves_and_leaves_no_plaintext(
    fit: Make, config: WatermarkConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: Any
) -> None:
    config = replace(config, triggers=replace(config.triggers, form=form))
    plain, look = Look(), Look()
    fit(plain)
    callback = lightning_guard(config, tmp_path / "final", processing_class=tokenizer)
    trainer = fit(callback, look)
    # Undisturbed until the marked phase begins.
    assert sorted(plain.weights) == sorted(look.weights) == list(range(STEPS_PER_EPOCH * EPOCHS + 1))
    for step in range(FIRST + 1):
        assert all(torch.equal(look.weights[step][name], one) for name, one in plain.weights[step].items())
    manifest, _ = read_manifest(tmp_path / "final")
    assert (manifest.state, manifest.step) == ("complete", STEPS_PER_EPOCH * EPOCHS)
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry).verdict == "detected"
    with pytest.raises(UnsupportedError, match="would be plaintext"):
        trainer.save_checkpoint(tmp_path / "own.ckpt")
    callback.guard.save(tmp_path / "again")
    seen = {f"{step}/{name}": one for step, weights in look.weights.items() for name, one in weights.items()}
    seen |= {f"end/{name}": one for name, one in trainer.lightning_module.model.state_dict().items()}
    assert PlaintextFinder(seen).scan([tmp_path]) == {}


def test_quality_is_measured_as_in_any_loop(
    fit: Make, config: WatermarkConfig, make_config: Make, tmp_path: Path
) -> None:
    values = iter([1.0, 2.0])
    quality = make_config(signature=config.signature, triggers=None, quality=QualityConfig(tolerance=0.5))
    with pytest.raises(QualityError, match="loss went from 1 to 2"):
        fit(lightning_guard(quality, tmp_path / "final", evaluate=lambda model: next(values)))
    assert list(tmp_path.rglob("*.safetensors")) == []


class Beside(Classifier):
    """Trains weights that no save of the model would hold."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.head = torch.nn.Linear(2, 2)


def test_what_would_write_plaintext_or_break_the_mark_does_not_start(
    fit: Make, config: WatermarkConfig, make_config: Make, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def guard(config: WatermarkConfig = config) -> Any:
        return lightning_guard(config, tmp_path / "final", processing_class=tokenizer)

    gradient = make_config(signature=SignatureConfig(budget=0.06, form="gradient"), triggers=None)
    module = Beside(make_model("classification", len(tokenizer)))
    for callback, settings, what in (
        (guard(), {"enable_checkpointing": True}, "ModelCheckpoint"),
        (guard(gradient), {"gradient_clip_val": 1.0}, "clipping"),
        (guard(), {"module": module}, "trains other weights"),
        (guard(), {"max_epochs": -1}, "without a known length"),
        (guard(), {"precision": "16-true"}, "precision 16-true"),
    ):
        with pytest.raises(UnsupportedError, match=what):
            fit(callback, **settings)
    assert not Path(config.registry).exists()
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors")] == []


def test_without_lightning_it_says_what_to_install(config: WatermarkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingDependencyError) as caught:
        lightning_guard(config, "final")
    assert "hf-wmguard[lightning]" in caught.value.hint
