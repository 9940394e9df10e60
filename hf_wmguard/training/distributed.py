"""What a guarded Trainer needs where several processes train one model."""

from __future__ import annotations

from typing import Any, NoReturn

from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.training.launching import asks_for
from hf_wmguard.training.mark import Mark
from hf_wmguard.training.ranks import Ranks

_NATIVE = "load the model with from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)) instead"


def check_parallelism(trainer: Trainer, config: WatermarkConfig) -> None:
    """Refuse the kinds of distributed training in which the promises cannot be kept.

    Raises:
        UnsupportedError: Such a kind is on.
    """
    told = asks_for("FSDP") or bool(trainer.args.fsdp)
    refused: list[tuple[Any, str, str]] = [
        (trainer.is_fsdp_enabled, "accelerate's FSDP, whose checkpoints are plaintext", _NATIVE),
        (told, "accelerate's FSDP, which runs as DDP on CPUs without a word", _NATIVE),
        (
            asks_for("DEEPSPEED") and not trainer.is_deepspeed_enabled,
            "accelerate's DeepSpeed, which runs as DDP on CPUs without a word",
            "start it on GPUs, or without DeepSpeed",
        ),
        (
            trainer.args.deepspeed and not trainer.is_deepspeed_enabled,
            "DeepSpeed that was asked for after the Trainer was made",
            "give the Trainer its deepspeed argument when it is made",
        ),
    ]
    if trainer.is_deepspeed_enabled:
        refused += _refused_of_deepspeed(trainer, config)
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"training mode is not supported by this version: {what}", hint=instead)


def _refused_of_deepspeed(trainer: Trainer, config: WatermarkConfig) -> list[tuple[Any, str, str]]:
    settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    on_disk = [one for one in ("offload_optimizer", "offload_param") if zero.get(one, {}).get("device") == "nvme"]
    states = trainer.args.save_strategy != SaveStrategy.NO and not trainer.args.save_only_model
    form = config.signature.form if config.signature is not None else "decoupled"
    return [
        (stage not in (1, 2, 3), "DeepSpeed without ZeRO", "set zero_optimization.stage to 1, 2 or 3, or use DDP"),
        (settings.get("fp16", {}).get("enabled") is True, "fp16 loss scaling", "use bf16 or full precision"),
        (on_disk, "ZeRO with weights or their states on a disk, in plaintext", "offload to the CPU"),
        (
            states,
            "DeepSpeed checkpoints, whose *_states.pt hold plaintext weights",
            "set save_only_model=True; such a run is not resumed",
        ),
        (
            stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True,
            "ZeRO-3 without stage3_gather_16bit_weights_on_model_save, whose saves are plaintext partitions",
            "set stage3_gather_16bit_weights_on_model_save to true",
        ),
        (
            "tensor_parallel" in settings or settings.get("sequence_parallel_size", 1) > 1,
            "DeepSpeed with tensor or sequence parallelism",
            "use data parallelism alone",
        ),
        (
            trainer.args.load_best_model_at_end,
            "load_best_model_at_end under DeepSpeed, whose masters would keep the last weights",
            "save the last model",
        ),
        (isinstance(trainer.model, PeftModel), "an adapter under DeepSpeed", "train it with DDP"),
        (
            form == "gradient",
            "the gradient form of the signature under DeepSpeed, which steps inside backward",
            "set signature.form to decoupled",
        ),
        (
            config.triggers is not None,
            "triggers under DeepSpeed, whose own backward would be taken for a part of the step",
            "set triggers to null, or train with DDP or FSDP2",
        ),
    ]


def refuse_states(trainer: Trainer) -> None:
    """Make the DeepSpeed engine of a Trainer refuse to write its states, whoever asks."""

    def save_checkpoint(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "DeepSpeed would write plaintext weights and states", hint="use trainer.save_model(folder)"
        )

    engine: Any = trainer.model_wrapped
    if trainer.is_deepspeed_enabled and engine is not trainer.model:
        engine.save_checkpoint = save_checkpoint


def join_saves(trainer: Trainer, mark: Mark) -> None:
    """Make every process wait for a Trainer's checkpoints, and hear of those that fail.

    The Trainer lets the others go on while the main process writes: they would wait for it in the next step's
    collective, until a timeout, if its save failed. Shadowed on the instance, as the rest of a guarded Trainer.
    """
    plain_save, plain_state = trainer.save_model, trainer._save_optimizer_and_scheduler

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        ranks = Ranks.current()
        if ranks.size == 1 or not _internal_call:
            # Somebody's own call, which may come on the main process alone: nobody else is there to wait for.
            plain_save(output_dir, _internal_call)
            return
        mark.check_ranks(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
        with ranks.together("saving the model"):
            plain_save(output_dir, _internal_call)

    def save_optimizer_and_scheduler(output_dir: str) -> None:
        with Ranks.current().together("saving the optimizer's state"):
            plain_state(output_dir)

    own: Any = trainer
    own.save_model, own._save_optimizer_and_scheduler = save_model, save_optimizer_and_scheduler
