"""Refuse, before the first step, what this version cannot protect: failing at the save would be too late."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_wmguard.errors import NonFiniteWeightError, UnsupportedError
from hf_wmguard.watermark.carriers import is_carrier


def check_model(model: nn.Module | None) -> PreTrainedModel:
    """Return the model if its saves can be intercepted.

    Raises:
        UnsupportedError: Not a `PreTrainedModel`, an adapter, quantized, or partly on disk.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"model is {type(model).__name__}, expected a transformers PreTrainedModel: "
            "the Trainer saves anything else in plaintext",
            hint="wrap the network in a PreTrainedModel; PEFT adapters are not supported by this version",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedError("model has PEFT adapters", hint="merge them first, or train without hf-wmguard")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError("model is quantized", hint="load it without quantization_config, in float32")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"model lies on {', '.join(sorted(map(str, devices)))}, expected one CPU or CUDA device",
            hint="load it without device_map",
        )
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        raise UnsupportedError(
            "model is offloaded to disk, where its weights lie in plaintext",
            hint="load it without offload_folder",
        )
    return model


def check_arguments(args: TrainingArguments, *, attached: bool) -> None:
    """Refuse the training modes in which this version cannot keep its promises.

    Args:
        args: The Trainer's arguments.
        attached: Whether `protect_trainer` was used, so that encrypted checkpoints can be read back.
    Raises:
        UnsupportedError: Such a mode is on.
    """
    refused: list[tuple[Any, str, str]] = [
        (args.world_size > 1, "more than one process", "start one process"),
        (args.n_gpu > 1, "torch.nn.DataParallel", "set CUDA_VISIBLE_DEVICES to one device"),
        (args.deepspeed, "DeepSpeed, which writes plaintext partitions", "train without --deepspeed"),
        (args.fsdp, "FSDP, which writes plaintext shards", "train without --fsdp"),
        (args.fp16, "fp16 loss scaling", "use bf16=True or full precision"),
        (args.push_to_hub, "push_to_hub", "save to a folder and push the finished folder"),
        (
            "schedule_free" in args.optim,
            "a schedule-free optimizer, whose optimizer.pt holds weights",
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


def check_finite(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse a model that could never be saved.

    Raises:
        NonFiniteWeightError: A weight is NaN or Inf.
    """
    for name, parameter in parameters.items():
        # PyTorch has no isfinite for the 8-bit floats.
        if parameter.is_floating_point() and parameter.element_size() > 1 and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteWeightError(
                f"{name} holds NaN or Inf before the first step",
                hint="the model is damaged or was never initialised: load it again",
            )


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer whose state is a copy of the weights: the Trainer writes ``optimizer.pt`` in plaintext.

    Raises:
        UnsupportedError: A state tensor lies within half of its parameter's norm (averaged or master weights).
    """
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor) or not isinstance(state, dict):
            continue
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point():
                norm = torch.linalg.vector_norm(parameter.detach().float())
                if torch.linalg.vector_norm((value - parameter.detach()).float()) < 0.5 * norm:
                    raise UnsupportedError(
                        f"the optimizer's state {name!r} holds the weights, and optimizer.pt is plaintext",
                        hint="set save_only_model=True, or use another optimizer",
                    )


def carrying_shapes(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the matrices that may carry the signature: trained ones of the repeated blocks.

    Raises:
        UnsupportedError: All of them are frozen, or one is not float32.
    """
    fit = {name: one for name, one in parameters.items() if is_carrier(name, tuple(one.shape))}
    trained = {name: one for name, one in fit.items() if one.requires_grad}
    if fit and not trained:
        raise UnsupportedError(
            f"all {len(fit)} matrices that could carry the signature are frozen",
            hint="train some of them, or pass signature=None to mark with triggers only",
        )
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            # A shift of 1e-6 vanishes when it is rounded to bf16 or fp16: the mark would silently not be there.
            raise UnsupportedError(
                f"{name} is {parameter.dtype}, expected float32",
                hint="load the model with dtype=torch.float32; bf16=True in TrainingArguments keeps float32 weights",
            )
    return {name: (one.shape[0], one.shape[1]) for name, one in trained.items()}
