"""Reading a suspect: every way weights are stored, by rows, and nothing of it executed."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_wmguard.errors import FormatError, NotFoundError
from hf_wmguard.suspects.locate import Layout
from hf_wmguard.suspects.reader import digest, open_suspect, tile_reader, weight_files
from hf_wmguard.watermark.carriers import Carrier

SHAPE = (6, 4)


def example() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "layers.0.w": torch.randn(SHAPE, generator=draw),
        "layers.1.w": torch.randn(SHAPE, generator=draw),
        "layers.1.b": torch.randn(6, generator=draw),
    }


def carrier(name: str = "layers.1.w", shape: tuple[int, int] = SHAPE, start: int = 0, rows: int = 6) -> Carrier:
    return Carrier(name=name, shape=shape, row_start=start, rows=rows, sides=(1, 1), rms=1.0)


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_single(folder: Path) -> Path:
    save_file(example(), folder / "model.safetensors")
    return folder


def save_file_alone(folder: Path) -> Path:
    save_file(example(), folder / "any name.safetensors")
    return folder / "any name.safetensors"


def save_sharded(folder: Path) -> Path:
    tensors = example()
    for index, names in enumerate((["layers.0.w"], ["layers.1.w", "layers.1.b"]), start=1):
        save_file({name: tensors[name] for name in names}, folder / f"model-{index:05d}-of-00002.safetensors")
    write_index(folder, {name: f"model-0000{1 if '0' in name else 2}-of-00002.safetensors" for name in tensors})
    return folder


def save_adapter(folder: Path) -> Path:
    save_file(example(), folder / "adapter_model.safetensors")
    return folder


def save_bin(folder: Path) -> Path:
    torch.save(example(), folder / "pytorch_model.bin")
    return folder


def save_sharded_bin(folder: Path) -> Path:
    for index, (name, tensor) in enumerate(example().items()):
        torch.save({name: tensor}, folder / f"part{index}.bin")
    write_index(
        folder, {name: f"part{index}.bin" for index, name in enumerate(example())}, "pytorch_model.bin.index.json"
    )
    return folder


def save_checkpoint(folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": OrderedDict(example()), "optimizer": {}}, folder / "last.pt")
    return folder / "last.pt"


def save_legacy(folder: Path) -> Path:
    """The format before torch 1.6, in which much of the Hub still is."""
    torch.save(example(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def save_pth(folder: Path) -> Path:
    torch.save({**example(), "step": 3}, folder / "model.pth")
    return folder / "model.pth"


WAYS = [
    save_single,
    save_file_alone,
    save_sharded,
    save_adapter,
    save_bin,
    save_sharded_bin,
    save_checkpoint,
    save_legacy,
    save_pth,
]


@pytest.mark.parametrize("save", WAYS)
def test_every_way_of_storing_weights(save: Any, tmp_path: Path) -> None:
    expected = example()
    with open_suspect(save(tmp_path)) as suspect:
        assert dict(suspect.shapes()) == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        assert torch.equal(suspect.rows("layers.1.w", 0, 6), expected["layers.1.w"])
        assert torch.equal(suspect.rows("layers.0.w", 2, 3), expected["layers.0.w"][2:5])
        tile = tile_reader(suspect)(carrier(start=4, rows=2))
        assert tile is not None
        assert torch.equal(tile, expected["layers.1.w"][4:])


def test_paths_may_be_text(tmp_path: Path) -> None:
    with open_suspect(str(save_single(tmp_path))) as suspect:
        assert "layers.0.w" in suspect.shapes()


def test_state_dicts_and_models_in_memory() -> None:
    expected = example()
    with open_suspect(expected) as suspect:
        assert torch.equal(suspect.rows("layers.0.w", 1, 2), expected["layers.0.w"][1:3])
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    with open_suspect(model) as suspect:
        assert suspect.shapes()["0.weight"] == SHAPE
        assert torch.equal(suspect.rows("0.weight", 0, 6), model[0].weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_low_precision_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = example()["layers.1.w"].to(dtype)
    save_file({"layers.1.w": tensor}, tmp_path / "model.safetensors")
    with open_suspect(tmp_path) as suspect:
        tile = tile_reader(suspect)(carrier(start=1, rows=3))
    assert tile is not None
    assert tile.dtype == dtype
    assert torch.equal(tile.float(), tensor[1:4].float())


def test_what_cannot_be_a_carrier_is_missing() -> None:
    tensors = {"layers.1.w": torch.ones(SHAPE, dtype=torch.int8), "layers.2.w": torch.ones(4, 6)}
    with open_suspect(tensors) as suspect:
        tile_of = tile_reader(suspect)
        assert tile_of(carrier()) is None  # packed integers are not the weights
        assert tile_of(carrier("layers.2.w", (6, 5))) is None  # another shape
        assert tile_of(carrier("layers.3.w")) is None


def place_of(shapes: dict[str, tuple[int, ...]]) -> str | None:
    with open_suspect({name: torch.empty(shape) for name, shape in shapes.items()}) as suspect:
        location = Layout(suspect).locate("layers.1.w", SHAPE)
    return location and location.pieces[0].tensor


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["layers.1.w"], "layers.1.w"),
        (["model.layers.1.w"], "model.layers.1.w"),
        (["base.model.layers.1.w", "model.layers.0.w"], "base.model.layers.1.w"),
        (["1.w"], "1.w"),
        (["a.layers.1.w", "b.layers.1.w"], None),
        (["model.layers.1.w", "1.w"], None),
        # The name itself stands above all that end in it.
        (["a.layers.1.w", "layers.1.w", "b.layers.1.w"], "layers.1.w"),
        # A suffix is whole parts of a name: "xlayers" is another layer, and so is layer 11.
        (["xlayers.1.w"], None),
        (["layers.11.w"], None),
        (["ers.1.w"], None),
        (["layers.1.w.extra"], None),
        (["layers.1.W"], None),
        ([], None),
        ([""], None),
    ],
)
def test_a_name_is_found_with_or_without_its_prefix(names: list[str], found: str | None) -> None:
    assert place_of(dict.fromkeys(names, SHAPE)) == found


def test_the_shape_decides_between_names() -> None:
    shapes: dict[str, tuple[int, ...]] = {"layers.1.w": (6, 5), "a.layers.1.w": SHAPE, "b.layers.1.w": (4, 6)}
    assert place_of(shapes) == "a.layers.1.w"


def test_a_renamed_suspect_is_read(tmp_path: Path) -> None:
    save_file({f"model.{name}": tensor for name, tensor in example().items()}, tmp_path / "model.safetensors")
    with open_suspect(tmp_path) as suspect:
        tile = tile_reader(suspect)(carrier())
    assert tile is not None
    assert torch.equal(tile, example()["layers.1.w"])


def test_files_of_a_folder(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert weight_files(tmp_path) == tuple(shards)
    # The index stands above a single file beside it: that is what transformers would load.
    save_single(tmp_path)
    assert weight_files(tmp_path) == tuple(shards)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert weight_files(tmp_path) == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(save_file, ".safetensors"), (torch.save, ".bin")],
)
def test_a_folder_of_other_names(write: Any, suffix: str, tmp_path: Path) -> None:
    tensors = example()
    torch.save({"learning_rate": 1}, tmp_path / "training_args.bin")
    for number, names in enumerate((["layers.0.w"], ["layers.1.w", "layers.1.b"])):
        write({name: tensors[name] for name in names}, tmp_path / f"part{number}{suffix}")
    assert weight_files(tmp_path) == (tmp_path / f"part0{suffix}", tmp_path / f"part1{suffix}")
    with open_suspect(tmp_path) as suspect:
        assert torch.equal(suspect.rows("layers.1.w", 2, 3), tensors["layers.1.w"][2:5])
        assert set(suspect.shapes()) == set(tensors)
    write({"layers.0.w": tensors["layers.0.w"]}, tmp_path / f"part2{suffix}")
    with pytest.raises(FormatError, match=r"holds 'layers\.0\.w', as another file does"), open_suspect(tmp_path):
        pass
    with open_suspect(tmp_path / f"part2{suffix}") as suspect:
        assert set(suspect.shapes()) == {"layers.0.w"}


def lying_header(fields: Any, data: bytes = bytes(96)) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        lying_header({"w": {"dtype": "F32", "shape": [6, 5], "data_offsets": [0, 96]}}),
        lying_header({"w": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 1 << 40]}}),
        lying_header({"w": {"dtype": "F32", "shape": [6, 4], "data_offsets": [48, 0]}}),
        lying_header({"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 96]}}),
        lying_header({"w": {"dtype": "what", "shape": [6, 4], "data_offsets": [0, 96]}}),
        lying_header({"w": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]}}, bytes(95)),
        lying_header([]),
        (1 << 60).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_safetensors_header_that_lies(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="not a readable safetensors file"), open_suspect(tmp_path):
        pass


def test_tensors_without_rows_to_read_are_left_out(tmp_path: Path) -> None:
    odd = {"layers.0.w": torch.ones(6, 4).to_sparse(), "layers.2.w": torch.empty(6, 4, device="meta")}
    torch.save({**example(), **odd, "layers.0.w": odd["layers.0.w"]}, tmp_path / "x.pt")
    with open_suspect(tmp_path / "x.pt") as suspect:
        assert set(suspect.shapes()) == {"layers.1.w", "layers.1.b"}


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "[" * 100_000, '{"model_type": ["x"]}'])
def test_a_config_that_cannot_be_read_is_not_needed(text: str, tmp_path: Path) -> None:
    (save_single(tmp_path) / "config.json").write_text(text)
    with open_suspect(tmp_path) as suspect:
        assert tile_reader(suspect)(carrier()) is not None


@pytest.mark.parametrize(
    "weight_map",
    [
        {"w": "../outside.safetensors"},
        {"w": "/outside.safetensors"},
        {"w": "sub/inside.safetensors"},
        {"w": "inside.safetensors", "v": "../outside.safetensors"},
        {"w": 5},
        {"w": None},
        {"w": ["inside.safetensors"]},
        {"w": {"file": "inside.safetensors"}},
        {},
        [],
        "inside.safetensors",
        None,
    ],
)
def test_an_index_names_files_of_its_own_folder(weight_map: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for path in (
        tmp_path / "outside.safetensors",
        folder / "inside.safetensors",
        folder / "sub" / "inside.safetensors",
    ):
        save_file(example(), path)
    write_index(folder, weight_map)
    with pytest.raises(FormatError, match="index"):
        weight_files(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"{}", b"5", b"null", b"\xff\xfe", b'{"weight_map": {"w": "a"}'])
def test_an_index_that_cannot_be_read(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(FormatError, match="index"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_single(tmp_path)
    write_index(tmp_path, {"v": "model.safetensors", "w": "gone.safetensors"})
    with pytest.raises(NotFoundError, match=r"lacks gone\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_folder_is_no_shard(name: str, tmp_path: Path) -> None:
    save_single(tmp_path)
    write_index(tmp_path, {"v": "model.safetensors", "w": name})
    with pytest.raises((FormatError, NotFoundError)):
        weight_files(tmp_path)


def test_folders_and_files_that_are_no_suspect(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no suspect"):
        weight_files(tmp_path / "none")
    with pytest.raises(NotFoundError, match="no weights") as caught:
        weight_files(tmp_path)
    assert "save_model" in caught.value.hint
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(FormatError, match="unknown kind"):
        weight_files(tmp_path / "model.onnx")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "model.safetensors")
        with pytest.raises(NotFoundError):
            weight_files(tmp_path / "model.safetensors")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 100, b"not a tensor file"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pt"])
def test_damaged_files(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError) as caught, open_suspect(tmp_path / name):
        pass
    assert caught.value.hint


@pytest.mark.parametrize("save", [save_file_alone, save_checkpoint])
def test_cut_files(save: Any, tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError), open_suspect(path):
        pass


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth"])
def test_a_pickle_that_runs_code_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2), "bomb": Bomb(tmp_path / "exploded")}, tmp_path / name)
    with pytest.raises(FormatError, match="not a readable file of weights") as caught, open_suspect(tmp_path / name):
        pass
    assert "would run code" in caught.value.hint
    # torch's own message goes on to advise loading it with its code.
    assert "weights_only" not in str(caught.value)
    assert "Re-running" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "value", [{}, {"step": 3}, [torch.ones(2)], torch.ones(2), 5, {"state_dict": {}}, {"state_dict": 5}]
)
def test_a_pickle_without_named_tensors(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="no named tensors"), open_suspect(tmp_path / "x.pt"):
        pass


def test_the_digest_is_over_names_and_contents(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    text = ""
    for index in (1, 2):
        name = f"model-0000{index}-of-00002.safetensors"
        text += f"{name}\0{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n"
    before = digest(tmp_path)
    assert before == hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "README.md").write_text("not a weight")
    assert digest(tmp_path) == before
    with (tmp_path / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert digest(tmp_path) != before
    assert digest(save_file_alone(tmp_path)) != before
