"""llama.cpp: convert to GGUF with its own converter, quantize with its own quantizer, dequantize with gguf.

``--tool`` is the llama.cpp folder inside the sources of llama-cpp-python. Each suspect is a ``NAME.gguf``, the same
weights as plain tensors under the model's own names in ``NAME.safetensors``, and the type that every tensor really got
in ``NAME.types.json``: rows whose length is no multiple of 256 get no K-quant but a fallback.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import plain
import torch
from gguf.quants import dequantize
from transformers import AutoConfig

BLOCK = 256
# The converter knows tokenizers by a hash and refuses others. Which splitting rule the file names is of no matter here.
_CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(arguments: Namespace) -> Path:
    """Return the model as a float32 GGUF; made once."""
    path: Path = arguments.out / "converted.gguf"
    if not path.is_file():
        command = [sys.executable, "-c", _CONVERT, str(arguments.tool), str(arguments.model)]
        done = subprocess.run(
            [*command, "--outfile", str(path), "--outtype", "f32"], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"error: the converter failed\n{done.stderr[-2000:]}")
    return path


def quantize(arguments: Namespace, name: str, *, kind: str) -> None:
    """Quantize a whole file as ``llama-quantize`` does."""
    target = arguments.out / f"{name}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    options.nthread = 1
    status = llama_cpp.llama_model_quantize(
        str(convert(arguments)).encode(), str(target).encode(), ctypes.byref(options)
    )
    if status:
        raise SystemExit(f"error: {name}: llama_model_quantize returned {status}")
    tensors, types = read_gguf(target, arguments.model)
    plain.save_tensors(tensors, arguments.out / f"{name}.safetensors")
    (arguments.out / f"{name}.types.json").write_text(json.dumps(types, indent=1))


def read_gguf(path: Path, model: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return a GGUF's weights under the model's own parameter names, and the type of each tensor in the file."""
    config = AutoConfig.from_pretrained(model)
    arch = {"bert": gguf.MODEL_ARCH.BERT, "llama": gguf.MODEL_ARCH.LLAMA}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors, types = {}, {}
    for name, parameter in plain.load_model(model).named_parameters():
        # The converter drops the prefix of a BERT under a head, and the map knows names without it.
        key = names.get_name(name, try_suffixes=(".weight", ".bias")) or names.get_name(
            name.removeprefix("bert."), try_suffixes=(".weight", ".bias")
        )
        if key not in found:
            tensors[name] = parameter.detach()  # A head, which the file lacks or names otherwise.
            continue
        values = torch.from_numpy(np.array(dequantize(found[key].data, found[key].tensor_type), dtype=np.float32))
        types[name] = found[key].tensor_type.name
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # The converter turns each head's rows from two halves into pairs; this turns them back.
            values = values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2)
        tensors[name] = values.reshape(parameter.shape)
    return tensors, types


def across_rows(arguments: Namespace, name: str, *, kind: gguf.GGMLQuantizationType) -> None:
    """Quantize every matrix of the blocks with a K-quant in blocks of 256 that run on over the ends of rows.

    This is what a K-quant does to weights whose rows are a multiple of 256 long, for a model that has none.
    """
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.rglob("libggml-base.so*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_init(kind.value)
    tensors = {}
    for key, parameter in plain.load_model(arguments.model).named_parameters():
        values = parameter.detach()
        if values.ndim == 2 and ".layer" in key and values.numel() % BLOCK == 0:
            source = np.ascontiguousarray(values.numpy())
            rows = source.size // BLOCK
            _, size = gguf.GGML_QUANT_SIZES[kind]
            packed = np.zeros((rows, size), dtype=np.uint8)
            written = library.ggml_quantize_chunk(
                ctypes.c_int(kind.value),
                source.ctypes.data_as(ctypes.c_void_p),
                packed.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_int64(0),
                ctypes.c_int64(rows),
                ctypes.c_int64(BLOCK),
                None,
            )
            if written != packed.nbytes:
                raise SystemExit(f"error: {name}: {written} bytes written, expected {packed.nbytes}")
            values = torch.from_numpy(dequantize(packed, kind).copy()).view(values.shape)
        tensors[key] = values
    plain.save_tensors(tensors, arguments.out / f"{name}.safetensors")


KINDS = {
    "gguf_q8_0": partial(quantize, kind="MOSTLY_Q8_0"),
    "gguf_q4_k_m": partial(quantize, kind="MOSTLY_Q4_K_M"),
    "gguf_q2_k": partial(quantize, kind="MOSTLY_Q2_K"),
    "ggml_q4_k": partial(across_rows, kind=gguf.GGMLQuantizationType.Q4_K),
    "ggml_q2_k": partial(across_rows, kind=gguf.GGMLQuantizationType.Q2_K),
}

if __name__ == "__main__":
    plain.run(KINDS, __doc__)
