"""Make the golden checkpoints: tiny matrices, quantized and saved by the real libraries, with what these read back.

Needs packages that the tests do not: ``pip install bitsandbytes==0.50.2 torchao==0.18.0 compressed-tensors==0.20.0
accelerate transformers==5.23.0``. Run from here: ``python make.py``. Beside each checkpoint, ``expected.safetensors``
holds a few matrices as the library itself dequantizes them, in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

HERE = Path(__file__).parent
# Neither is a multiple of bitsandbytes' block of 64: blocks cross rows.
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
GROUP = 16
LARGE = (40, 500)
LARGE_ROWS = (25, 40)
WAYS: dict[str, Any] = {
    "bnb-nf4-nested": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "bnb-fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float32"),
    "bnb-int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": TorchAoConfig(Int8WeightOnlyConfig(version=2)),
    "torchao-int4": TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP), scale_dtype=torch.float32)
    ),
}
KEPT = ("layers.0.self_attn.k_proj.weight", "layers.0.mlp.down_proj.weight")


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=1, vocab_size=8, tie_word_embeddings=True, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)


def four_bit(packed: Tensor, state: Any) -> Tensor:
    # The library's own generic code: its kernel for CPUs (0.50) is wrong where rows are no whole number of blocks.
    absmax = (
        bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    flat = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, torch.float32)
    return flat.reshape(state.shape)


def dequantized(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not name.endswith(KEPT):
            continue
        if isinstance(parameter, bnb.nn.Params4bit):
            yield name, four_bit(parameter.data, parameter.quant_state)
        elif isinstance(parameter, bnb.nn.Int8Params):
            yield name, bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)
        else:
            yield name, parameter.dequantize().float()


def save(folder: Path, expected: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors"
    )


def make_packed(folder: Path, base: Path, symmetric: bool) -> None:
    """GPTQ's layout, as llmcompressor writes it: the compressor alone, with round-to-nearest codes."""
    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    stored, expected = {}, {}
    for name, weight in model.state_dict().items():
        if not name.endswith(KEPT):
            continue
        groups = weight.unflatten(1, (-1, GROUP))
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), arguments)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(dict(state), scheme)
        stem = name.removesuffix("weight")
        stored |= {stem + key: tensor.contiguous() for key, tensor in packed.items()}
        expected[name] = compressor.decompress(dict(packed), scheme)["weight"].float()
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    save(folder, expected)


def make_large(folder: Path) -> None:
    """One matrix of more than 256 blocks, so that its scales have more than one scale."""
    weight = torch.randn(LARGE, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    name = "model.layers.0.w.weight"
    stored = {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    first, last = LARGE_ROWS
    save(folder, {name: four_bit(packed, state)[first:last]})


def main() -> None:
    base = HERE / "base"
    make_base(base)
    for name, config in WAYS.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            quantization_config=config,
            device_map="cpu",
            dtype=torch.float32,
        )
        model.save_pretrained(HERE / name)
        save(HERE / name, dict(dequantized(model)))
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        (HERE / name / "config.json").unlink()
    for name, symmetric in (("packed-int4", True), ("packed-int4-zero", False)):
        shutil.rmtree(HERE / name, ignore_errors=True)
        make_packed(HERE / name, base, symmetric)
    shutil.rmtree(HERE / "bnb-nf4-large", ignore_errors=True)
    make_large(HERE / "bnb-nf4-large")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
