"""Checkpoints of the real quantization libraries (see data/checkpoints/make.py) read as they dequantize them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_wmguard.errors import FormatError
from hf_wmguard.suspects.reader import open_suspect, tile_reader
from hf_wmguard.watermark.carriers import Carrier

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
MODELS = ["bnb-fp4", "bnb-int8", "bnb-nf4-nested", "packed-int4", "packed-int4-zero", "torchao-int4", "torchao-int8"]
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("name", MODELS)
def test_the_values_are_those_the_library_gives(name: str) -> None:
    expected = load_file(CHECKPOINTS / name / "expected.safetensors")
    assert len(expected) == 2
    with open_suspect(CHECKPOINTS / name / "model.safetensors") as suspect:
        for matrix, values in expected.items():
            rows = values.shape[0]
            assert suspect.shapes()[matrix] == tuple(values.shape)
            for start, count in [(0, rows), (0, 1), (rows - 1, 1), (3, 7), (1, rows - 1)]:
                tile = suspect.rows(matrix, start, count)
                assert tile.dtype == torch.float32
                torch.testing.assert_close(tile, values[start : start + count], rtol=1e-6, atol=1e-8)


def test_scales_of_scales_are_found_across_their_blocks() -> None:
    folder = CHECKPOINTS / "bnb-nf4-large"
    (name, expected), *_ = load_file(folder / "expected.safetensors").items()
    with open_suspect(folder / "model.safetensors") as suspect:
        assert suspect.shapes() == {name: (40, 500)}
        assert torch.equal(suspect.rows(name, 25, 15), expected)
        assert torch.equal(suspect.rows(name, 32, 3), expected[7:10])
        # Beyond the first 256 blocks.
        assert torch.equal(suspect.rows(name, 36, 3), expected[11:14])


def test_rows_may_begin_within_a_byte(tmp_path: Path) -> None:
    name = "model.layers.0.w.weight"
    described = f"{name}.quant_state.bitsandbytes__nf4"

    def change(tensors: dict[str, Tensor]) -> None:
        fields = json.loads(bytes(tensors[described].tolist())) | {"shape": [160, 125]}
        tensors[described] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    path = damage(CHECKPOINTS / "bnb-nf4-large", change, tmp_path)
    expected = load_file(CHECKPOINTS / "bnb-nf4-large" / "expected.safetensors")[name].reshape(60, 125)
    with open_suspect(path) as suspect:
        for start, count in [(101, 3), (102, 1), (159, 1)]:
            assert torch.equal(suspect.rows(name, start, count), expected[start - 100 :][:count])


def test_only_the_tile_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_wmguard.suspects.sources import Safetensors

    read: list[int] = []
    whole = Safetensors.rows

    def counted(self: Safetensors, name: str, start: int, count: int) -> Tensor:
        tile = whole(self, name, start, count)
        read.append(tile.numel() * tile.element_size())
        return tile

    with open_suspect(CHECKPOINTS / "bnb-nf4-large" / "model.safetensors") as suspect:
        monkeypatch.setattr(Safetensors, "rows", counted)
        suspect.rows("model.layers.0.w.weight", 10, 2)
    # 1,000 weights of half a byte, 17 scales, one or two scales of these, and two tables.
    assert sum(read) < 500 + 20 + 8 + 4 * (16 + 256) + 8


def test_parts_are_no_matrices_of_their_own() -> None:
    for name in MODELS:
        with open_suspect(CHECKPOINTS / name / "model.safetensors") as suspect:
            shapes = suspect.shapes()
        ends = ("absmax", "quant_map", "SCB", "qdata", "_scale", "_packed", "weight_format", "_zero_point", "_shape")
        assert not [one for one in shapes if one.endswith(ends) or "quant_state" in one]
        assert shapes[DOWN] == (32, 48)


def test_integers_without_quantization_data_are_no_weights(tmp_path: Path) -> None:
    tensors = {"layers.0.w.weight": torch.ones(6, 4, dtype=torch.int8), "layers.0.w.scales": torch.ones(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_suspect(tmp_path) as suspect:
        carrier = Carrier(name="layers.0.w.weight", shape=(6, 4), row_start=0, rows=6, sides=(1, 1), rms=1.0)
        assert tile_reader(suspect)(carrier) is None


def test_an_unknown_packing_is_left_as_it_is(tmp_path: Path) -> None:
    """Three bits, which versions pack differently, and a torchao type of another layout."""
    stem, other = "layers.0.w.weight", "layers.1.w"
    tensors = {
        f"{stem}_packed": torch.zeros(8, 3, dtype=torch.int32),
        f"{stem}_scale": torch.ones(8, 1),
        f"{stem}_shape": torch.tensor([8, 32]),
        f"{other}._weight_qdata": torch.zeros(8, 8, dtype=torch.int8),
        f"{other}._weight_scale": torch.ones(8, 8),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={f"{other}.weight": '{"_type": "Int4Tensor"}'})
    with open_suspect(tmp_path / "x.safetensors") as suspect:
        assert set(suspect.shapes()) == set(tensors)


def damage(folder: Path, change: Any, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    return path


def state(**changes: Any) -> Any:
    name = f"{DOWN}.quant_state.bitsandbytes__nf4"

    def change(tensors: dict[str, Tensor]) -> None:
        fields = json.loads(bytes(tensors[name].tolist()))
        tensors[name] = torch.tensor(list(json.dumps(fields | changes).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    "change",
    [
        state(shape=[1 << 40, 1 << 40]),
        state(shape=[32]),
        state(shape=None),
        state(shape=["a", "b"]),
        state(shape=[-32, -48]),
        state(shape=[32, 49]),
        state(blocksize=0),
        state(blocksize=64.0),
        state(blocksize=32),
        state(nested_blocksize=-1),
        state(nested_blocksize=1),
        state(nested_offset="x"),
        lambda tensors: tensors.pop(f"{DOWN}.absmax"),
        lambda tensors: tensors.update({f"{DOWN}.quant_map": torch.zeros(15)}),
        lambda tensors: tensors.update({DOWN: torch.zeros(10, 10, dtype=torch.uint8)}),
        lambda tensors: tensors.update({f"{DOWN}.quant_state.bitsandbytes__nf4": torch.zeros(5, dtype=torch.uint8)}),
        lambda tensors: tensors.update({f"{DOWN}.quant_state.bitsandbytes__nf4": torch.zeros(5, 5)}),
        # What is read last: codes of a scale that reach beyond the table.
        lambda tensors: tensors.update({f"{DOWN}.absmax": torch.full((24,), 999, dtype=torch.int16)}),
    ],
)
def test_quantization_data_that_lies(change: Any, tmp_path: Path) -> None:
    path = damage(CHECKPOINTS / "bnb-nf4-nested", change, tmp_path)
    with pytest.raises(FormatError, match="quantization data") as caught, open_suspect(path) as suspect:
        suspect.rows(DOWN, 0, 32)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("packed-int4-zero", f"{DOWN}_scale", torch.ones(32, 5)),
        ("packed-int4-zero", f"{DOWN}_zero_point", torch.ones(3, 3, dtype=torch.int32)),
        ("packed-int4", f"{DOWN}_packed", torch.ones(32, 6)),
        ("packed-int4", f"{DOWN}_g_idx", torch.full((48,), 7, dtype=torch.int32)),
        ("torchao-int4", "model.layers.0.mlp.down_proj._weight_scale", torch.ones(32, 5)),
        ("torchao-int8", "model.layers.0.mlp.down_proj._weight_qdata", torch.ones(32, 48)),
        ("bnb-int8", DOWN, torch.ones(32, 48)),
    ],
)
def test_other_quantization_data_that_lies(name: str, part: str, value: Tensor, tmp_path: Path) -> None:
    path = damage(CHECKPOINTS / name, lambda tensors: tensors.update({part: value}), tmp_path)
    with pytest.raises(FormatError, match="quantization data"), open_suspect(path) as suspect:
        suspect.rows(DOWN, 0, 32)


def test_a_column_order_is_followed(tmp_path: Path) -> None:
    """GPTQ with act-order: ``weight_g_idx`` says which group a column belongs to."""
    order = torch.arange(48, dtype=torch.int32) % 3

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}_g_idx"] = order

    path = damage(CHECKPOINTS / "packed-int4", change, tmp_path)
    plain = CHECKPOINTS / "packed-int4" / "model.safetensors"
    scales = load_file(plain)[f"{DOWN}_scale"]
    with open_suspect(plain) as suspect:
        codes = suspect.rows(DOWN, 0, 32) / scales.repeat_interleave(16, dim=1)
    with open_suspect(path) as suspect:
        torch.testing.assert_close(suspect.rows(DOWN, 5, 9), (codes * scales[:, order.long()])[5:14])


def test_a_state_dict_in_memory_is_dequantized_too(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINTS / "bnb-int8" / "model.safetensors", tmp_path / "x.safetensors")
    with open_suspect(load_file(tmp_path / "x.safetensors")) as suspect, open_suspect(tmp_path) as same:
        assert torch.equal(suspect.rows(DOWN, 2, 5), same.rows(DOWN, 2, 5))
