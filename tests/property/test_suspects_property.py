"""Damaged suspects are read or refused by a named error, and nothing else happens."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_wmguard.errors import WmguardError
from hf_wmguard.suspects.locate import Layout
from hf_wmguard.suspects.reader import open_suspect

gguf = pytest.importorskip("gguf")

CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "bnb-nf4-large" / "model.safetensors"
SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def small_gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_head_count(4)
        writer.add_head_count_kv([2, 2])
        writer.add_token_list(["a", "bc"])
        values = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)
        for name, kind in (("attn_q", "Q8_0"), ("attn_k", "F32"), ("ffn_up", "F16"), ("ffn_down", "Q4_0")):
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, raw), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def small_adapter() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        save_file({name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}, path)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"k_proj": 3}, "bias": "none"}
        return path.read_bytes(), json.dumps(config).encode()


GGUF = small_gguf()
HEADER_BYTES = len(GGUF) - 32 * 64 * 4
ADAPTER, CONFIG = small_adapter()
QUANTIZED = CHECKPOINT.read_bytes()


def damaged(data: bytes, head: int) -> st.SearchStrategy[bytes]:
    """Some bytes of the head changed, or the end cut off, or both."""

    def apply(changes: list[tuple[int, int]], size: int) -> bytes:
        out = bytearray(data)
        for place, value in changes:
            out[place] = value
        return bytes(out[:size])

    change = st.tuples(st.integers(0, min(head, len(data)) - 1), st.integers(0, 255))
    size = st.one_of(st.just(len(data)), st.integers(0, len(data)))
    return st.builds(apply, st.lists(change, max_size=4), size)


def read_all(path: Path) -> None:
    with suppress(WmguardError), open_suspect(path) as suspect:
        layout = Layout(suspect)
        for name, shape in suspect.shapes().items():
            if len(shape) == 2 and 0 < shape[0] < 1 << 16:
                suspect.rows(name, shape[0] // 2, 1)
                layout.locate(name, (shape[0], shape[1]))
        layout.locate("model.layers.0.self_attn.q_proj.weight", (32, 64))
        layout.locations((32, 64))


@SETTINGS
@given(damaged(GGUF, HEADER_BYTES))
def test_gguf(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(data)
        read_all(path)


@SETTINGS
@given(damaged(ADAPTER, len(ADAPTER)), damaged(CONFIG, len(CONFIG)))
def test_adapters(data: bytes, config: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_model.safetensors").write_bytes(data)
        (Path(folder) / "adapter_config.json").write_bytes(config)
        read_all(Path(folder))


@SETTINGS
@given(damaged(QUANTIZED, len(QUANTIZED)))
def test_quantized_checkpoints(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        read_all(path)
