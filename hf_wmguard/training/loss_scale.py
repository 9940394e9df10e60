"""What fp16 training does to losses and steps: a factor against underflow, and steps that are skipped on overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def scale_of(optimizer: Any) -> float:
    """Return the factor by which gradients are too large until they are clipped: 1 without loss scaling.

    Args:
        optimizer: As accelerate has wrapped it, or any other, or None.
    """
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def was_skipped(optimizer: Any) -> bool:
    """Return whether the optimizer's last step was skipped because its gradients had overflown.

    A fused one skips inside its own step, of which accelerate does not know; a mark that then moves on harms nothing.
    """
    return bool(getattr(optimizer, "step_was_skipped", False))


@torch.no_grad()
def unscale_(model: nn.Module, scale: float) -> bool:
    """Divide a model's gradients by a scale; return whether all of them are finite, as a scaler asks before a step."""
    if scale == 1.0:
        return True
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(scale)
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
