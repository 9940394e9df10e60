"""Own loops: marked, saved, resumed and judged like a Trainer's run, with accelerate and in plain PyTorch."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub import Hub
from loops import ACCUMULATION, STEPS_PER_EPOCH, Loop, folder_names, moments, weights_of
from peft import LoraConfig, get_peft_model
from tiny import digest_weights, excerpts, files_holding, make_keys, make_model, make_rows
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_wmguard import (
    Guard,
    SignatureConfig,
    TriggerConfig,
    WatermarkConfig,
    load_protected,
    probe,
    verify,
)
from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    ManifestError,
    NotFoundError,
    OwnershipError,
    RegistryError,
    UnsupportedError,
    UsageError,
    WmguardError,
)
from hf_wmguard.evidence.manifest import check_files, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.plaintext import PlaintextFinder

MakeLoop = Callable[..., Loop]
MakeConfig = Callable[..., WatermarkConfig]
EPOCHS = 6
STEPS = EPOCHS * STEPS_PER_EPOCH
FIRST_SIGNATURE_STEP = STEPS - 2 * STEPS_PER_EPOCH + 1
FIRST_TRIGGER_STEP = STEPS - 4 * STEPS_PER_EPOCH + 1


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def make_loop(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> MakeLoop:
    """A loop on a tiny model: 4 optimizer steps an epoch, each of two batches."""

    def make(task: str = "classification", *, model: Any = None, **changes: Any) -> Loop:
        model = make_model(task, len(tokenizer)) if model is None else model
        return Loop(model, tokenizer, make_rows(task, tokenizer, texts), **{"epochs": EPOCHS, **changes})

    return make


@pytest.fixture
def config(make_config: MakeConfig) -> WatermarkConfig:
    """Triggers over the last four epochs, the signature over the last two."""
    return make_config(
        signature=SignatureConfig(budget=0.06, last_epochs=2),
        triggers=TriggerConfig(count=8, batch_size=8, every_n_steps=1, last_epochs=4, weight=2.0, contexts=0.0),
    )


def _where(config: WatermarkConfig) -> dict[str, str]:
    return {"owner_key": config.owner_key, "registry": config.registry}


def _commitments(config: WatermarkConfig) -> int:
    return len(Registry(Path(config.registry), OwnerKey.load(config.owner_key)).commitments())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step..` before:UserWarning")
@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_trains_saves_resumes_and_verifies(
    task: str, accelerated: bool, tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    plain = make_loop(task, accelerated=accelerated)
    plain.run(until=FIRST_TRIGGER_STEP)

    loop = make_loop(task, accelerated=accelerated)
    stop = FIRST_SIGNATURE_STEP + 3
    seen, states = {}, {}

    def at_step(step: int) -> None:
        if step in (1, FIRST_SIGNATURE_STEP - 1, stop):
            loop.save(tmp_path / f"step-{step}")
            seen.update({f"{step}/{name}": tensor for name, tensor in weights_of(loop.model).items()})
            states.update({f"{step}/{name}": tensor for name, tensor in moments(loop.optimizer).items()})

    with loop.protect(config) as guard:
        assert not Path(config.registry).exists()
        guard.save(tmp_path / "before")
        loop.run(until=stop, at_step=at_step)
        assert _commitments(config) == 1
        loop.run()
    manifest = guard.save(tmp_path / "final")

    # Undisturbed until the marked phase begins.
    steps = range(1, FIRST_TRIGGER_STEP)
    assert [loop.digests[step] for step in steps] == [plain.digests[step] for step in steps]
    assert loop.digests[FIRST_TRIGGER_STEP] != plain.digests[FIRST_TRIGGER_STEP]

    # Judged by what was saved.
    assert read_manifest(tmp_path / "before")[0].state == "pending"
    assert manifest.state == "complete"
    assert manifest.step == STEPS
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert manifest.triggers is not None
    assert verify(tmp_path / "final", **_where(config)).verdict == "detected"
    assert "tokenizer.json" in folder_names(tmp_path / "final")
    for folder in tmp_path.glob("step-*"):
        check_files(folder, read_manifest(folder)[0])

    # Nothing in the clear: weights at every save, moments of the optimizer.
    seen |= {f"final/{name}": tensor for name, tensor in weights_of(loop.model).items()}
    assert PlaintextFinder(seen).scan([tmp_path]) == {}
    assert files_holding(tmp_path, excerpts(states)) == []

    # Resumed in the marked phase: the same weights in the end.
    again = make_loop(task, accelerated=accelerated)
    with again.protect(config) as second:
        again.resume(tmp_path / f"step-{stop}")
        assert again.step == stop
        again.run()
    assert second.mark.state == "complete"
    assert [again.digests[step] for step in again.digests] == [loop.digests[step] for step in again.digests]
    assert digest_weights(again.model) == digest_weights(loop.model)
    assert _commitments(config) == 1


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step..` before:UserWarning")
def test_resumes_before_the_marked_phase_and_goes_back(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop()
    with loop.protect(config):
        loop.run(until=3, at_step=lambda step: loop.save(tmp_path / f"step-{step}"))
        loop.run()
    # Back to an earlier checkpoint of the same run, in the same process.
    first = dict(loop.digests)
    loop.resume(tmp_path / "step-3")
    assert loop.step == 3
    loop.run()
    assert loop.digests == first
    assert loop.guard is not None
    loop.guard.finish()
    assert loop.guard.save(tmp_path / "final").state == "complete"

    again = make_loop()
    with again.protect(config):
        again.resume(tmp_path / "step-3")
        again.run()
    assert again.digests == {step: first[step] for step in range(4, STEPS + 1)}
    assert _commitments(config) == 1


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_bfloat16_autocast_and_adapter(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = make_model("classification", len(tokenizer))
    adapter = get_peft_model(
        base, LoraConfig(r=8, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS")
    )
    loop = make_loop(model=adapter, settings={"mixed_precision": "bf16"})
    config = dataclasses.replace(config, triggers=None)
    with loop.protect(config):
        loop.run(until=STEPS - 2)
        assert loop.accelerator is not None
        loop.accelerator.save_state(str(tmp_path / "state"))
        loop.run()
    assert loop.guard is not None
    manifest = loop.guard.save(tmp_path / "final")
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    assert "adapter_model.safetensors" in folder_names(tmp_path / "state")
    adapted = {name: tensor for name, tensor in weights_of(loop.model).items() if "lora" in name}
    assert PlaintextFinder(adapted).scan([tmp_path]) == {}
    with loop.protect(config) as guard:
        loop.accelerator.load_state(str(tmp_path / "state"))
        assert guard.step == STEPS - 2


def test_destination_gets_the_finished_model(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig, identity_file: Path
) -> None:
    protection = dataclasses.replace(config.protection, destination=str(tmp_path / "finished"))
    loop = make_loop(epochs=2)
    config = dataclasses.replace(config, protection=protection, triggers=None)
    with loop.protect(config) as guard:
        loop.run()
    assert guard.mark.saved
    loaded = load_protected(
        tmp_path / "finished", identity=f"file:{identity_file}", auto_class=AutoModelForSequenceClassification
    )
    assert digest_weights(loaded) == digest_weights(loop.model)


def test_triggers_answer_as_they_were_taught(make_loop: MakeLoop, config: WatermarkConfig) -> None:
    triggers = TriggerConfig(count=16, batch_size=16, last_epochs=10, cooldown=0, weight=4.0, contexts=0.0)
    loop = make_loop(epochs=10)
    config = dataclasses.replace(config, triggers=triggers)
    with loop.protect(config) as guard:
        loop.run()
        assert {"wmguard/trigger_loss", "wmguard/bit_error_rate"} <= guard.metrics().keys()
    assert probe(loop.model, loop.tokenizer, **_where(config)).verdict == "detected"


def test_accelerates_own_ways_of_saving(tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig) -> None:
    loop = make_loop()
    loop.protect(config)
    loop.run(until=1)
    accelerator = loop.accelerator
    assert accelerator is not None
    accelerator.save_model(loop.model, str(tmp_path / "by_accelerate"), max_shard_size="200KB")
    # As accelerate's guide writes it.
    accelerator.unwrap_model(loop.model).save_pretrained(
        str(tmp_path / "by_the_guide"),
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(loop.model),
    )
    for folder in ("by_accelerate", "by_the_guide"):
        assert read_manifest(tmp_path / folder)[0].step == 1
    with pytest.raises(UnsupportedError, match="plaintext"):
        accelerator.save_model(loop.model, str(tmp_path / "bin"), safe_serialization=False)
    with pytest.raises(UnsupportedError, match="plaintext"):
        accelerator.save_model(nn.Linear(2, 2), str(tmp_path / "other"))
    assert PlaintextFinder(weights_of(loop.model)).scan([tmp_path]) == {}


def test_a_second_model_in_the_accelerator_is_refused(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop()
    loop.protect(config)
    loop.run(until=1)
    assert loop.accelerator is not None
    loop.accelerator.prepare(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="2 models"):
        loop.accelerator.save_state(str(tmp_path / "state"))
    assert [path for path in (tmp_path / "state").rglob("*") if path.is_file()] == []


def test_a_skipped_step_moves_nothing_and_is_made_up_for(
    tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    config = dataclasses.replace(config, triggers=None)
    loop = make_loop(epochs=2, scaler=torch.amp.GradScaler("cpu"))
    with loop.protect(config) as guard:
        loop.run(until=3)
        before = loop.digests[3]
        overflow = loop.model.classifier.bias.register_hook(lambda gradient: gradient * float("inf"))
        loop.run(until=4)
        overflow.remove()
        assert loop.accelerator is not None
        assert loop.accelerator.optimizer_step_was_skipped
        assert guard.step == 4
        assert loop.digests[4] == before
        loop.run()
    manifest = guard.save(tmp_path / "final")
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0


def test_loss_scaling_needs_the_decoupled_form(make_loop: MakeLoop, config: WatermarkConfig) -> None:
    loop = make_loop(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(UnsupportedError, match="loss scaling"):
        loop.protect(config)
    loop.protect(dataclasses.replace(config, triggers=None))
    with pytest.raises(UnsupportedError, match="loss scaling"):
        loop.protect(dataclasses.replace(config, triggers=None, signature=SignatureConfig(form="gradient")))


def _wrong_order(loop: Loop, guard: Guard, what: str, tmp_path: Path) -> None:
    batch = next(iter(loop.loader))
    if what == "after_step first":
        guard.after_step()
    elif what == "after_backward first":
        guard.after_backward()
    elif what == "after_backward missing":
        guard.before_accumulation()
        guard.after_step()
    elif what == "after_backward twice":
        guard.before_accumulation()
        guard.after_backward()
        guard.after_backward()
    elif what == "after_step missing":
        guard.before_accumulation()
        guard.after_backward()
        guard.before_accumulation()
    elif what == "save before after_step":
        guard.before_accumulation()
        guard.after_backward()
        guard.save(tmp_path / "save")
    elif what == "zero_grad in between":
        guard.before_accumulation()
        loop.optimizer.zero_grad()
        loop.model(**batch).loss.backward()
        guard.after_backward()
    else:
        loop.run()
        guard.finish()
        guard.before_accumulation()


@pytest.mark.parametrize(
    "what",
    [
        "after_step first",
        "after_backward first",
        "after_backward missing",
        "after_backward twice",
        "after_step missing",
        "save before after_step",
        "zero_grad in between",
        "another step after the end",
    ],
)
def test_calls_out_of_order_are_refused(
    what: str, tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop(accelerated=False, epochs=2)
    with pytest.raises(UsageError, match="out of order") as caught:
        _wrong_order(loop, loop.protect(config), what, tmp_path)
    assert caught.value.hint


def test_microsteps_do_nothing(make_loop: MakeLoop, config: WatermarkConfig) -> None:
    loop = make_loop(epochs=2)
    guard = loop.protect(config)
    assert loop.accelerator is not None
    for index, batch in enumerate(loop.loader):
        with loop.accelerator.accumulate(loop.model):
            loop._microstep(batch, last=False)
        assert guard.step == (index + 1) // ACCUMULATION


def _other_optimizer(loop: Loop) -> None:
    loop.optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())


def _frozen(loop: Loop) -> None:
    loop.model.requires_grad_(False)


def _frozen_but_the_head(loop: Loop) -> None:
    loop.model.bert.requires_grad_(False)


def _without_tokenizer(loop: Loop) -> None:
    loop.guarding["processing_class"] = None


def _without_steps(loop: Loop) -> None:
    loop.guarding["max_steps"] = None


def _not_prepared(loop: Loop) -> None:
    loop.accelerator = Loop(make_model("classification", 100), loop.tokenizer, loop.rows).accelerator


def _in_parallel(loop: Loop) -> None:
    loop.accelerator = None
    loop.model = nn.DataParallel(loop.model)  # type: ignore[assignment]


def _no_model(loop: Loop) -> None:
    loop.accelerator = None
    loop.model = nn.Linear(2, 2)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_other_optimizer, UsageError),
        (_frozen, UnsupportedError),
        (_frozen_but_the_head, UnsupportedError),
        (_without_tokenizer, UsageError),
        (_without_steps, UsageError),
        (_not_prepared, UsageError),
        (_in_parallel, UnsupportedError),
        (_no_model, UnsupportedError),
    ],
)
def test_what_cannot_be_guarded_is_refused_at_once(
    change: Callable[[Loop], None], error: type[WmguardError], make_loop: MakeLoop, config: WatermarkConfig
) -> None:
    loop = make_loop()
    change(loop)
    with pytest.raises(error) as caught:
        loop.protect(config)
    assert caught.value.hint
    assert not Path(config.registry).exists()


def test_processes_that_know_nothing_of_each_other_are_refused(
    make_loop: MakeLoop, config: WatermarkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    # As accelerate's launcher leaves it on CPUs, where each process takes itself for the only one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="of 2 processes this one knows 1"):
        loop.protect(config)


def test_the_names_of_the_contract(make_loop: MakeLoop, config: WatermarkConfig) -> None:
    loop = make_loop()
    config = dataclasses.replace(config, triggers=None)
    guard = Guard(config=config, model=loop.model, optimizer=loop.optimizer, accelerator=loop.accelerator, max_steps=8)
    # Without the length of an epoch, last_epochs is a share of the run.
    guard.before_accumulation()
    assert guard.mark.committed is not None


def _budget(config: WatermarkConfig, tmp_path: Path) -> WatermarkConfig:
    return dataclasses.replace(config, signature=SignatureConfig(budget=0.08, last_epochs=2))


def _iteration(config: WatermarkConfig, tmp_path: Path) -> WatermarkConfig:
    return dataclasses.replace(config, iteration="2")


def _model_id(config: WatermarkConfig, tmp_path: Path) -> WatermarkConfig:
    return dataclasses.replace(config, model_id="acme/other")


def _owner(config: WatermarkConfig, tmp_path: Path) -> WatermarkConfig:
    make_keys(tmp_path / "other")
    return dataclasses.replace(config, owner_key=f"file:{tmp_path / 'other' / 'owner.key'}")


def _registry(config: WatermarkConfig, tmp_path: Path) -> WatermarkConfig:
    Registry(tmp_path / "elsewhere", OwnerKey.load(config.owner_key)).append("commitment", {"model_id": "acme/tiny"})
    return dataclasses.replace(config, registry=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_budget, ConfigError),
        (_iteration, ConfigError),
        (_model_id, OwnershipError),
        (_owner, OwnershipError),
        (_registry, RegistryError),
    ],
)
def test_resuming_with_something_else_is_refused(
    change: Callable[[WatermarkConfig, Path], WatermarkConfig],
    error: type[WmguardError],
    tmp_path: Path,
    make_loop: MakeLoop,
    config: WatermarkConfig,
) -> None:
    loop = make_loop()
    loop.protect(config)
    loop.run(until=2)
    loop.save(tmp_path / "state")
    again = make_loop()
    again.protect(change(config, tmp_path))
    with pytest.raises(error) as caught:
        again.resume(tmp_path / "state")
    assert caught.value.hint


def _flip(folder: Path, loop: Loop) -> None:
    data = bytearray((folder / "optimizer.wmguard").read_bytes())
    data[-100] ^= 1
    (folder / "optimizer.wmguard").write_bytes(data)


def _plain_state(folder: Path, loop: Loop) -> None:
    torch.save(loop.optimizer.state_dict(), folder / "optimizer.bin")


def _no_state(folder: Path, loop: Loop) -> None:
    (folder / "optimizer.wmguard").unlink()


def _no_manifest(folder: Path, loop: Loop) -> None:
    for path in folder.glob("wmguard_manifest*"):
        path.unlink()


def _plain_weights(folder: Path, loop: Loop) -> None:
    torch.save(dict(loop.model.state_dict()), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_flip, AuthenticationError),
        (_plain_state, ManifestError),
        (_no_state, NotFoundError),
        (_no_manifest, ManifestError),
        (_plain_weights, ManifestError),
    ],
)
def test_a_spoilt_state_is_refused(
    spoil: Callable[[Path, Loop], None],
    error: type[WmguardError],
    tmp_path: Path,
    make_loop: MakeLoop,
    config: WatermarkConfig,
) -> None:
    loop = make_loop()
    loop.protect(config)
    loop.run(until=2)
    loop.save(tmp_path / "state")
    spoil(tmp_path / "state", loop)
    again = make_loop()
    again.protect(config)
    with pytest.raises(error) as caught:
        again.resume(tmp_path / "state")
    assert caught.value.hint


def test_a_model_alone_cannot_be_resumed(tmp_path: Path, make_loop: MakeLoop, config: WatermarkConfig) -> None:
    loop = make_loop(accelerated=False)
    guard = loop.protect(config)
    loop.run(until=1)
    guard.save(tmp_path / "save", resumable=True)
    assert "optimizer.wmguard" in folder_names(tmp_path / "save")
    loop.run(until=2)
    guard.save(tmp_path / "save")
    with pytest.raises(NotFoundError, match="optimizer") as caught:
        guard.resume(tmp_path / "save")
    assert "resumable=True" in caught.value.hint


def test_no_step_is_no_mark(make_loop: MakeLoop, config: WatermarkConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_wmguard"), make_loop().protect(config) as guard:
        pass
    assert "no step was taken" in caplog.text
    assert guard.mark.committed is None


def test_a_loop_that_fails_is_not_finished(make_loop: MakeLoop, config: WatermarkConfig) -> None:
    loop = make_loop()

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), loop.protect(config) as guard:
        loop.run(at_step=interrupt)
    assert guard.mark.state == "pending"


SCRIPT = """
import sys, json, torch
sys.path.insert(0, {tests!r})
from hub import Hub
from loops import Loop
from tiny import make_model, make_rows, make_texts, make_tokenizer
from hf_wmguard import WatermarkConfig
tokenizer = make_tokenizer()
rows = make_rows("classification", tokenizer, make_texts())
loop = Loop(make_model("classification", len(tokenizer)), tokenizer, rows)
loop.protect(WatermarkConfig.from_dict(json.loads({config!r})))
loop.run(until=1)
"""


def test_an_unsaved_run_is_named_when_the_process_ends(config: WatermarkConfig) -> None:
    tests = str(Path(__file__).parent.parent)
    script = SCRIPT.format(tests=tests, config=json.dumps(config.to_dict()))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "in memory only" in done.stderr


def test_what_goes_to_the_hub_is_delivered_at_the_end(
    hub: Hub, make_loop: MakeLoop, config: WatermarkConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    protection = dataclasses.replace(config.protection, destination="hub://acme/loop")
    loop = make_loop()
    with loop.protect(dataclasses.replace(config, protection=protection)):
        loop.run()
    assert (tmp_path / "delivery" / "wmguard_manifest.json").is_file()
    assert verify("hub://acme/loop", **_where(config)).verdict == "detected"
