"""Refuse, when a guard is made for an own loop, what could not be protected later."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.errors import UnsupportedError, UsageError
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.training.distributed import FP16_OF_PARTS, Refusal, refused_of_fsdp
from hf_wmguard.training.launching import check_joined
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.saving import Model, inner_model
from hf_wmguard.training.sharded import backend_of, is_sharded, reshard
from hf_wmguard.training.support import check_model, check_optimizer, check_trains, inner_optimizer
from hf_wmguard.training.zero import uses_zero
from hf_wmguard.watermark.triggers import TEXT_TASKS


def check_loop(config: WatermarkConfig, model: nn.Module, optimizer: Any, accelerator: Accelerator | None) -> Model:
    """Return the model inside what a loop trains, if it can be marked and its saves can be intercepted.

    Args:
        config: What to embed.
        model: The model, as ``accelerator.prepare`` or ``torch.compile`` returned it, or bare.
        optimizer: Its optimizer, likewise.
        accelerator: The loop's accelerator, None in plain PyTorch.
    Raises:
        UnsupportedError: A model or a mode in which the promises cannot be kept.
        UsageError: The optimizer does not train this model, or accelerate has not prepared the two.
    """
    _check_modes(model, optimizer, accelerator)
    # An evaluation may have left whole copies where the optimizer has parts.
    reshard(model)
    checked = check_model(unwrapped(model))
    check_trains(checked)
    if config.signature is not None:
        backend_of(checked)
    trained = {id(parameter) for parameter in checked.parameters() if parameter.requires_grad}
    groups = getattr(optimizer, "param_groups", ())
    if not any(id(parameter) in trained for group in groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer trains none of this model's parameters",
            hint="make the optimizer from the model that is given to the guard",
        )
    if accelerator is not None:
        check_prepared(accelerator, checked, optimizer)
        if accelerator.scaler is not None and _adds_gradients(config, checked):
            raise UnsupportedError(
                "training mode is not supported by this version: fp16 loss scaling with a mark in the gradient form",
                hint='use bf16, or set signature.form and triggers.form to "decoupled"',
            )
    return checked


def check_run(
    config: WatermarkConfig, processing_class: Any, max_steps: int | None, steps_per_epoch: int | None, evaluate: Any
) -> int:
    """Refuse a guard that was not told all that its config needs; arguments as those of `Guard`.

    Returns:
        The optimizer steps of the run.
    Raises:
        UsageError: Something is missing, or makes no sense.
    """
    if not isinstance(max_steps, int) or max_steps < 1:
        raise UsageError(
            f"max_steps is {max_steps!r}, expected the number of optimizer steps of the whole run",
            hint="the mark comes at the end, which has to be known: pass max_steps=epochs * steps_per_epoch",
        )
    if steps_per_epoch is not None and (not isinstance(steps_per_epoch, int) or steps_per_epoch < 1):
        raise UsageError(
            f"steps_per_epoch is {steps_per_epoch!r}, expected 1 or more optimizer steps",
            hint="leave it out where the dataloader is given, or count batches over gradient accumulation, rounded up",
        )
    if config.triggers is not None and processing_class is None:
        raise UsageError(
            "triggers need the model's tokenizer or image processor",
            hint="pass processing_class=tokenizer, or set triggers=None",
        )
    if config.quality is not None and evaluate is None:
        raise UsageError(
            "quality needs a way to evaluate the model",
            hint="pass evaluate=, a function from the model to its metrics, or set quality to null",
        )
    return max_steps


def check_prepared(accelerator: Accelerator, model: Model, optimizer: Any) -> None:
    """Refuse an accelerator whose states hold anything but this model and this optimizer.

    Raises:
        UsageError: One of the two has not been prepared.
        UnsupportedError: Others have been, too: accelerate would write them in plaintext.
    """
    models, optimizers = accelerator._models, accelerator._optimizers
    if not any(unwrapped(one) is model for one in models) or not any(
        inner_optimizer(one) is inner_optimizer(optimizer) for one in optimizers
    ):
        raise UsageError(
            "the model and its optimizer are not prepared by this accelerator",
            hint="call accelerator.prepare(model, optimizer, ...) before the guard is made",
        )
    if len(models) > 1 or len(optimizers) > 1 or any(isinstance(one, nn.Module) for one in accelerator._custom_objects):
        raise UnsupportedError(
            f"accelerator holds {len(models)} models, {len(optimizers)} optimizers and registered objects: "
            "save_state would write those that are not guarded in plaintext",
            hint="use an accelerator that prepares the guarded model and its optimizer only, and registers no module",
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what ``accelerator.prepare`` or ``torch.compile`` put around it."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def _check_modes(model: nn.Module, optimizer: Any, accelerator: Accelerator | None) -> None:
    check_optimizer(optimizer)
    check_joined(int(accelerator.num_processes) if accelerator is not None else Ranks.current().size)
    kind = accelerator.distributed_type if accelerator is not None else DistributedType.NO
    inner, name = unwrapped(model), type(inner_optimizer(optimizer)).__name__
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    deepspeed = kind == DistributedType.DEEPSPEED or uses_zero(inner) or type(model).__name__ == "DeepSpeedEngine"
    by_fsdp = kind == DistributedType.FSDP
    refused: list[Refusal] = [
        (deepspeed, "DeepSpeed, which writes plaintext partitions", "use DDP, or a Trainer with protect_trainer"),
        *(refused_of_fsdp(accelerator) if accelerator is not None and by_fsdp else ()),
        (
            isinstance(model, FullyShardedDataParallel),
            "FSDP1, which trains flat copies of the weights",
            "use fully_shard",
        ),
        (not by_fsdp and kind not in known, f"accelerate's {kind.value}", "use CPUs or CUDA devices"),
        (
            is_sharded(inner) and accelerator is not None and not by_fsdp,
            "accelerate with a model that was split before",
            "let accelerate split it (distributed_type FSDP), or use plain PyTorch for it",
        ),
        (
            is_sharded(inner) and model is not inner,
            "a compiled model in parts, whose weights have other names",
            "train it without torch.compile",
        ),
        (is_sharded(inner) and accelerator is not None and accelerator.scaler, *FP16_OF_PARTS),
        (isinstance(model, nn.DataParallel), "torch.nn.DataParallel", "use DistributedDataParallel"),
        (
            name == "ZeroRedundancyOptimizer",
            "an optimizer of which each process has a part of the state",
            "use an optimizer that is the same on all of them",
        ),
    ]
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"training mode is not supported by this version: {what}", hint=instead)


def _adds_gradients(config: WatermarkConfig, model: Model) -> bool:
    signature, triggers = config.signature, config.triggers
    if signature is not None and signature.form == "gradient":
        return True
    if triggers is None or triggers.form == "decoupled":
        return False
    return triggers.form == "gradient" or task_of(inner_model(model)).name not in TEXT_TASKS
