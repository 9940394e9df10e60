"""Refuse, when a guard is made for an own loop, what could not be protected later."""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.recipients import load_recipient, seal_recipients
from hf_wmguard.errors import UnsupportedError, UsageError
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.training.saving import Model, inner_model
from hf_wmguard.training.sharded import backend_of
from hf_wmguard.training.support import check_model
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
    checked = check_model(unwrapped(model))
    trained = {id(parameter) for parameter in checked.parameters() if parameter.requires_grad}
    if not trained:
        raise UnsupportedError("the model is frozen: there is nothing to mark", hint="train some of its parameters")
    if config.quality is not None:
        raise UnsupportedError(
            "quality is measured by a Trainer, of which a loop of your own has none",
            hint="set quality to null, and compare your own metric before the marked phase and after guard.finish()",
        )
    if config.signature is not None:
        backend_of(checked)
    if not any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
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


def check_prepared(accelerator: Accelerator, model: Model, optimizer: Any) -> None:
    """Refuse an accelerator whose states hold anything but this model and this optimizer.

    Raises:
        UsageError: One of the two has not been prepared.
        UnsupportedError: Others have been, too: accelerate would write them in plaintext.
    """
    models, optimizers = accelerator._models, accelerator._optimizers
    if not any(unwrapped(one) is model for one in models) or not any(
        _inner(one) is _inner(optimizer) for one in optimizers
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


def check_recipients(config: WatermarkConfig) -> None:
    """Wrap a key that is never used: what refuses to wrap must say so now, not at the first save.

    Raises:
        KeyFormatError, NotFoundError: A recipient cannot be read.
        AuthenticationError, KeyServiceError: A key service refuses, or does not answer.
    """
    recipients = [load_recipient(reference) for reference in config.protection.recipients]
    if recipients:
        seal_recipients(secrets.token_bytes(32), recipients, set_id="check", model_id=config.model_id)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what ``accelerator.prepare`` or ``torch.compile`` put around it."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def _check_modes(model: nn.Module, optimizer: Any, accelerator: Accelerator | None) -> None:
    kind = accelerator.distributed_type if accelerator is not None else DistributedType.NO
    processes = _processes(accelerator)
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    refused: list[tuple[bool, str, str]] = [
        (kind == DistributedType.DEEPSPEED, "DeepSpeed, which writes plaintext partitions", "use one process"),
        (kind == DistributedType.FSDP, "FSDP, which writes plaintext shards", "use one process"),
        (kind not in known, f"accelerate's {kind.value}", "use one CPU or CUDA device"),
        (processes > 1, "more than one process", "start one process"),
        (
            int(os.environ.get("WORLD_SIZE", "1")) > processes,
            "several processes that know nothing of each other and would write the same files",
            "start one process; on CPUs set ACCELERATE_USE_CPU=true, so that accelerate joins them",
        ),
        (isinstance(model, nn.DataParallel), "torch.nn.DataParallel", "use one device"),
        (
            "schedulefree" in type(_inner(optimizer)).__name__.lower(),
            "a schedule-free optimizer, which trains other weights than it saves",
            "use another optimizer",
        ),
    ]
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"training mode is not supported by this version: {what}", hint=instead)


def _processes(accelerator: Accelerator | None) -> int:
    if accelerator is not None:
        return int(accelerator.num_processes)
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _adds_gradients(config: WatermarkConfig, model: Model) -> bool:
    signature, triggers = config.signature, config.triggers
    if signature is not None and signature.form == "gradient":
        return True
    if triggers is None or triggers.form == "decoupled":
        return False
    return triggers.form == "gradient" or task_of(inner_model(model)).name not in TEXT_TASKS
