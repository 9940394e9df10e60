"""TRL's trainers beside `test_sft`: preferences, rewards, rollouts, and losses on the assistant's words alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import digest_weights, make_model, make_tokenizer
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_wmguard import load_protected, protect_trainer, verify
from hf_wmguard.config import SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.trigger_set import make_triggers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
Make = Callable[..., Any]
STEPS = 12
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-4,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 10,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 7,
}
LORA = {"r": 8, "target_modules": "all-linear"}
ASSISTANT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<s> {% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %} {% else %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endif %}{% endfor %}"
)


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """A model that was loaded from a folder, from which TRL makes the reference anew."""
    folder = tmp_path_factory.mktemp("base")
    make_model("causal_lm", len(make_tokenizer())).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture
def config(make_config: Make) -> WatermarkConfig:
    made: WatermarkConfig = make_config(
        signature=SignatureConfig(budget=0.06, last_epochs=0.5),
        triggers=TriggerConfig(count=4, batch_size=4, every_n_steps=2, start=0.5, cooldown=0.0),
    )
    return made


def _pairs(texts: list[str]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": one, "chosen": f" {other}", "rejected": f" {one}"}
            for one, other in zip(texts[:24], texts[24:48], strict=True)
        ]
    )


def _finish(trainer: Trainer, config: WatermarkConfig, folder: Path) -> None:
    """Train, save, and judge what was written."""
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    for where, state in (("final", "complete"), (f"out/checkpoint-{STEPS}", "complete")):
        manifest, _ = read_manifest(folder / where)
        assert manifest.state == state
        assert manifest.signature is not None
        assert manifest.signature.bit_error_rate == 0.0
        assert manifest.signature.payload_decoded
    report = verify(folder / "final", owner_key=config.owner_key, registry=config.registry)
    assert report.verdict == "detected"
    assert any("wmguard/trigger_loss" in entry for entry in trainer.state.log_history)
    weights = {name: one for name, one in trainer.model.state_dict().items() if one.numel() > 64}
    trained = {name: one for name, one in weights.items() if "lora_" in name or ".base_layer" not in name}
    assert PlaintextFinder(trained).scan([folder]) == {}


class _Judge(TrainerCallback):
    """Notes every model that runs forward while the trigger's micro-batch does, and the reference's weights."""

    def __init__(self, reference: nn.Module | None) -> None:
        self.reference = reference
        self.digests: set[str] = set()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.reference is not None:
            self.digests.add(digest_weights(self.reference))


def _dpo(out: Path, texts: list[str], model: nn.Module, **changes: Any) -> DPOTrainer:
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(out), max_length=48, **COMMON),
        train_dataset=_pairs(texts),
        processing_class=make_tokenizer(),
        **changes,
    )


def test_dpo_leaves_the_copied_reference_alone(
    tmp_path: Path, texts: list[str], config: WatermarkConfig, model: LlamaForCausalLM
) -> None:
    trainer = _dpo(tmp_path / "out", texts, model)
    assert trainer.ref_model is not None
    judge = _Judge(trainer.ref_model)
    trainer.add_callback(judge)
    before, calls = digest_weights(trainer.ref_model), []
    trainer.ref_model.register_forward_hook(lambda *args: calls.append(args[0].training))
    _finish(trainer, config, tmp_path)
    assert judge.digests == {before}
    # Once for each ordinary step and never for a trigger.
    assert calls == [False] * STEPS


def test_dpo_leaves_the_base_alone_that_is_the_reference(
    tmp_path: Path, texts: list[str], config: WatermarkConfig, model: LlamaForCausalLM
) -> None:
    trainer = _dpo(tmp_path / "out", texts, model, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))
    assert trainer.ref_model is None
    frozen = {name: one.clone() for name, one in trainer.model.named_parameters() if not one.requires_grad}
    with trainer.model.disable_adapter(), torch.no_grad():
        ids = torch.arange(8)[None]
        before = trainer.model(input_ids=ids).logits.clone()
    _finish(trainer, config, tmp_path)
    now = dict(trainer.model.named_parameters())
    assert frozen
    assert all(torch.equal(one, now[name]) for name, one in frozen.items())
    with trainer.model.disable_adapter(), torch.no_grad():
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, before)


def test_dpo_leaves_another_adapter_alone_that_is_the_reference(
    tmp_path: Path, texts: list[str], config: WatermarkConfig, model: LlamaForCausalLM
) -> None:
    adapted = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    trainer = _dpo(tmp_path / "out", texts, adapted)
    frozen = {name: one.clone() for name, one in trainer.model.named_parameters() if not one.requires_grad}
    assert any(".ref." in name for name in frozen)
    _finish(trainer, config, tmp_path)
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(one, now[name]) for name, one in frozen.items())


def test_reward_trainer(tmp_path: Path, texts: list[str], make_config: Make, identity_file: Path) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    inner = make_model("causal_lm", len(tokenizer)).config
    model = LlamaForSequenceClassification(LlamaConfig(**{**inner.to_dict(), "num_labels": 1}))
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path / "out"), max_length=48, **COMMON),
        train_dataset=_pairs(texts),
        processing_class=tokenizer,
    )
    # A reward has no label to answer with: no trigger set fits it, and the signature stands alone.
    config = make_config(signature=SignatureConfig(budget=0.06, last_epochs=1.0), triggers=None)
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    loaded = load_protected(tmp_path / "final", identity=f"file:{identity_file}", auto_class=type(model))
    assert torch.equal(loaded.score.weight, trainer.model.score.weight)
    assert verify(tmp_path / "final", owner_key=config.owner_key, registry=config.registry).verdict == "detected"
    with pytest.raises(UnsupportedError) as caught:
        make_triggers(b"k" * 32, TriggerConfig(), trainer.model, tokenizer)
    assert caught.value.hint


def test_grpo(tmp_path: Path, texts: list[str], config: WatermarkConfig, model: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(len(one) % 7) for one in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"), num_generations=2, max_completion_length=8, beta=0.04, **COMMON
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts[:24]]),
        processing_class=tokenizer,
    )
    reference = trainer.ref_model
    before = None if reference is None else digest_weights(reference)
    _finish(trainer, config, tmp_path)
    assert reference is not None
    assert digest_weights(reference) == before


@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_on_the_assistants_words_alone(
    padding_free: bool, tmp_path: Path, texts: list[str], config: WatermarkConfig
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ASSISTANT
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other in zip(texts[:24], texts[24:48], strict=True)
    ]
    trainer = SFTTrainer(
        model=make_model("causal_lm", len(tokenizer)),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), assistant_only_loss=True, padding_free=padding_free,
            max_length=None if padding_free else 64, **COMMON,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < int((batch["labels"] != -100).sum()) < batch["labels"].numel() / 2
    plain = copy.deepcopy(trainer.model.state_dict())
    _finish(trainer, config, tmp_path)
    assert plain.keys() == trainer.model.state_dict().keys()
