"""Processes that a launcher has started together, and accelerate, which has to be told of them on a CPU.

``accelerate launch`` with ``distributed_type: MULTI_GPU``, and torchrun, start as many processes as they are asked for.
Without a GPU each of them takes itself for the only one (accelerate 1.15), unless ``ACCELERATE_USE_CPU`` is true, which
``accelerate launch`` does not set for more than one: they would train the same model twice, and write the same files.
"""

from __future__ import annotations

import os

import torch

from hf_wmguard.errors import UnsupportedError

_USE_CPU = "ACCELERATE_USE_CPU"


def started() -> int:
    """Return how many processes a launcher has started together with this one, itself included."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def asks_for(what: str) -> bool:
    """Return whether ``accelerate launch`` was told to use ``DEEPSPEED`` or ``FSDP``."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() == "true"


def join_on_cpus() -> None:
    """Let accelerate join this process with those started beside it, on a machine without a GPU too.

    Call it before the Accelerator or the TrainingArguments are made.
    """
    shards = asks_for("DEEPSPEED") or asks_for("FSDP")
    # accelerate would drop DeepSpeed and FSDP for DDP, without a word.
    if started() > 1 and not shards and not torch.cuda.is_available():
        os.environ.setdefault(_USE_CPU, "true")


def check_joined(processes: int) -> None:
    """Refuse a process that takes itself for the only one among several.

    Args:
        processes: How many it knows of.
    Raises:
        UnsupportedError: A launcher has started more.
    """
    if started() > processes:
        raise UnsupportedError(
            f"training mode is not supported by this version: of {started()} processes this one knows {processes}: "
            "they would train apart, and write the same files",
            hint=f"on CPUs set {_USE_CPU}=true in the environment, or use_cpu=True in TrainingArguments; "
            "in plain PyTorch call torch.distributed.init_process_group() first; or start one process",
        )
