"""bitsandbytes, torchao and optimum-quanto: quantize with the library, dequantize with the library."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import plain
import torch
from torch import nn

SKIPPED = ("lm_head", "classifier", "pooler")


def bitsandbytes(arguments: Namespace, name: str, **options: Any) -> None:
    """Load as transformers does for inference and dequantize before any forward, which would repack NF4."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(llm_int8_skip_modules=list(SKIPPED), **options)
    model = plain.load_model(arguments.model, quantization_config=config, device_map="cpu")
    changed = {type(module).__name__ for module in model.modules()} & {"Linear8bitLt", "Linear4bit"}
    if not changed:
        raise SystemExit(f"error: {name}: bitsandbytes quantized nothing")
    plain.save_tensors(dict(model.dequantize().named_parameters()), arguments.out / f"{name}.safetensors")


def torchao(arguments: Namespace, name: str, *, dtype: torch.dtype) -> None:
    """Weight-only integers: one scale per row for int8, one per 64 weights below."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = plain.load_model(arguments.model)
    int8 = dtype == torch.int8
    config = Int8WeightOnlyConfig() if int8 else IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(64))
    quantize_(model, config, filter_fn=lambda module, path: _is_wanted(module, path))
    _save_dequantized(model, arguments, name)


def quanto(arguments: Namespace, name: str, *, kind: str) -> None:
    """Symmetric integers, one scale per row for int8, one per group below."""
    from optimum import quanto as library

    model = plain.load_model(arguments.model)
    library.quantize(model, weights=getattr(library, kind), exclude=[f"*{part}*" for part in SKIPPED])
    library.freeze(model)
    _save_dequantized(model, arguments, name)


def _is_wanted(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and not any(part in path for part in SKIPPED)


def _save_dequantized(model: nn.Module, arguments: Namespace, name: str) -> None:
    tensors = {}
    for key, parameter in model.named_parameters():
        quantized = type(parameter.data) is not torch.Tensor
        tensors[key] = parameter.data.dequantize() if quantized else parameter.data
    before = dict(plain.load_model(arguments.model).named_parameters())
    if all(torch.equal(tensors[key], before[key]) for key in before):
        raise SystemExit(f"error: {name}: nothing was quantized")
    plain.save_tensors(tensors, arguments.out / f"{name}.safetensors")


KINDS = {
    "bnb_llm_int8": partial(bitsandbytes, load_in_8bit=True),
    "bnb_nf4": partial(
        bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao_int8": partial(torchao, dtype=torch.int8),
    "torchao_int4": partial(torchao, dtype=torch.int4),
    "torchao_int3": partial(torchao, dtype=torch.int3),
    "torchao_int2": partial(torchao, dtype=torch.int2),
    "quanto_int8": partial(quanto, kind="qint8"),
    "quanto_int4": partial(quanto, kind="qint4"),
    "quanto_int2": partial(quanto, kind="qint2"),
}

if __name__ == "__main__":
    plain.run(KINDS, __doc__)
