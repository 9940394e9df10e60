"""State dicts in pickles of PyTorch, read by its restricted unpickler: nothing in them is executed."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from hf_wmguard.errors import FormatError

# What torch's restricted unpickler raises on damaged or hostile input: stack underflow, unknown memo, wrong operand.
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a pickle, mapped into memory where its format allows it.

    Raises:
        FormatError: It cannot be read, would run code when loaded, or holds no named tensors.
    """
    try:
        # Only the zip format of torch 1.6 and later can be mapped.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _BROKEN_PICKLE:
        # In our own words: torch's advise loading the file with its code.
        raise FormatError(
            f"{path} is not a readable file of weights: it is damaged, or holds more than plain tensors",
            hint="files that would run code when loaded are refused; convert it to safetensors where it is trusted",
        ) from None
    # What training loops wrap a state dict in.
    for wrapper in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
            break
    named = value.items() if isinstance(value, dict) else ()
    tensors = {str(name): tensor for name, tensor in named if isinstance(tensor, Tensor) and _is_plain(tensor)}
    if not tensors:
        raise FormatError(f"{path} holds no named tensors", hint="expected a state dict")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    # Sparse, quantized and empty ("meta") tensors are rebuilt too, and have no rows to read.
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
