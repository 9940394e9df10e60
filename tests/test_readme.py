"""What README and configs/ tell a reader to type, typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub
from tiny import build_trainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_wmguard import SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.cli import main as cli
from hf_wmguard.evidence.manifest import read_manifest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_commands(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type the ``$ wmguard ...`` lines of a console block."""
    for line in re.findall(r"^\$ (wmguard .*)$", block, flags=re.MULTILINE):
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, line


def test_readme_from_keys_to_verdict(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys, deliver, judge, *_ = blocks("console")
    train, load = blocks("python")
    run_commands(keys, monkeypatch)
    # Only the size is changed: a model of a few hundred thousand weights needs a larger budget, and firmer triggers
    # where its learning rate is ten times a usual one.
    triggers = (
        "TriggerConfig(count=16, every_n_steps=1, last_epochs=12, strength=1.0, weight=1.0, moves=4, contexts=0.0)"
    )
    small = f"signature=SignatureConfig(budget=0.06), triggers={triggers},"
    trainer = build_trainer(tmp_path / "out", tokenizer, texts, "classification", num_train_epochs=14)
    names: dict[str, Any] = {"trainer": trainer, "SignatureConfig": SignatureConfig, "TriggerConfig": TriggerConfig}
    exec(train.replace("    iteration=", f"    {small}\n    iteration="), names)  # noqa: S102
    exec(load, names)  # noqa: S102
    assert names["model"].config.num_labels == trainer.model.config.num_labels
    manifest, _ = read_manifest(tmp_path / "protected")
    assert manifest.state == "complete"
    run_commands(deliver, monkeypatch)
    assert "hub://acme/triage" in (tmp_path / "pulled" / "README.md").read_text()
    run_commands(judge, monkeypatch)
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_readme_plans_and_marks_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    keys, _, _, plan, mark, original, stress = blocks("console")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=512, num_hidden_layers=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # Only the number of attacks is changed.
    for block in (keys, plan, mark, original, stress.replace("--quick", "--quick --attacks int8,merge-base-linear")):
        run_commands(block, monkeypatch)
    assert (tmp_path / "stress" / "report.html").is_file()
    assert (tmp_path / "plan.png").is_file()
    assert (tmp_path / "marked" / "model.safetensors").is_file()


def test_the_documented_defaults_are_the_defaults() -> None:
    documented = WatermarkConfig.from_yaml(ROOT / "configs" / "watermark.yaml")
    assert documented.signature == SignatureConfig()
    assert documented.triggers == TriggerConfig()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_reads(path: Path, make_config: Callable[..., WatermarkConfig]) -> None:
    value = yaml.safe_load(path.read_text())
    # A script's config has the watermark beside the script's own names; tests/integration/test_scripts.py starts it.
    section = value.get("watermark", value)
    config = WatermarkConfig.from_dict(section)
    assert WatermarkConfig.from_dict(config.to_dict()) == config
    assert set(section) <= set(make_config().to_dict())
    if section is value:
        assert WatermarkConfig.from_yaml(path) == config


def test_every_file_that_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
