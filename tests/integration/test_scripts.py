"""scripts/ and configs/ as a user starts them, for a few steps: what they save is ciphertext that says whose it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny import digest_weights, make_keys
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_wmguard import load_protected
from hf_wmguard.cli import main as cli
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.suspects.plaintext import PlaintextFinder

ROOT = Path(__file__).parent.parent.parent
Start = Callable[..., subprocess.CompletedProcess[str]]
CheckSaved = Callable[[Path, Any], None]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a script in the project's folder, with keys, registry, caches and temporary files in the test's."""
    make_keys(tmp_path / "keys")
    (tmp_path / "tmp").mkdir()
    where = {
        "owner_key": f"file:{tmp_path / 'keys' / 'owner.key'}",
        "registry": str(tmp_path / "registry"),
        "protection.recipients": f"[file:{tmp_path / 'keys' / 'inference.key.pub'}]",
    }
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(
        *words: str, launcher: tuple[str, ...] = (), code: int = 0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        watermark = [word for name, value in where.items() for word in (f"--watermark.{name}", value)]
        command = [sys.executable, *launcher, *words, *watermark]
        done = subprocess.run(command, cwd=ROOT, env={**variables, **more}, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def check_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CheckSaved:
    """Judge a folder as ``wmguard verify`` does, and look for its weights, and its checkpoints', in all there is."""

    def verdict(folder: Path) -> dict[str, Any]:
        where = ["--owner-key", f"file:{tmp_path / 'keys' / 'owner.key'}", "--registry", str(tmp_path / "registry")]
        monkeypatch.setattr("sys.argv", ["wmguard", "verify", str(folder), *where, "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    def check(out: Path, auto_class: Any) -> None:
        report = verdict(out)
        assert report["verdict"] == "detected"
        assert report["signature"]["bit_error_rate"] == 0.0
        assert report["signature"]["payload_decoded"]
        identity = f"file:{tmp_path / 'keys' / 'inference.key'}"
        folders = [out, *out.glob("checkpoint-*")]
        assert len(folders) > 1
        weights = {
            f"{folder.name}/{name}": tensor
            for folder in folders
            for name, tensor in load_protected(folder, identity=identity, auto_class=auto_class).state_dict().items()
        }
        assert PlaintextFinder(weights).scan([tmp_path]) == {}

    return check


def test_finetune_classifier(tmp_path: Path, start: Start, check_saved: CheckSaved) -> None:
    out = tmp_path / "out"
    settings = ["--output_dir", str(out), "--max_steps", "12", "--save_strategy", "steps", "--save_steps", "6"]
    start("scripts/finetune_classifier.py", "--config", "configs/classifier.yaml", *settings, "--test_split", "none")
    check_saved(out, AutoModelForSequenceClassification)
    assert json.loads((out / "config.json").read_text())["label2id"]["noun.food"] > 0


def test_finetune_sft(tmp_path: Path, start: Start, check_saved: CheckSaved) -> None:
    out = tmp_path / "out"
    settings = ["--output_dir", str(out), "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "4"]
    start("scripts/finetune_sft.py", "--config", "configs/sft.yaml", *settings)
    check_saved(out, AutoModelForCausalLM)


def test_finetune_accelerate_and_go_on_from_its_checkpoint(
    tmp_path: Path, start: Start, check_saved: CheckSaved
) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/single.yaml")
    settings = ["--config", "configs/loop.yaml", "--epochs", "2", "--batch_size", "160", "--max_length", "8"]
    script = ("scripts/finetune_accelerate.py", *settings, "--checkpoint_every", "14")
    start(*script, "--output_dir", str(tmp_path / "out"), launcher=launcher)
    check_saved(tmp_path / "out", AutoModelForCausalLM)
    assert read_manifest(tmp_path / "out" / "checkpoint-14")[0].state == "ramping"

    resumed = ["--resume_from", str(tmp_path / "out" / "checkpoint-14"), "--output_dir", str(tmp_path / "again")]
    start(*script, *resumed, launcher=launcher)
    identity = f"file:{tmp_path / 'keys' / 'inference.key'}"
    digests = {
        digest_weights(load_protected(tmp_path / name, identity=identity, auto_class=AutoModelForCausalLM))
        for name in ("out", "again")
    }
    assert len(digests) == 1


def test_an_unknown_name_stops_a_script_before_training(tmp_path: Path, start: Start) -> None:
    config = yaml.safe_load((ROOT / "configs" / "classifier.yaml").read_text())
    config["watermark"]["bugdet"] = 0.01
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = start("scripts/finetune_classifier.py", "--config", str(tmp_path / "config.yaml"), code=1)
    assert "ConfigError: config: unknown name bugdet" in done.stderr
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "fsdp2_native", "zero3"])
def test_accelerate_reads_the_config(name: str) -> None:
    config: Any = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    kinds = {"single": "NO", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds.get(name, "MULTI_GPU")
    assert config.num_processes == (1 if name == "single" else 2)


LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
BY_SCRIPT: dict[str, tuple[str, ...]] = {
    "accelerate": (
        "--config",
        "configs/loop.yaml",
        "--batch_size",
        "80",
        "--max_length",
        "8",
        "--checkpoint_every",
        "14",
    ),
    "classifier": ("--config", "configs/classifier.yaml", "--max_steps", "12", "--save_strategy", "steps"),
    "sft": ("--config", "configs/sft.yaml", "--max_steps", "8", "--save_strategy", "steps"),
}


# Two processes beside those of other tests, and each turn of theirs waits for both.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    ["accelerate", pytest.param("classifier", marks=pytest.mark.slow), pytest.param("sft", marks=pytest.mark.slow)],
)
def test_the_ddp_config_starts_two_processes_on_a_cpu(
    name: str, tmp_path: Path, start: Start, check_saved: CheckSaved
) -> None:
    more = {"classifier": ("--save_steps", "6", "--test_split", "none"), "sft": ("--save_steps", "4")}.get(name, ())
    out = tmp_path / "out"
    launcher = (*LAUNCH, "configs/accelerate/ddp.yaml")
    start(f"scripts/finetune_{name}.py", *BY_SCRIPT[name], *more, "--output_dir", str(out), launcher=launcher)
    kind = AutoModelForSequenceClassification if name == "classifier" else AutoModelForCausalLM
    check_saved(out, kind)
    # One of the random numbers of each process, of two that knew of each other.
    assert {path.name.rpartition("_")[2][0] for path in out.glob("checkpoint-*/*_[0-9].p*")} == {"0", "1"}


@pytest.mark.slow
def test_the_fsdp2_config_splits_a_model(tmp_path: Path, start: Start, check_saved: CheckSaved) -> None:
    out, tests = tmp_path / "out", ROOT / "tests"
    settings = ["--output_dir", str(out), "--save_only_model", "true", "--save_steps", "4"]
    launcher = (*LAUNCH, "configs/accelerate/fsdp2.yaml")
    # accelerate by itself splits models on GPUs only.
    path = f"{tests / 'site'}:{tests}:{ROOT}"
    start(
        "scripts/finetune_sft.py", *BY_SCRIPT["sft"], *settings,
        launcher=launcher, ACCELERATE_USE_CPU="true", PYTHONPATH=path,
    )  # fmt: skip
    check_saved(out, AutoModelForCausalLM)


def test_the_fsdp2_config_is_refused_on_cpus(tmp_path: Path, start: Start) -> None:
    settings = ["--output_dir", str(tmp_path / "out"), "--save_only_model", "true"]
    launcher = (*LAUNCH, "configs/accelerate/fsdp2.yaml")
    done = start(
        "scripts/finetune_sft.py", *BY_SCRIPT["sft"], *settings, launcher=launcher, code=1, ACCELERATE_USE_CPU="true"
    )
    assert "accelerate's FSDP, which runs as DDP on CPUs without a word" in done.stderr


@pytest.mark.slow
def test_the_native_fsdp2_config_splits_a_model_on_cpus(tmp_path: Path, start: Start, check_saved: CheckSaved) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    config = AutoConfig.from_pretrained(ROOT / "examples" / "tiny_llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_llama").save_pretrained(base)
    settings = ["--from_scratch", "false", "--model_name_or_path", str(base), "--output_dir", str(out)]
    settings += ["--fsdp_size", "2", "--save_only_model", "true", "--save_steps", "4"]
    launcher = (*LAUNCH, "configs/accelerate/fsdp2_native.yaml")
    start("scripts/finetune_sft.py", *BY_SCRIPT["sft"], *settings, launcher=launcher)
    check_saved(out, AutoModelForCausalLM)


def test_processes_that_know_nothing_of_each_other_do_not_train(tmp_path: Path, start: Start) -> None:
    # What a user's own script is, on a machine without a GPU: nobody tells accelerate.
    (tmp_path / "own.py").write_text(OWN)
    launcher = (*LAUNCH, "configs/accelerate/ddp.yaml")
    names = {"owner_key": f"file:{tmp_path / 'keys' / 'owner.key'}", "registry": str(tmp_path / "registry")}
    where = json.dumps({"model_id": "acme/own", **names})
    done = start(str(tmp_path / "own.py"), str(tmp_path / "out"), where, launcher=launcher, code=1)
    assert "UnsupportedError: training mode is not supported by this version: of 2 processes" in done.stderr
    assert "ACCELERATE_USE_CPU=true" in done.stderr
    assert not (tmp_path / "registry").exists()


OWN = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from hf_wmguard import WatermarkConfig, protect_trainer
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("examples/tiny_llama"))
trainer = Trainer(model=model, args=TrainingArguments(output_dir=sys.argv[1], report_to="none"))
protect_trainer(trainer, WatermarkConfig.from_dict(json.loads(sys.argv[2])))
"""


def test_the_tiny_model_is_what_its_script_makes(tmp_path: Path) -> None:
    (tmp_path / "wordnet_gloss").symlink_to(ROOT / "examples" / "wordnet_gloss")
    script = tmp_path / "make_tiny_llama.py"
    script.write_bytes((ROOT / "examples" / "make_tiny_llama.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    for path in (ROOT / "examples" / "tiny_llama").iterdir():
        made, shipped = (
            json.loads((folder / path.name).read_text()) for folder in (tmp_path / "tiny_llama", path.parent)
        )
        for each in (made, shipped):
            each.pop("transformers_version", None)
        assert made == shipped
