"""Marking while training: triggers before a step, the signature after it, ciphertext at every save."""

from hf_wmguard.training.callback import WatermarkCallback, protect_trainer
from hf_wmguard.training.guard import Guard
from hf_wmguard.training.outcome import SignatureLostWarning

__all__ = ["Guard", "SignatureLostWarning", "WatermarkCallback", "protect_trainer"]
