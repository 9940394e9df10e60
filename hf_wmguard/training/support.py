"""Refuse, before the first step, what this version cannot protect: failing at the save would be too late."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.recipients import load_recipient, seal_recipients
from hf_wmguard.errors import NonFiniteWeightError, UnsupportedError
from hf_wmguard.training.backends import ADAPTER
from hf_wmguard.training.launching import asks_for, check_joined
from hf_wmguard.training.saving import Model
from hf_wmguard.training.sharded import is_sharded, local


def check_model(model: nn.Module | None, *, loaded: bool = True) -> Model:
    """Return the model if its saves can be intercepted.

    Args:
        model: The model.
        loaded: Whether all its weights are there already: under accelerate's FSDP the main process alone has them at
            first, and sends them to the others when training begins.
    Raises:
        UnsupportedError: Not a `PreTrainedModel` or a LoRA adapter on one, quantized, or partly on disk.
    """
    inner = model
    if isinstance(model, PeftModel):
        _check_adapters(model)
        if is_sharded(model):
            raise UnsupportedError(
                "an adapter beside a base that lies in parts on several processes is not supported by this version",
                hint="load the base without distributed_config, for DDP, or train without an adapter",
            )
        inner = model.get_base_model()
    if not isinstance(inner, PreTrainedModel) or not isinstance(model, Model):
        raise UnsupportedError(
            f"model is {type(inner).__name__}, expected a transformers PreTrainedModel or a PeftModel of one: "
            "the Trainer saves anything else in plaintext",
            hint="pass the model that was compiled, and torch_compile=True in TrainingArguments"
            if hasattr(model, "_orig_mod")
            else "wrap the network in a PreTrainedModel",
        )
    if model is inner and getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            "model has PEFT adapters of its own", hint="use peft.get_peft_model instead of model.add_adapter"
        )
    if getattr(inner, "hf_quantizer", None) is not None and not (model is not inner and _is_4bit(inner)):
        raise UnsupportedError(
            "model is quantized",
            hint="load it without quantization_config, or train a LoRA adapter on a bitsandbytes 4-bit base",
        )
    devices = {parameter.device for parameter in model.parameters() if loaded or not parameter.is_meta}
    if devices and (len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda")):
        raise UnsupportedError(
            f"model lies on {', '.join(sorted(map(str, devices)))}, expected one CPU or CUDA device",
            hint="load it without device_map",
        )
    if "disk" in (getattr(inner, "hf_device_map", None) or {}).values():
        raise UnsupportedError(
            "model is offloaded to disk, where its weights lie in plaintext",
            hint="load it without offload_folder",
        )
    return model


def check_trains(model: nn.Module) -> None:
    """Refuse a model of which nothing is trained.

    Raises:
        UnsupportedError: All of it is frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedError("the model is frozen: there is nothing to mark", hint="train some of its parameters")


def inner_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper, or itself."""
    return getattr(optimizer, "optimizer", optimizer)


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer whose weights in training are not those of a save.

    Args:
        optimizer: As accelerate has wrapped it, or any other.
    Raises:
        UnsupportedError: A schedule-free one.
    """
    if "schedulefree" in type(inner_optimizer(optimizer)).__name__.lower():
        raise UnsupportedError(
            "training mode is not supported by this version: a schedule-free optimizer, which trains other weights "
            "than it saves",
            hint="use another optimizer",
        )


def _check_adapters(model: PeftModel) -> None:
    """Refuse the kinds of adapters whose saves or whose weights this version cannot follow."""
    if ADAPTER not in model.peft_config or list(model.active_adapters) != [ADAPTER]:
        raise UnsupportedError(
            f"of the adapters {', '.join(model.peft_config)}, {', '.join(model.active_adapters)} is active, "
            f"expected one, named {ADAPTER}",
            hint=f"load what is trained with adapter_name={ADAPTER!r} and call model.set_adapter({ADAPTER!r})",
        )
    others = [f".{name}." for name in model.peft_config if name != ADAPTER]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(other in name for other in others):
            raise UnsupportedError(
                f"{name} is trained beside the adapter named {ADAPTER}, which alone is marked and saved",
                hint="freeze the other adapters, or train them in a process of their own",
            )
    kind = model.peft_config[ADAPTER].peft_type
    if kind != PeftType.LORA:
        raise UnsupportedError(
            f"PEFT adapters of type {getattr(kind, 'value', kind)} are not supported by this version, expected LORA",
            hint="use LoraConfig, or merge the adapter and train the whole model",
        )


def _is_4bit(model: Any) -> bool:
    return getattr(model.hf_quantizer.quantization_config, "load_in_4bit", False) is True


def check_arguments(args: TrainingArguments, *, attached: bool) -> None:
    """Refuse the training modes in which this version cannot keep its promises.

    Args:
        args: The Trainer's arguments.
        attached: Whether `protect_trainer` was used, so that encrypted checkpoints can be read back.
    Raises:
        UnsupportedError: Such a mode is on.
    """
    check_joined(args.world_size)
    refused: list[tuple[Any, str, str]] = [
        (
            args.world_size > 1 and not attached,
            "more than one process beside a bare callback, which cannot tell the others of a save that failed",
            "use protect_trainer(trainer, config) instead of trainer.add_callback(...)",
        ),
        (args.n_gpu > 1, "torch.nn.DataParallel", "set CUDA_VISIBLE_DEVICES to one device"),
        (
            not attached and (args.deepspeed or args.fsdp or asks_for("DEEPSPEED") or asks_for("FSDP")),
            "DeepSpeed or FSDP beside a bare callback, which cannot tell what they write",
            "use protect_trainer(trainer, config) instead of trainer.add_callback(...)",
        ),
        (
            args.push_to_hub and not attached,
            "push_to_hub beside a bare callback, which cannot reach the Trainer's pushes",
            "use protect_trainer(trainer, config) instead of trainer.add_callback(...)",
        ),
        (
            "schedule_free" in args.optim,
            "a schedule-free optimizer, which trains other weights than it saves",
            "use another optimizer",
        ),
    ]
    for on, what, instead in refused:
        if on:
            raise UnsupportedError(f"training mode is not supported by this version: {what}", hint=instead)
    if args.load_best_model_at_end and not attached:
        raise UnsupportedError(
            "load_best_model_at_end has to read encrypted checkpoints back, which a bare callback cannot do",
            hint="use protect_trainer(trainer, config) instead of trainer.add_callback(...)",
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


def check_finite(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse a model that could never be saved.

    Raises:
        NonFiniteWeightError: A weight is NaN or Inf.
    """
    for name, parameter in parameters.items():
        # PyTorch has no isfinite for the 8-bit floats.
        if (
            parameter.is_floating_point()
            and parameter.element_size() > 1
            and not bool(torch.isfinite(local(parameter)).all())
        ):
            raise NonFiniteWeightError(
                f"{name} holds NaN or Inf before the first step",
                hint="the model is damaged or was never initialised: load it again",
            )
