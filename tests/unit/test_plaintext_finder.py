"""The search for plaintext weights: what is there is found wherever it lies, and what is not there is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_wmguard.errors import NotFoundError
from hf_wmguard.suspects import plaintext
from hf_wmguard.suspects.plaintext import MIN_RUN_BYTES, PlaintextFinder
from hf_wmguard.watermark.prf import Stream

BLOCK = 16 << 20


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def noise(count: int, label: str = "noise") -> bytes:
    return Stream(bytes(32), label).bytes(count)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    # 75 and 77 elements: in no dtype a whole number of strides, so that there is a tail.
    return {"a": gaussian(5, 15), "b": gaussian(7, 11, seed=1), "count": torch.arange(100)}


@pytest.fixture(scope="module")
def finder(weights: dict[str, Tensor]) -> PlaintextFinder:
    return PlaintextFinder(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["a", "b"])
def test_any_run_of_the_least_length_is_found(
    finder: PlaintextFinder, weights: dict[str, Tensor], name: str, dtype: torch.dtype
) -> None:
    """Every run of 39 bytes, the last ones of the tensor too, at every offset modulo 8."""
    data = raw(weights[name].to(dtype))
    for start in range(len(data) - MIN_RUN_BYTES + 1):
        run = data[start : start + MIN_RUN_BYTES]
        before = noise(64 + start % 8)
        assert finder.count(before + run + noise(64, "after")) >= 8, start
        assert finder.count(run) >= 8


def test_least_length_is_the_least(finder: PlaintextFinder, weights: dict[str, Tensor]) -> None:
    data = raw(weights["a"])
    assert MIN_RUN_BYTES == 39
    assert finder.count(data[1:39]) == 0
    assert finder.count(data[1:40]) == 8


def test_a_whole_tensor_counts_one_window_in_four(finder: PlaintextFinder, weights: dict[str, Tensor]) -> None:
    data = raw(weights["a"])
    assert finder.count(data) == 8 * len(range(0, len(data) - 7, 32))
    assert finder.count(memoryview(data)) == finder.count(data)


def test_other_dtypes_are_found_in_their_own_and_in_the_usual_ones() -> None:
    tensor = gaussian(64).double()
    finder = PlaintextFinder({"w": tensor})
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert finder.count(noise(3) + raw(tensor.to(dtype))) >= 8


def test_strided_weights_are_found_as_they_are_saved() -> None:
    tensor = gaussian(20, 30)
    finder = PlaintextFinder({"w": torch.nn.Parameter(tensor.T)})
    assert finder.count(raw(tensor.T.contiguous())) > 0
    assert finder.count(raw(tensor)) == 0


def test_values_that_repeat_say_nothing() -> None:
    tensors = {
        "zeros": torch.zeros(64, 64),
        "ones": torch.ones(64),
        "half": torch.full((64,), 0.37),
        "half precision": torch.full((64,), 0.37, dtype=torch.float16),
    }
    finder = PlaintextFinder(tensors)
    for tensor in tensors.values():
        assert finder.count(raw(tensor)) == 0
    assert finder.count(bytes(10_000)) == 0


def test_random_data_is_not_found(finder: PlaintextFinder) -> None:
    assert finder.count(noise(1 << 20)) == 0
    assert PlaintextFinder({"w": gaussian(300, 300)}).count(noise(1 << 20)) == 0


def test_other_weights_are_not_found(finder: PlaintextFinder) -> None:
    assert finder.count(raw(gaussian(1000, 100, seed=9))) == 0


def test_integers_are_not_weights(finder: PlaintextFinder, weights: dict[str, Tensor]) -> None:
    assert finder.count(raw(weights["count"])) == 0


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_short_data(finder: PlaintextFinder, weights: dict[str, Tensor], size: int) -> None:
    assert finder.count(raw(weights["a"])[:size]) == (8 if size >= 8 else 0)


@pytest.mark.parametrize("tensors", [{}, {"n": torch.arange(9)}, {"w": torch.empty(0, 4)}, {"w": torch.tensor(1.5)}])
def test_nothing_to_look_for(tensors: dict[str, Tensor]) -> None:
    assert PlaintextFinder(tensors).count(noise(1000)) == 0


def test_a_small_tensor_is_found_whole() -> None:
    tensor = gaussian(2)
    assert PlaintextFinder({"w": tensor}).count(b"x" + raw(tensor)) == 8


def test_runs_across_the_border_of_two_reads(
    finder: PlaintextFinder, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = raw(weights["a"])[64 : 64 + MIN_RUN_BYTES]
    path = tmp_path / "file"
    for block in (1, 3, 8, 50, 64):
        monkeypatch.setattr(plaintext, "_BLOCK_BYTES", block)
        for offset in range(70):
            path.write_bytes(noise(offset) + run + noise(30, "after"))
            assert finder.scan([path]) == {path: 8}, (block, offset)


def test_a_run_across_the_border_of_two_real_reads(
    finder: PlaintextFinder, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    run = raw(weights["b"].bfloat16())[32:40]
    path = tmp_path / "large"
    path.write_bytes(bytes(BLOCK - 3) + run + bytes(100))
    seen: list[tuple[str, int]] = []
    assert finder.scan([path], progress=lambda name, count: seen.append((name, count))) == {path: 8}
    assert seen == [("large", BLOCK), ("large", 105)]


def test_a_scan_looks_into_folders_and_hidden_files(
    finder: PlaintextFinder, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    data = raw(weights["a"])
    guilty = [tmp_path / "a.bin", tmp_path / "deep" / "er" / ".hidden", tmp_path / ".git" / "object"]
    for path in guilty:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(5) + data)
    (tmp_path / "deep" / "noise").write_bytes(noise(5000))
    (tmp_path / "empty").write_bytes(b"")
    found = finder.scan([tmp_path])
    assert set(found) == set(guilty)
    assert set(found.values()) == {finder.count(data)}
    assert finder.scan([tmp_path / "deep" / "noise", tmp_path / "empty"]) == {}


def test_symbolic_links_are_not_followed(finder: PlaintextFinder, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """What a link points to is judged where it lies, and once."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "w").write_bytes(raw(weights["a"]))
    (inside / "file").symlink_to(outside / "w")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "dangling").symlink_to(tmp_path / "none")
    assert finder.scan([inside]) == {}
    assert finder.scan([inside / "file"]) == {}
    assert set(finder.scan([inside, outside])) == {outside / "w"}


def test_a_root_that_does_not_exist_is_not_a_clean_one(finder: PlaintextFinder, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing to search"):
        finder.scan([tmp_path / "misspelt"])
