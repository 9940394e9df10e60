"""For any files: parts of a protected file in another place, twice, or in another file are never accepted."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_wmguard.container.files import FileContext, ProtectedFile, TensorData, write_protected
from hf_wmguard.container.stream import TAG_BYTES
from hf_wmguard.container.suites import SUITES
from hf_wmguard.errors import AuthenticationError, FormatError, ManifestError

DEK = bytes(range(32))
CHUNK_BYTES = 32
STEP = CHUNK_BYTES + TAG_BYTES
SIZES = st.lists(st.integers(0, 150), min_size=1, max_size=4)
SUITE = st.sampled_from(list(SUITES))
REFUSED = (AuthenticationError, FormatError, ManifestError)


def context(index: int = 1, set_id: str = "s") -> FileContext:
    return FileContext(model_id="m", iteration="1", set_id=set_id, index=index, total=2)


def written(sizes: list[int], fill: int, **options: Any) -> bytes:
    tensors = {
        f"t{index}": TensorData(dtype="U8", shape=(size,), data=bytes([fill + index]) * size)
        for index, size in enumerate(sizes)
    }
    settings_: dict[str, Any] = {"context": context(), "chunk_bytes": CHUNK_BYTES, "threads": 1} | options
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        write_protected(path, tensors, dek=DEK, **settings_)
        return path.read_bytes()


def read(data: bytes) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        path.write_bytes(data)
        with ProtectedFile(path, dek=DEK, context=context()) as file:
            return {name: bytes(view) for name, view in file.read_all(threads=1).items()}


def cut_of(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def refused(data: bytes) -> None:
    with pytest.raises(REFUSED):
        read(data)


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, suite=SUITE, hidden=st.booleans(), threads=st.integers(1, 4), fill=st.integers(1, 200))
def test_any_way_of_writing_reads_the_same(sizes: list[int], suite: str, hidden: bool, threads: int, fill: int) -> None:
    data = written(sizes, fill, suite=suite, hide_names=hidden, threads=threads)
    assert read(data) == {f"t{index}": bytes([fill + index]) * size for index, size in enumerate(sizes)}


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, suite=SUITE, hidden=st.booleans())
def test_a_file_cut_at_any_chunk_border_is_refused(sizes: list[int], suite: str, hidden: bool) -> None:
    data = written(sizes, 1, suite=suite, hide_names=hidden)
    for border in range(cut_of(data), len(data), 16 if hidden is False else STEP):
        refused(data[:border])


@settings(deadline=None, max_examples=150)
@given(sizes=SIZES, suite=SUITE, hidden=st.booleans(), data=st.data())
def test_blocks_that_moved_are_refused(sizes: list[int], suite: str, hidden: bool, data: st.DataObject) -> None:
    """Swapped or repeated: whole chunks, tags, or any other block of any size."""
    file = written(sizes, 1, suite=suite, hide_names=hidden)
    cut = cut_of(file)
    size = data.draw(st.sampled_from([STEP, TAG_BYTES, CHUNK_BYTES, 1]))
    if len(file) - cut < 2 * size:
        return
    places = st.integers(0, len(file) - size - cut).map(lambda at: cut + at)
    one, two = data.draw(places), data.draw(places)
    changed = bytearray(file)
    changed[two : two + size] = file[one : one + size]
    if data.draw(st.booleans()) and abs(one - two) >= size:
        changed[one : one + size] = file[two : two + size]
    if changed != file:
        refused(bytes(changed))


@settings(deadline=None, max_examples=100)
@given(
    sizes=SIZES,
    suite=SUITE,
    hidden=st.booleans(),
    index=st.integers(1, 2),
    set_id=st.sampled_from(["s", "older"]),
    what=st.sampled_from(["file", "header", "data", "chunk"]),
)
def test_parts_of_another_file_are_refused(
    sizes: list[int], suite: str, hidden: bool, index: int, set_id: str, what: str
) -> None:
    """Another shard, a shard of an older save, or the same shard written again: whole, or a part of it in this one."""
    file = written(sizes, 1, suite=suite, hide_names=hidden)
    other = written(sizes, 101, suite=suite, hide_names=hidden, context=context(index, set_id))
    cut, theirs = cut_of(file), cut_of(other)
    if what == "file":
        if (index, set_id) != (1, "s"):
            refused(other)
    elif what == "header":
        refused(other[:theirs] + file[cut:])
    elif what == "data":
        refused(file[:cut] + other[theirs:])
    else:
        refused(file[:cut] + other[theirs : theirs + STEP] + file[cut + STEP :])


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_container.py"
    spec = importlib.util.spec_from_file_location("fuzz_container", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_container"] = module
    spec.loader.exec_module(module)
    return module


def test_some_executions_of_the_fuzzer(fuzzer: Any) -> None:
    result = fuzzer.fuzz(1500, 3)
    assert result["wrong"] == []
    assert {"FormatError", "AuthenticationError", "ManifestError"} <= result["outcomes"].keys()


def test_the_fuzzer_sees_what_is_wrong(fuzzer: Any, tmp_path: Path) -> None:
    file = written([100], 1)
    (tmp_path / "f").write_bytes(file)
    sample = fuzzer.Sample(b"other", context(), {"t0": b"else"}, cut_of(file))
    assert fuzzer.judge(tmp_path / "f", sample, file, 1) == "wrong: accepted with other contents"
    right = fuzzer.Sample(b"other", context(), {"t0": bytes([1]) * 100}, cut_of(file))
    assert fuzzer.judge(tmp_path / "f", right, file, 1) == "wrong: a change was not seen"

    class Broken:
        context = "no context"

    assert fuzzer.judge(tmp_path / "f", Broken(), file, 1).startswith("wrong: ")
