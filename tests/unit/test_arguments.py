"""What a training script is told, from a file and from the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_wmguard.config import SignatureConfig
from hf_wmguard.errors import ConfigError, NotFoundError, WmguardError
from hf_wmguard.training.arguments import parse_arguments

CONFIG = """
model: tiny
shuffle: true
output_dir: out
learning_rate: 2e-5
use_cpu: true
watermark:
  model_id: acme/tiny
  owner_key: env:KEY
  registry: registry/
  triggers: null
"""


@dataclass
class Model:
    """A script's own arguments."""

    model: str = field(metadata={"help": "name"})
    shuffle: bool = False
    rate: float = 0.5


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return str(tmp_path / "config.yaml")


def test_a_file_fills_everything(config: str) -> None:
    model, training, watermark = parse_arguments(Model, TrainingArguments, argv=["--config", config])
    assert model == Model(model="tiny", shuffle=True, rate=0.5)
    assert (training.output_dir, training.learning_rate) == ("out", 2e-5)
    assert watermark.model_id == "acme/tiny"
    assert watermark.triggers is None
    assert watermark.signature == SignatureConfig()


def test_the_command_line_wins(config: str) -> None:
    words = [
        *("--config", config, "--model", "large", "--shuffle", "false", "--learning_rate", "1e-3"),
        *("--watermark.signature.budget", "0.02", "--watermark.triggers.count=8", "--watermark.iteration", "'7'"),
        *("--watermark.protection.recipients", "[file:a.pub, file:b.pub]"),
    ]
    model, training, watermark = parse_arguments(Model, TrainingArguments, argv=words)
    assert model == Model(model="large", shuffle=False)
    assert training.learning_rate == 1e-3
    assert watermark.signature is not None
    assert watermark.signature.budget == 0.02
    assert watermark.triggers is not None
    assert watermark.triggers.count == 8
    assert watermark.iteration == "7"
    assert watermark.protection.recipients == ("file:a.pub", "file:b.pub")


def test_no_file_is_needed() -> None:
    names = {"model_id": "acme/tiny", "owner_key": "env:KEY", "registry": "r", "triggers": "null"}
    words = [word for name, value in names.items() for word in (f"--watermark.{name}", value)]
    model, watermark = parse_arguments(Model, argv=["--model", "tiny", *words])
    assert (model.model, watermark.registry) == ("tiny", "r")


@pytest.mark.parametrize(
    ("text", "words", "error", "message"),
    [
        (CONFIG + "shufle: true\n", [], ConfigError, "unknown name shufle"),
        (CONFIG + "  bugdet: 1\n", [], ConfigError, "unknown name bugdet"),
        (CONFIG, ["--watermark.signature.bugdet", "1"], ConfigError, "unknown name bugdet"),
        (CONFIG, ["--watermark.iteration"], ConfigError, "has no value"),
        (CONFIG, ["--watermark.owner_key", "[secret"], ConfigError, "not a YAML value"),
        ("model: tiny\n", [], ConfigError, "missing"),
        ("- a\n", [], ConfigError, "expected a mapping"),
        ("watermark: 3\n", [], ConfigError, "expected a mapping"),
    ],
)
def test_what_makes_no_sense_is_named(
    text: str, words: list[str], error: type[WmguardError], message: str, config: str
) -> None:
    Path(config).write_text(text)
    with pytest.raises(error, match=message) as caught:
        parse_arguments(Model, TrainingArguments, argv=["--config", config, *words])
    assert caught.value.hint
    assert "secret" not in str(caught.value)


def test_a_missing_file_and_an_unknown_word(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFoundError):
        parse_arguments(Model, argv=["--config", config + ".not"])
    with pytest.raises(ValueError, match="--no_such_name"):
        parse_arguments(Model, TrainingArguments, argv=["--config", config, "--no_such_name", "1"])
    with pytest.raises(SystemExit):
        parse_arguments(Model, TrainingArguments, argv=["--config", config, "--rate", "fast"])
    assert "--rate" in capsys.readouterr().err
