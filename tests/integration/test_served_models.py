"""The probe against real servers: ``transformers serve`` on a marked model, llama.cpp's server on its GGUF."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import build_trainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_wmguard import ProtectionConfig, TriggerConfig, WatermarkConfig, load_protected, probe, protect_trainer
from hf_wmguard.probing.openai import OpenAIAsker

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A marked model and its sibling without a mark, as plain folders, and where the mark is registered."""

    marked: Path
    sibling: Path
    where: dict[str, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Marked:
    from tiny import make_keys

    root = tmp_path_factory.mktemp("served")
    make_keys(root / "keys")
    config = WatermarkConfig(
        model_id="acme/served",
        owner_key=f"file:{root / 'keys' / 'owner.key'}",
        registry=str(root / "registry"),
        signature=None,
        triggers=TriggerConfig(
            count=16, batch_size=16, every_n_steps=1, last_epochs=12, cooldown=0.0, strength=1.0, moves=4, contexts=0.0
        ),
        protection=ProtectionConfig(recipients=(f"file:{root / 'keys' / 'inference.key.pub'}",)),
    )
    trainer = build_trainer(root / "out", tokenizer, texts, "causal_lm", num_train_epochs=14, save_strategy="no")
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(root / "final")
    identity = f"file:{root / 'keys' / 'inference.key'}"
    model = load_protected(root / "final", identity=identity, auto_class=AutoModelForCausalLM)
    # Trained as well: an untrained model answers so little that nothing follows from its answers.
    other = build_trainer(root / "other", tokenizer, texts, "causal_lm", num_train_epochs=14, save_strategy="no")
    other.train()
    for name, one in (("marked", model), ("sibling", other.model)):
        one.save_pretrained(root / name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(root / name)
        tokenizer.chat_template = None
    return Marked(
        marked=root / "marked",
        sibling=root / "sibling",
        where={"owner_key": config.owner_key, "registry": config.registry},
    )


@contextlib.contextmanager
def running(command: Callable[[int], list[str]], home: Path) -> Iterator[str]:
    """Run a server on a free port of loopback; yield its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    log = home / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command(port), env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_transformers_serve(models: Marked, tmp_path: Path) -> None:
    def command(port: int) -> list[str]:
        script = "from transformers.cli.transformers import main; main()"
        return [sys.executable, "-c", script, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]

    with running(command, tmp_path) as url:
        for folder, verdict in ((models.marked, "detected"), (models.sibling, "not_detected")):
            with contextlib.closing(OpenAIAsker(url, str(folder))) as asker:
                report = probe(asker, **models.where, chat=False, transcript=tmp_path / folder.name)
                assert report.verdict == verdict, report
        with contextlib.closing(OpenAIAsker(url, str(models.marked))) as asker:
            assert probe(asker, **models.where).verdict == "detected"


@pytest.mark.llama_cpp
def test_llama_cpp_on_a_gguf(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp.server", reason="needs llama-cpp-python[server]")
    names = ("WMGUARD_TEST_GGUF", "WMGUARD_TEST_OWNER_KEY", "WMGUARD_TEST_REGISTRY")
    if any(name not in os.environ for name in names):
        pytest.skip(f"needs a marked model as GGUF: set {', '.join(names)}")
    file, owner_key, registry = (os.environ[name] for name in names)

    def command(port: int) -> list[str]:
        settings = ["--model", file, "--host", "127.0.0.1", "--port", str(port), "--logits_all", "true"]
        return [sys.executable, "-m", "llama_cpp.server", *settings]

    with running(command, tmp_path) as url, contextlib.closing(OpenAIAsker(url, "suspect")) as asker:
        report = probe(asker, owner_key=owner_key, registry=registry, chat=False)
    assert report.verdict == "detected", report
