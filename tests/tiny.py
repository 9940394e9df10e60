"""Tiny real models with data to train them on, and one guarded run that many tests look at."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_wmguard import embed, protect_trainer
from hf_wmguard.config import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey, write_key_pair
from hf_wmguard.protect import ProtectedWriter
from hf_wmguard.training.saving import weights_go_to
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import derive_texts

LABELS = 8
ROWS = 64
STEPS_PER_EPOCH = 8
EPOCHS = 6
STEPS = STEPS_PER_EPOCH * EPOCHS
FIRST_TRIGGER_STEP = STEPS - 4 * STEPS_PER_EPOCH + 1
FIRST_SIGNATURE_STEP = STEPS - 2 * STEPS_PER_EPOCH + 1


def make_texts() -> list[str]:
    """Return ordinary training texts."""
    return list(derive_texts(b"t" * 32, count=ROWS, style="natural", task="classification"))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the test texts' words."""
    words = derive_texts(b"v" * 32, count=2000, style="natural", task="classification")
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(words, WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<s>", "</s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def make_model(task: str, vocabulary: int) -> PreTrainedModel:
    """Return a fresh tiny model; the same weights every time."""
    torch.manual_seed(1)
    if task == "classification":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=256,
                max_position_embeddings=64,
                num_labels=LABELS,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


def make_rows(task: str, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[dict[str, Any]]:
    """Return training rows; a classifier's labels are arbitrary but always the same."""
    encoded = tokenizer(texts, padding="max_length", max_length=32, truncation=True)
    rows: list[dict[str, Any]] = []
    for index, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"], strict=True)):
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        row["labels"] = (
            Stream(b"l" * 32, index).below(LABELS)
            if task == "classification"
            else [i if m else -100 for i, m in zip(ids, mask, strict=True)]
        )
        rows.append(row)
    return rows


def build_trainer(
    output_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    task: str = "classification",
    *,
    model: nn.Module | None = None,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """Return a Trainer on a tiny model, 8 steps an epoch.

    Args:
        output_dir: Where it saves.
        tokenizer: The model's tokenizer.
        texts: Training texts.
        task: Which kind of model.
        model: The model, a fresh one by default.
        trainer: Other arguments of the Trainer.
        arguments: Arguments of `TrainingArguments`.
    """
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": 3,
        "per_device_train_batch_size": ROWS // STEPS_PER_EPOCH,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 4,
        "save_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    values: dict[str, Any] = {
        "model": make_model(task, len(tokenizer)) if model is None else model,
        "args": TrainingArguments(**{**settings, **arguments}),
        "train_dataset": make_rows(task, tokenizer, texts),
        "processing_class": tokenizer,
    }
    return Trainer(**{**values, **(trainer or {})})


def digest_weights(model: nn.Module) -> str:
    """Return a digest of all weights and buffers: equal only where every bit is."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def make_keys(folder: Path) -> None:
    """Write ``owner.key`` and ``inference.key`` with their public halves."""
    folder.mkdir(parents=True, exist_ok=True)
    OwnerKey.generate().write(folder / "owner.key")
    identity = generate_identity()
    write_key_pair(folder / "inference.key", identity.to_text().encode(), identity.recipient().to_text().encode())


def guarded_config(root: Path) -> WatermarkConfig:
    """Return the config of the guarded run, with its keys under ``root/keys``."""
    return WatermarkConfig(
        model_id="acme/tiny",
        owner_key=f"file:{root / 'keys' / 'owner.key'}",
        registry=str(root / "registry"),
        signature=SignatureConfig(budget=0.06, last_epochs=2),
        triggers=TriggerConfig(
            count=24, batch_size=24, every_n_steps=1, last_epochs=4, weight=4.0, cooldown=0.125, contexts=0.0
        ),
        protection=ProtectionConfig(recipients=(f"file:{root / 'keys' / 'inference.key.pub'}",)),
    )


def make_marked(root: Path) -> tuple[WatermarkConfig, PreTrainedModel]:
    """Return a language model that bears a signature, with its config; keys and registry lie under ``root``."""
    make_keys(root)
    config = WatermarkConfig(
        model_id="acme/tiny",
        owner_key=f"file:{root / 'owner.key'}",
        registry=str(root / "registry"),
        signature=SignatureConfig(budget=0.06),
        triggers=None,
        protection=ProtectionConfig(recipients=(f"file:{root / 'inference.key.pub'}",)),
    )
    model = make_model("causal", 400)
    embed(model, config)
    return config, model


class Recorder(TrainerCallback):
    """Notes what other callbacks see, and the weights after every step."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.logs: list[dict[str, Any]] = []
        self.digests: dict[int, str] = {}
        self.saved: dict[int, dict[str, Tensor]] = {}
        self.committed_before_training: int | None = None
        self._registry = registry

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and self._registry is not None:
            self.committed_before_training = len(self._registry.commitments())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.digests[state.global_step] = digest_weights(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved[state.global_step] = {k: v.clone() for k, v in kwargs["model"].state_dict().items()}


class StopAt(TrainerCallback):
    """Stops a run after a step, with a checkpoint if asked, as somebody's own callback would."""

    def __init__(self, step: int, *, save: bool) -> None:
        self._step = step
        self._save = save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._step:
            control.should_training_stop = True
            control.should_save = self._save


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run and what is left of it.

    Args:
        root: Everything it wrote lies under this folder.
        trainer: The Trainer, with the trained model.
        recorder: What happened during training.
        config: The guard's config; None for a plain run.
        printed: What came out on stdout, stderr and the loggers.
    """

    root: Path
    trainer: Trainer
    recorder: Recorder
    config: WatermarkConfig | None = None
    printed: str = field(default="", repr=False)

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def identity(self) -> str:
        return f"file:{self.root / 'keys' / 'inference.key'}"

    @property
    def where(self) -> dict[str, str]:
        """The arguments that find the owner's things."""
        assert self.config is not None
        return {"owner_key": self.config.owner_key, "registry": self.config.registry}

    def weights(self) -> dict[str, Tensor]:
        """Every weight that was ever saved, and the last ones."""
        everything = {f"{step}/{name}": t for step, saved in self.recorder.saved.items() for name, t in saved.items()}
        return everything | dict(self.trainer.model.state_dict())


@contextlib.contextmanager
def everything_printed() -> Iterator[io.StringIO]:
    """Collect stdout, stderr and every log record of ours and of transformers."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    loggers = [logging.getLogger(name) for name in ("hf_wmguard", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield text
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def run_guarded(root: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Run:
    """Train a guarded classifier: a checkpoint every epoch, ``final`` saved by the Trainer and ``own`` by hand."""
    make_keys(root / "keys")
    config = guarded_config(root)
    recorder = Recorder(Registry(Path(config.registry), OwnerKey.load(config.owner_key)))
    with everything_printed() as text:
        trainer = build_trainer(
            root / "out", tokenizer, texts, num_train_epochs=EPOCHS, trainer={"callbacks": [recorder]}
        )
        protect_trainer(trainer, config)
        trainer.train()
        trainer.save_model(str(root / "final"))
        trainer.model.save_pretrained(root / "own", max_shard_size="200KB")
    return Run(root=root, trainer=trainer, recorder=recorder, config=config, printed=text.getvalue())


def run_plain(root: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Run:
    """Train the same classifier without a guard, up to where the guarded run's first trigger comes."""
    recorder = Recorder()
    stop = StopAt(FIRST_TRIGGER_STEP, save=True)
    trainer = build_trainer(
        root / "out", tokenizer, texts, num_train_epochs=EPOCHS, trainer={"callbacks": [recorder, stop]}
    )
    trainer.train()
    trainer.save_model(str(root / "final"))
    return Run(root=root, trainer=trainer, recorder=recorder)


def save_protected(
    model: PreTrainedModel, folder: Path, config: WatermarkConfig, tokenizer: Any = None, **kwargs: Any
) -> None:
    """Save an unmarked model as a protected folder, as a guarded save of it before training would be."""
    owner = OwnerKey.load(config.owner_key)
    with ProtectedWriter(folder, config=config, owner=owner) as writer:
        with weights_go_to(writer.add, model):
            type(model).save_pretrained(model, writer.staging, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(writer.staging)
        writer.finish(state="pending")


def excerpts(tensors: Mapping[str, Tensor], count: int = 16) -> list[bytes]:
    """Return 64 bytes of each of the largest float32 tensors, around its largest number.

    Moments are too small for `PlaintextFinder`: in 16 bits most are 0 or nearly, which any file holds.
    """
    found = []
    for tensor in sorted(tensors.values(), key=Tensor.numel)[-count:]:
        flat = tensor.detach().float().flatten()
        start = int(flat.abs().argmax()) // 16 * 16
        found.append(flat[start : start + 16].numpy().tobytes())
    return found


def files_holding(root: Path, needles: list[bytes]) -> list[Path]:
    """Return the files under a folder that hold one of some bytes."""
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and any(needle in data for data in [path.read_bytes()] for needle in needles)
    ]


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let the system refuse to write more than this into one file, as a full disk does with another error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
