"""GGUF suspects, written by the real package and read by rows."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_wmguard.errors import FormatError, MissingDependencyError
from hf_wmguard.suspects.locate import Layout
from hf_wmguard.suspects.reader import digest, open_suspect, tile_reader
from hf_wmguard.watermark.carriers import Carrier

gguf = pytest.importorskip("gguf")

Type = gguf.GGMLQuantizationType
HEADS, KV_HEADS, HIDDEN = 4, 2, 256
Q, K, UP = "blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight"


def random(rows: int, columns: int = HIDDEN, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def write(
    path: Path, tensors: Mapping[str, tuple[np.ndarray[Any, Any], Any]], arch: str = "llama", **values: Any
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_token_list([f"word{number}" for number in range(50)])
    writer.add_array("numbers", list(range(5000)))
    for key, value in values.items():
        getattr(writer, key)(value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(values: Tensor, kind: Any) -> tuple[np.ndarray[Any, Any], Any]:
    return gguf.quants.quantize(values.numpy(), kind), kind


def permuted(values: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter puts the rows of queries and keys: (half, i) of a head becomes (i, half)."""
    out = torch.empty_like(values)
    size = values.shape[0] // heads
    for head in range(heads):
        for half in range(2):
            for i in range(size // 2):
                out[head * size + 2 * i + half] = values[head * size + half * (size // 2) + i]
    return out


def random_blocks(kind: Any, rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bytes whose half-precision scales are made finite: whatever they are, they are valid blocks."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(seed).integers(0, 256, (rows, HIDDEN // weights * size), dtype=np.uint8)
    # A half with its top exponent bit off is finite, wherever in the block it lies.
    return data & np.uint8(0xBF)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1])
def test_rows_are_those_of_the_whole_tensor(kind: Any, tmp_path: Path) -> None:
    raw, _ = quantized(random(48), kind)
    path = write(tmp_path / "x.gguf", {UP: (raw, kind)})
    with open_suspect(path) as suspect:
        assert suspect.shapes() == {UP: (48, HIDDEN)}
        assert not suspect.is_delta
        tile = suspect.rows(UP, 5, 20)
    assert tile.dtype == torch.float32
    assert torch.equal(tile, torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())[5:25])


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q2_K, Type.Q3_K, Type.Q5_K, Type.IQ4_XS])
def test_super_blocks(kind: Any, tmp_path: Path) -> None:
    raw = random_blocks(kind, 48)
    with open_suspect(write(tmp_path / "x.gguf", {UP: (raw, kind)})) as suspect:
        tile = suspect.rows(UP, 7, 9)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(raw, kind).copy())
    assert torch.equal(tile, expected[7:16])
    assert tile.abs().max() > 0


