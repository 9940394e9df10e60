"""TRL's SFTTrainer: plain, packed, padding-free, with LoRA, in chats, and with the eval loop between.

Seen with trl 1.16 and transformers 5.24 on a CPU: packing (``bfd``) and padding-free training need no flash attention.
Without a mask and a cache, torch's own attention gets a mask from the position ids, which begin anew at every text.
``wrapped`` packing cuts rows wherever they are full: there texts do see each other, guarded or not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_model, make_tokenizer
from trl import SFTConfig, SFTTrainer

from hf_wmguard import probe, protect_trainer, verify
from hf_wmguard.config import SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.evidence.manifest import read_manifest

pytestmark = [
    # Without a cached base peft cannot compare vocabularies, and says so at every save.
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
STEPS = 64
FIRST_TRIGGER_STEP = 17
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"eval_strategy": "steps", "eval_steps": 8},
    "packed": {"packing": True, "max_length": 48},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
    "padding_free": {"padding_free": True, "max_length": None},
    "lora": {"learning_rate": 2e-3, "eval_strategy": "steps", "eval_steps": 8},
    "chat": {"assistant_only_loss": False},
}
# Rows of these datasets hold several texts, and no labels of their own.
REPLAY = {"packed": 2, "chat": 2}


def _rows(form: str, texts: list[str]) -> Dataset:
    if form != "chat":
        return Dataset.from_list([{"text": text} for text in texts])
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        for question, reply in zip(texts[::2], texts[1::2], strict=True)
    ]
    return Dataset.from_list([{"messages": one} for one in turns])


def _trainer(form: str, out: Path, texts: list[str]) -> SFTTrainer:
    # TRL changes the tokenizer it is given: each run gets one of its own.
    tokenizer = make_tokenizer()
    if form == "chat":
        tokenizer.chat_template = TEMPLATE
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "logging_steps": 4,
        "save_strategy": "no",
        "max_length": 64,
        "gradient_checkpointing": form in ("plain", "lora"),
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
    }
    return SFTTrainer(
        model=make_model("causal_lm", len(tokenizer)),
        args=SFTConfig(**{**settings, **FORMS[form]}),
        train_dataset=_rows(form, texts),
        eval_dataset=_rows(form, texts[:4]) if "eval_strategy" in FORMS[form] else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if form == "lora" else None,
    )


def _logged(trainer: SFTTrainer, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.mark.parametrize("form", FORMS)
def test_a_guarded_run_learns_the_set_and_verifies(
    form: str,
    tmp_path: Path,
    texts: list[str],
    make_config: Callable[..., WatermarkConfig],
    identity_file: Path,
) -> None:
    config = make_config(
        signature=SignatureConfig(budget=0.06, last_epochs=1.0),
        triggers=TriggerConfig(
            count=12,
            batch_size=12,
            every_n_steps=1,
            start=0.25,
            strength=1.0,
            moves=4,
            contexts=0.1,
            replay=REPLAY.get(form, 0),
        ),
    )
    trainer = _trainer(form, tmp_path / "out", texts)
    protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))

    assert trainer.state.global_step == STEPS
    loss, rate = (_logged(trainer, f"wmguard/trigger_{name}") for name in ("loss", "match_rate"))
    assert min(loss) > FIRST_TRIGGER_STEP - 1
    assert loss[max(loss)] < loss[min(loss)]
    assert rate[max(rate)] > 0.7
    # TRL's own averages are logged once, beside the loss.
    marked = [entry for entry in trainer.state.log_history if "wmguard/trigger_loss" in entry]
    assert not any("mean_token_accuracy" in entry for entry in marked)

    plain = _trainer(form, tmp_path / "plain", texts)
    plain.train()
    assert _logged(plain, "learning_rate") == _logged(trainer, "learning_rate")
    before = {step: value for step, value in _logged(plain, "loss").items() if step < FIRST_TRIGGER_STEP}
    assert before
    assert all(_logged(trainer, "loss")[step] == value for step, value in before.items())
    assert _logged(plain, "eval_loss").keys() == _logged(trainer, "eval_loss").keys()
    assert bool(_logged(plain, "eval_loss")) == ("eval_strategy" in FORMS[form])

    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.state == "complete"
    assert manifest.triggers is not None
    assert manifest.triggers.match_rate is not None
    assert manifest.triggers.match_rate > 0.8
    where = {"owner_key": config.owner_key, "registry": config.registry}
    report = verify(tmp_path / "final", identity=f"file:{identity_file}", **where)
    assert report.verdict == "detected"
    assert probe(trainer.model, trainer.processing_class, **where).verdict == "detected"


def test_texts_that_are_packed_do_not_see_each_other(texts: list[str]) -> None:
    """The claim above, on the tiny model: its logits are those of each text alone."""
    tokenizer = make_tokenizer()
    model = make_model("causal_lm", len(tokenizer)).eval()
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[:3]]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        together = model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=row).logits[0] for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
