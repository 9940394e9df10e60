"""llmcompressor: GPTQ, 4-bit weights in groups of 64, calibrated on text; plain tensors out."""

from __future__ import annotations

import json
from argparse import Namespace

import plain
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoTokenizer

GROUP = 64
"""The usual 128 does not divide a width of 320."""


def gptq_w4(arguments: Namespace, name: str) -> None:
    """Quantize in place and write the rounded weights, which GPTQ leaves in the model in floating point."""
    model = plain.load_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = json.loads(arguments.texts.read_text())
    rows = [dict(tokenizer(text, truncation=True, max_length=128)) for text in texts]
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head", "classifier", "re:.*pooler.*"],
    )
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=128,
        pipeline="basic",
    )
    names = set(dict(plain.load_model(arguments.model).named_parameters()))
    tensors = {key: value for key, value in model.state_dict().items() if key in names}
    _require_rounded(model)
    plain.save_tensors(tensors, arguments.out / f"{name}.safetensors")


def _require_rounded(model: torch.nn.Module) -> None:
    """Stop if a quantized layer holds more than 16 levels in some group of a row."""
    layers = [module for module in model.modules() if hasattr(module, "weight_scale")]
    if not layers:
        raise SystemExit("error: gptq quantized nothing")
    for layer in layers:
        row = layer.weight.detach()[0].view(-1, GROUP)
        if max(len(group.unique()) for group in row) > 16:
            raise SystemExit("error: gptq left weights that are not rounded")


if __name__ == "__main__":
    plain.run({"gptq_w4": gptq_w4}, __doc__)