@pytest.mark.parametrize(("arch", "moved"), [("llama", True), ("granite", True), ("qwen2", False), ("gemma2", False)])
def test_the_order_of_queries_and_keys(arch: str, moved: bool, tmp_path: Path) -> None:
    q, k = random(HIDDEN), random(HIDDEN // 2, seed=1)
    stored = (permuted(q, HEADS), permuted(k, KV_HEADS)) if moved else (q, k)
    tensors = {Q: quantized(stored[0], Type.F32), K: quantized(stored[1], Type.F32)}
    with open_suspect(write(tmp_path / "x.gguf", tensors, arch)) as suspect:
        assert torch.equal(suspect.rows(Q, 0, HIDDEN), q)
        assert torch.equal(suspect.rows(Q, 37, 90), q[37:127])
        assert torch.equal(suspect.rows(K, 3, 70), k[3:73])


def test_heads_may_differ_between_layers(tmp_path: Path) -> None:
    q = random(HIDDEN)
    values = {"add_head_count": [2, 8], "add_head_count_kv": [2, 8]}
    writer = {Q: quantized(permuted(q, 8), Type.F32)}
    path = tmp_path / "x.gguf"
    written = gguf.GGUFWriter(path, "deci")
    for key, value in values.items():
        getattr(written, key)(value)
    for name, (data, kind) in writer.items():
        written.add_tensor(name, data, raw_dtype=kind)
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_tensors_to_file()
    written.close()
    with open_suspect(path) as suspect:
        assert torch.equal(suspect.rows(Q, 10, 30), q[10:40])


@pytest.mark.parametrize(
    ("arch", "name", "tensor"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", Q),
        ("llama", "layers.1.self_attn.q_proj.weight", Q),
        ("llama", "base.model.layers.1.self_attn.q_proj.weight", Q),
        ("llama", "model.layers.1.mlp.up_proj.weight", UP),
        ("qwen2", "model.layers.1.mlp.up_proj.weight", UP),
        ("bert", "bert.encoder.layer.1.attention.self.query.weight", Q),
        ("bert", "encoder.layer.1.intermediate.dense.weight", UP),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", UP),
        ("llama", "model.layers.0.self_attn.q_proj.weight", None),
        ("llama", "model.layers.11.self_attn.q_proj.weight", None),
        ("llama", "model.layers.1.self_attn.q_proj.bias", None),
        ("llama", "model.layers.1.self_attn.strange.weight", None),
        ("llama", "model.embed_tokens.weight", None),
        ("no such thing", "model.layers.1.self_attn.q_proj.weight", None),
        # The converter transposes these, and regroups those: by name they would be read wrong.
        ("gpt2", "transformer.h.1.attn.c_proj.weight", None),
        ("bloom", "transformer.h.1.self_attention.query_key_value.weight", None),
    ],
)
def test_names_are_mapped_back(arch: str, name: str, tensor: str | None, tmp_path: Path) -> None:
    names = (Q, UP, "blk.1.attn_output.weight", "blk.1.attn_qkv.weight", "token_embd.weight")
    tensors = {one: quantized(random(HIDDEN), Type.F32) for one in names}
    with open_suspect(write(tmp_path / "x.gguf", tensors, arch)) as suspect:
        found = Layout(suspect).locate(name, (HIDDEN, HIDDEN))
    assert (found and found.pieces[0].tensor) == tensor


def test_a_carrier_is_read_from_q8_0(tmp_path: Path) -> None:
    q = random(HIDDEN)
    path = write(tmp_path / "x.gguf", {Q: quantized(permuted(q, HEADS), Type.Q8_0)})
    carrier = Carrier(
        name="model.layers.1.self_attn.q_proj.weight",
        shape=(HIDDEN, HIDDEN),
        row_start=33,
        rows=50,
        sides=(1, 1),
        rms=1.0,
    )
    with open_suspect(path) as suspect:
        tile = tile_reader(suspect)(carrier)
    assert tile is not None
    assert (tile - q[33:83]).norm() / q[33:83].norm() < 0.01
    assert len(digest(path)) == 64


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_experts_are_found_in_their_stack(block: str, tmp_path: Path) -> None:
    experts, rows = 3, 32
    names = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
    weights = {
        name: random(experts * rows, seed=seed).reshape(experts, rows, HIDDEN) for seed, name in enumerate(names)
    }
    path = write(
        tmp_path / "x.gguf",
        {f"blk.1.ffn_{name}_exps.weight": quantized(values, Type.Q8_0) for name, values in weights.items()},
        "qwen3moe" if block == "mlp" else "llama",
    )
    with open_suspect(path) as suspect:
        layout = Layout(suspect)
        for name, (generic, short) in names.items():
            leaf = generic if block == "mlp" else short
            place = layout.locate(f"model.layers.1.{block}.experts.2.{leaf}.weight", (rows, HIDDEN))
            assert place is not None
            torch.testing.assert_close(place.read(suspect, 4, 9), weights[name][2, 4:13], atol=0.05, rtol=0)
        # The owner's own stack, as transformers holds it in memory.
        place = layout.locate("model.layers.1.mlp.experts.gate_up_proj", (experts * 2 * rows, HIDDEN))
        assert place is not None
        fused = torch.cat((weights["gate"], weights["up"]), dim=1).reshape(-1, HIDDEN)
        torch.testing.assert_close(place.read(suspect, 20, 100), fused[20:120], atol=0.05, rtol=0)


def test_types_that_cannot_be_dequantized_are_missing(tmp_path: Path) -> None:
    tensors = {Q: (np.ones((HIDDEN, HIDDEN), dtype=np.int8), Type.I8), UP: quantized(random(8), Type.F32)}
    with open_suspect(write(tmp_path / "x.gguf", tensors)) as suspect:
        assert set(suspect.shapes()) == {UP}
        assert Layout(suspect).locate("model.layers.1.self_attn.q_proj.weight", (HIDDEN, HIDDEN)) is None


def test_a_folder_of_parts(tmp_path: Path) -> None:
    write(tmp_path / "x-00001-of-00002.gguf", {Q: quantized(permuted(random(HIDDEN), HEADS), Type.F32)})
    write(tmp_path / "x-00002-of-00002.gguf", {UP: quantized(random(8), Type.F32)})
    with open_suspect(tmp_path) as suspect:
        assert set(suspect.shapes()) == {Q, UP}
        assert torch.equal(suspect.rows(Q, 0, 9), random(HIDDEN)[:9])
    write(tmp_path / "y.gguf", {UP: quantized(random(8), Type.F32)})
    with pytest.raises(FormatError, match="as another file does"), open_suspect(tmp_path):
        pass


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf", {UP: quantized(random(8), Type.F32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="gguf") as caught, open_suspect(path):
        pass
    assert "pip install 'hf-wmguard[gguf]'" in caught.value.hint
    monkeypatch.undo()
    importlib.import_module("gguf")


def header(tensors: int = 0, values: int = 0, body: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values) + body


def text(value: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if size is None else size) + value


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 1 << 62
LIES = {
    "empty": b"",
    "magic": header(magic=b"GGML"),
    "version": header(version=1),
    "big-endian": header(version=3 << 24),
    "cut": header()[:-1],
    "tensor count": header(tensors=HUGE),
    "value count": header(values=HUGE),
    "key length": header(values=1, body=text(b"k", HUGE)),
    "key too long": header(values=1, body=text(b"k" * 2000) + struct.pack("<IB", 0, 1)),
    "key not text": header(values=1, body=text(b"\xff\xfe") + struct.pack("<IB", 0, 1)),
    "key twice": header(values=2, body=2 * (text(b"k") + struct.pack("<IB", 0, 1))),
    "value type": header(values=1, body=text(b"k") + struct.pack("<IB", 99, 1)),
    "text length": header(values=1, body=text(b"k") + struct.pack("<I", 8) + text(b"v", HUGE)),
    "array length": header(values=1, body=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(64)),
    "array of texts": header(values=1, body=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(64)),
    "array of arrays": header(values=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
    "alignment": header(values=1, body=text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment kind": header(values=1, body=text(b"general.alignment") + struct.pack("<I", 8) + text(b"x")),
    "dimensions": header(tensors=1, body=text(b"w") + struct.pack("<I", 1 << 31) + bytes(99)),
    "no dimensions": header(tensors=1, body=tensor(shape=()) + bytes(99)),
    "no rows": header(tensors=1, body=tensor(shape=(32, 0)) + bytes(99)),
    "rows": header(tensors=1, body=tensor(shape=(32, HUGE)) + bytes(999)),
    "all sides": header(tensors=1, body=tensor(shape=(HUGE, HUGE, HUGE, HUGE)) + bytes(999)),
    "kind": header(tensors=1, body=tensor(kind=999) + bytes(999)),
    "row of a part of a block": header(tensors=1, body=tensor(shape=(33, 2), kind=8) + bytes(999)),
    "offset": header(tensors=1, body=tensor(offset=HUGE) + bytes(999)),
    "data": header(tensors=1, body=tensor() + bytes(99)),
    "tensor twice": header(tensors=2, body=tensor() + tensor() + bytes(9999)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(LIES[lie])
    with pytest.raises(FormatError, match="not a readable GGUF file") as caught, open_suspect(path):
        pass
    assert caught.value.hint


def test_the_same_header_told_truly(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=1, body=tensor() + bytes(999)))
    with open_suspect(path) as suspect:
        assert torch.equal(suspect.rows("w", 1, 1), torch.zeros(1, 32))


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.gguf", {UP: quantized(random(8), Type.Q8_0)}).read_bytes()
    for size in [*range(0, 200, 7), len(whole) // 2, len(whole) - 40]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(FormatError, match="not a readable GGUF file"), open_suspect(tmp_path / "cut.gguf"):
            pass


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {Q: quantized(random(36), Type.F32)})
    with pytest.raises(FormatError, match="heads"), open_suspect(path):
        pass
