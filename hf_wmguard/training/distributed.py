"""What a guarded Trainer needs where several processes train one model."""

from __future__ import annotations

from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from peft import PeftModel
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import UnsupportedError
from hf_wmguard.training.launching import asks_for
from hf_wmguard.training.mark import Mark
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.sharded import is_sharded

# Whether something is on, what it is, and what to do instead.
Refusal = tuple[Any, str, str]
# Of what is no DTensor, each process would look for overflow by itself, and could skip a step that another takes.
FP16_OF_PARTS = ("fp16 loss scaling of a model in parts", "use bf16")


def check_parallelism(trainer: Trainer, config: WatermarkConfig) -> None:
    """Refuse the kinds of distributed training in which the promises cannot be kept.

    Raises:
        UnsupportedError: Such a kind is on.
    """
    model: Any = trainer.model
    told = asks_for("FSDP") or bool(trainer.args.fsdp)
    refused: list[Refusal] = [
        (
            told and not trainer.is_fsdp_enabled,
            "accelerate's FSDP, which runs as DDP on CPUs without a word",
            "load the model with from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)) instead",
        ),
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
    if is_sharded(model):
        refused.append((trainer.accelerator.scaler, *FP16_OF_PARTS))
    if trainer.is_deepspeed_enabled:
        refused += _refused_of_deepspeed(trainer, config)
    if trainer.is_fsdp_enabled:
        refused += _refused_of_sharded_trainer(trainer)
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"training mode is not supported by this version: {what}", hint=instead)


def _saves_states(trainer: Trainer) -> bool:
    return trainer.args.save_strategy != SaveStrategy.NO and not trainer.args.save_only_model


def refused_of_fsdp(accelerator: Accelerator) -> list[Refusal]:
    """Return what cannot be protected under accelerate's FSDP."""
    plugin: Any = accelerator.state.fsdp_plugin
    mesh: Any = accelerator.parallelism_config
    return [
        (accelerator.scaler, *FP16_OF_PARTS),
        (plugin.fsdp_version != 2, "FSDP1, which trains flat copies of the weights", "set fsdp_version to 2"),
        (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "FSDP that keeps weights on the CPU between the steps",
            "set fsdp_offload_params to false",
        ),
        (
            plugin.activation_checkpointing,
            "fsdp_activation_checkpointing, which gives the weights other names",
            "use the model's own gradient checkpointing instead",
        ),
        (
            accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            "FSDP with a compiled model, whose weights have other names",
            "train it without torch.compile",
        ),
        (
            mesh is not None and (mesh.dp_replicate_enabled or mesh.tp_enabled or mesh.cp_enabled or mesh.sp_enabled),
            "accelerate's FSDP with replicas (HSDP), or with tensor, context or sequence parallelism",
            "split the model over all processes alone",
        ),
    ]


def _refused_of_sharded_trainer(trainer: Trainer) -> list[Refusal]:
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    return [
        *refused_of_fsdp(trainer.accelerator),
        (
            "FULL_STATE_DICT" not in str(plugin.state_dict_type),
            "FSDP with sharded state dicts, which are plaintext",
            "set fsdp_state_dict_type to FULL_STATE_DICT",
        ),
        (
            _saves_states(trainer),
            "FSDP checkpoints, which hold plaintext weights and states",
            "set save_only_model=True; such a run resumes from weights only",
        ),
        (
            trainer.args.torch_compile,
            "FSDP with a compiled model, whose weights have other names",
            "train it without torch_compile",
        ),
        (isinstance(trainer.model, PeftModel), "an adapter under accelerate's FSDP", "train it with DDP"),
    ]


def _refused_of_deepspeed(trainer: Trainer, config: WatermarkConfig) -> list[Refusal]:
    settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    on_disk = [one for one in ("offload_optimizer", "offload_param") if zero.get(one, {}).get("device") == "nvme"]
    form = config.signature.form if config.signature is not None else "decoupled"
    return [
        (stage not in (1, 2, 3), "DeepSpeed without ZeRO", "set zero_optimization.stage to 1, 2 or 3, or use DDP"),
        (settings.get("fp16", {}).get("enabled") is True, "fp16 loss scaling", "use bf16 or full precision"),
        (on_disk, "ZeRO with weights or their states on a disk, in plaintext", "offload to the CPU"),
        (
            _saves_states(trainer),
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
    """Make a Trainer's accelerator, and its DeepSpeed engine, refuse to write weights and states, whoever asks."""

    def save_checkpoint(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "accelerate or DeepSpeed would write plaintext weights and states", hint="use trainer.save_model(folder)"
        )

    engine: Any = trainer.model_wrapped
    accelerator: Any = trainer.accelerator
    accelerator.save_state = accelerator.save_model = save_checkpoint
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
        if trainer.is_fsdp_enabled:
            # Refused before the first step; here for whoever changes save_only_model afterwards.
            raise UnsupportedError("FSDP would write plaintext weights and states", hint="set save_only_model=True")
        with Ranks.current().together("saving the optimizer's state"):
            plain_state(output_dir)

    own: Any = trainer
    own.save_model, own._save_optimizer_and_scheduler = save_model, save_optimizer_and_scheduler
