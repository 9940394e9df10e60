"""What docs/training.md tells a reader to type, typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from loops import folder_names, make_loader
from tiny import make_model, make_rows
from transformers import PreTrainedTokenizerFast

from hf_wmguard import SignatureConfig, WatermarkConfig, verify
from hf_wmguard.evidence.manifest import read_manifest

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "training.md").read_text()
ACCELERATED, PLAIN, LIGHTNING, ARGUMENTS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    make_config: Callable[..., WatermarkConfig],
) -> Iterator[dict[str, Any]]:
    """What a reader has before the first line."""
    monkeypatch.chdir(tmp_path)
    # A process knows one kind of accelerator: other tests have made other ones.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield {
        "model": make_model("classification", len(tokenizer)),
        "tokenizer": tokenizer,
        "loader": make_loader(make_rows("classification", tokenizer, texts)),
        "config": make_config(signature=SignatureConfig(budget=0.06), triggers=None),
        "epochs": 2,
        "resume_from": None,
    }
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def _check(folder: str, config: WatermarkConfig) -> None:
    manifest, _ = read_manifest(Path(folder))
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert verify(folder, owner_key=config.owner_key, registry=config.registry).verdict == "detected"


def test_the_loop_with_accelerate(names: dict[str, Any]) -> None:
    exec(ACCELERATED, names)  # noqa: S102
    _check("final", names["config"])
    documented = set(re.findall(r"`([\w.]+\.(?:bin|pkl|wmguard|safetensors|json))`", TEXT))
    assert {"optimizer.bin", "optimizer.wmguard", "model.safetensors"} <= documented & folder_names(Path("state-1"))


def test_the_plain_loop(names: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    exec(PLAIN, names)  # noqa: S102
    _check("finished", names["config"])
    again = {
        **names,
        "model": make_model("classification", len(tokenizer)),
        "resume_from": str(next(Path().glob("checkpoint-*"))),
    }
    exec(PLAIN, again)  # noqa: S102
    assert again["guard"].mark.state == "complete"


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning(names: dict[str, Any]) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = names["model"]

        def training_step(self, batch: dict[str, Any], index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    names["module"] = Module()
    exec(LIGHTNING, names)  # noqa: S102
    _check("lightning-final", names["config"])


def test_the_arguments(names: dict[str, Any]) -> None:
    text = (ROOT / "configs" / "watermark.yaml").read_text()
    section = "".join(f"  {line}\n" for line in text.splitlines())
    Path("train.yaml").write_text(f"output_dir: out\nuse_cpu: true\nwatermark:\n{section}")
    exec(ARGUMENTS, names)  # noqa: S102
    assert names["config"].model_id == "acme/triage"


def test_every_file_that_is_named_is_there() -> None:
    for name in re.findall(r"(?:scripts|configs|examples)/[\w/.]+\w", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(finetune_\w+\.py)`", TEXT):
        assert (ROOT / "scripts" / name).exists(), name
