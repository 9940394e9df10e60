"""Protected files: what comes back, what other tools see, and that nothing changed is ever accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.files import (
    FileContext,
    FileRecord,
    ProtectedFile,
    TensorData,
    inspect_file,
    is_protected,
    write_protected,
)
from hf_wmguard.container.format import MAX_HEADER_BYTES, Header, parse_header
from hf_wmguard.container.inner import DTYPE_BITS
from hf_wmguard.container.stream import TAG_BYTES, blob_bytes, plaintext_bytes
from hf_wmguard.errors import (
    AuthenticationError,
    FormatError,
    KeyFormatError,
    ManifestError,
    NotFoundError,
    UsageError,
    WmguardError,
)

DEK = bytes(range(32))
CONTEXT = FileContext(model_id="acme/triage", iteration="3", set_id="5e7", index=1, total=2)
CHUNK_BYTES = 64


def noise(seed: str, size_bytes: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size_bytes)


def u8(data: bytes) -> TensorData:
    return TensorData(dtype="U8", shape=(len(data),), data=data)


TENSORS = {
    "layer.weight": TensorData(dtype="BF16", shape=(7, 20), data=noise("weight", 280)),
    "layer.bias": TensorData(dtype="F32", shape=(7,), data=noise("bias", 28)),
    "empty": TensorData(dtype="F16", shape=(0, 4), data=b""),
    "scalar": TensorData(dtype="I64", shape=(), data=noise("scalar", 8)),
    "größe": u8(noise("name", 3 * CHUNK_BYTES)),
}


def write(path: Path, tensors: Mapping[str, TensorData] = TENSORS, **options: Any) -> FileRecord:
    settings = {"dek": DEK, "context": CONTEXT, "chunk_bytes": CHUNK_BYTES} | options
    return write_protected(path, tensors, **settings)


def read_all(path: Path, dek: bytes = DEK, context: FileContext | None = CONTEXT) -> dict[str, bytes]:
    with ProtectedFile(path, dek=dek, context=context) as file:
        return {name: bytes(file.read(name)) for name in file.names()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write(path, metadata={"format": "pt"})
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# What comes back


def test_round_trip(path: Path) -> None:
    with ProtectedFile(path, dek=DEK, context=CONTEXT) as file:
        assert file.names() == sorted(TENSORS)
        assert file.metadata == {"format": "pt"}
        assert (file.name, file.context) == (path.name, CONTEXT)
        for name, tensor in TENSORS.items():
            assert file.info(name) == tensor.info()
            assert file.read(name) == tensor.data


WHOLE_BYTES = [
    (dtype, shape)
    for dtype, bits in DTYPE_BITS.items()
    for shape in ((), (8,), (2, 4, 3), (0,), (3, 0, 5))
    if math.prod(shape) * bits % 8 == 0
]


@pytest.mark.parametrize(("dtype", "shape"), WHOLE_BYTES)
def test_every_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    data = noise(dtype, math.prod(shape) * DTYPE_BITS[dtype] // 8)
    tensor = TensorData(dtype=dtype, shape=shape, data=data)
    write(tmp_path / "f", {"t": tensor})
    with ProtectedFile(tmp_path / "f", dek=DEK) as file:
        assert file.info("t") == tensor.info()
        assert file.read("t") == tensor.data


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 64 * 5 - 1, 64 * 5, 64 * 5 + 1])
def test_sizes_around_chunk_borders(tmp_path: Path, size: int) -> None:
    write(tmp_path / "f", {"a": u8(noise("a", size)), "b": u8(noise("b", size))})
    assert read_all(tmp_path / "f") == {"a": noise("a", size), "b": noise("b", size)}


@pytest.mark.parametrize("chunk_bytes", [16, 17, 64])
def test_only_one_plaintext_size_has_a_blob_size(chunk_bytes: int) -> None:
    sizes = {blob_bytes(size, chunk_bytes): size for size in range(300)}
    assert len(sizes) == 300
    for blob in range(max(sizes)):
        assert plaintext_bytes(blob, chunk_bytes) == sizes.get(blob)


def test_default_chunks(tmp_path: Path) -> None:
    data = noise("big", 8 * 1024 * 1024 + 5)
    write_protected(tmp_path / "f", {"t": u8(data)}, dek=DEK, context=CONTEXT)
    assert read_all(tmp_path / "f") == {"t": data}


def test_no_tensors_and_no_metadata(tmp_path: Path) -> None:
    write(tmp_path / "f", {})
    with ProtectedFile(tmp_path / "f", dek=DEK) as file:
        assert file.names() == []
        assert file.metadata == {}


def test_ranges(path: Path) -> None:
    data = bytes(TENSORS["layer.weight"].data)
    with ProtectedFile(path, dek=DEK) as file:
        for start in range(0, 281, 7):
            for stop in range(start, 281, 9):
                assert file.read_range("layer.weight", start, stop) == data[start:stop]
        for start, stop in ((-1, 3), (3, 2), (0, 281)):
            with pytest.raises(UsageError, match="range"):
                file.read_range("layer.weight", start, stop)


def test_a_range_reads_only_its_chunks(path: Path) -> None:
    with ProtectedFile(path, dek=DEK) as file:
        first_blob = header_bytes(path) + sum(
            blob_bytes(file.info(name).size_bytes, CHUNK_BYTES) for name in file.names() if name < "layer.weight"
        )
        flip(path, first_blob + CHUNK_BYTES + TAG_BYTES)
        assert file.read_range("layer.weight", 0, 64) == TENSORS["layer.weight"].data[:64]
        with pytest.raises(AuthenticationError, match="chunk 1/5"):
            file.read_range("layer.weight", 0, 65)


def test_read_into_and_its_limits(path: Path) -> None:
    with ProtectedFile(path, dek=DEK) as file:
        buffer = bytearray(280)
        file.read_into("layer.weight", buffer)
        assert buffer == TENSORS["layer.weight"].data
        file.read_into("empty", bytearray())
        for wrong in (bytearray(279), bytearray(281), bytes(280), memoryview(bytearray(560))[::2]):
            with pytest.raises(UsageError, match="280 writable"):
                file.read_into("layer.weight", wrong)


def test_threads_share_a_file(tmp_path: Path) -> None:
    tensors = {f"t{i}": u8(noise(str(i), 20_000)) for i in range(16)}
    write(tmp_path / "f", tensors, chunk_bytes=4096)
    with ProtectedFile(tmp_path / "f", dek=DEK) as file, ThreadPoolExecutor(4) as pool:
        for name, data in zip(tensors, pool.map(file.read, tensors), strict=True):
            assert data == tensors[name].data


def test_usage_of_an_open_file(path: Path) -> None:
    with ProtectedFile(path, dek=DEK) as file:
        with pytest.raises(UsageError, match="no tensor 'nope'"):
            file.read("nope")
        with pytest.raises(TypeError):
            pickle.dumps(file)
        assert DEK.hex() not in repr(file)
    with pytest.raises(UsageError, match="closed"):
        file.read("scalar")


# What is written


@pytest.mark.parametrize("moment", ["before a read", "after a part of one"])
def test_closed_while_another_thread_reads(path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ProtectedFile(path, dek=DEK)
    preadv = os.preadv

    def close_and_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if moment == "before a read":
            file.close()
            return preadv(descriptor, buffers, offset)
        count = preadv(descriptor, [buffers[0][:1]], offset)
        file.close()
        return count

    monkeypatch.setattr(os, "preadv", close_and_read)
    with pytest.raises(UsageError, match="is closed"):
        file.read_all()


def test_what_is_read_once_a_file_was_closed_says_nothing_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ProtectedFile(path, dek=DEK)

    def another_file(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        file.close()
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", another_file)
    with pytest.raises(UsageError, match="is closed"):
        file.read(file.names()[0])


def test_record_is_of_the_whole_file(tmp_path: Path) -> None:
    record = write(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    assert record == FileRecord(name="f", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_the_safetensors_library_reads_it(path: Path) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == sorted(TENSORS)
        # No "format": a loader that looks for it refuses, instead of taking ciphertext for weights.
        assert set(file.metadata()) == {"wmguard"}
        for name, tensor in TENSORS.items():
            blob = file.get_tensor(name)
            assert blob.dtype == "uint8"
            assert blob.shape == (blob_bytes(tensor.info().size_bytes, CHUNK_BYTES),)
    assert header_bytes(path) % 8 == 0


def test_no_plaintext_in_the_file(tmp_path: Path) -> None:
    data = noise("plaintext", 50_000)
    tensors = {"t": u8(data), "zeros": u8(bytes(50_000))}
    write(tmp_path / "f", tensors, metadata={"secret-key": "secret-value"})
    written = (tmp_path / "f").read_bytes()
    runs = {data[i : i + 6] for i in range(len(data) - 5)}
    assert not any(written[i : i + 6] in runs for i in range(len(written) - 5))
    assert bytes(8) not in written[header_bytes(tmp_path / "f") :]
    assert b"secret-" not in written


def test_two_writes_share_no_ciphertext(tmp_path: Path) -> None:
    tensors = {"t": u8(bytes(10_000))}
    write(tmp_path / "a", tensors)
    write(tmp_path / "b", tensors)
    data = [(tmp_path / name).read_bytes()[header_bytes(tmp_path / name) :] for name in "ab"]
    blocks = [{one[i : i + 16] for i in range(0, len(one) - 15, 16)} for one in data]
    assert blocks[0].isdisjoint(blocks[1])
    # Equal plaintext chunks inside one file differ too: no nonce is used twice.
    assert len(blocks[0]) == len(range(0, len(data[0]) - 15, 16))


class MadeOnDemand(Mapping[str, TensorData]):
    """64 tensors of 1 MiB that exist only while somebody looks at them."""

    def __getitem__(self, name: str) -> TensorData:
        return u8(bytes(1024 * 1024))

    def __iter__(self) -> Iterator[str]:
        return (f"t{i:02}" for i in range(len(self)))

    def __len__(self) -> int:
        return 64


def test_memory_is_a_few_chunks(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        write(tmp_path / "f", MadeOnDemand(), chunk_bytes=1024 * 1024, threads=2)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "f").stat().st_size > 64 * 1024 * 1024
    # A chunk and a tensor for each thread, and one tensor that is being looked up.
    assert peak_bytes < 7 * 1024 * 1024


class Fails(Mapping[str, TensorData]):
    """Two tensors; the second look at the second one goes wrong."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._looks = 0

    def __getitem__(self, name: str) -> TensorData:
        self._looks += name == "b"
        return u8(noise(name, 5000)) if self._looks < 2 else self._action()

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2


def stop() -> None:
    raise KeyboardInterrupt


def test_an_exception_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(path, Fails(stop))
    with pytest.raises(UsageError, match="b changed while it was saved"):
        write(path, Fails(lambda: u8(b"short")))
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_container import Fails, write
write(Path(sys.argv[1]), Fails(lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_a_kill_leaves_the_old_file_and_no_plaintext(path: Path) -> None:
    before = path.read_bytes()
    command = [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    for file in path.parent.iterdir():
        assert noise("a", 5000)[:16] not in file.read_bytes()


@pytest.mark.parametrize(
    ("tensors", "options", "match"),
    [
        ({"": u8(b"x")}, {}, "tensor name has 0 bytes"),
        ({"x" * 1025: u8(b"x")}, {}, "tensor name has 1025 bytes"),
        ({"\ud800": u8(b"x")}, {}, "not valid Unicode"),
        ({"__metadata__": u8(b"x")}, {}, "__metadata__"),
        ({}, {"chunk_bytes": 15}, "chunk_bytes is 15"),
        ({}, {"chunk_bytes": 16 * 1024 * 1024 + 1}, "chunk_bytes"),
        ({}, {"metadata": {"step": 3}}, "not strings"),
        ({}, {"metadata": {"k": "x" * MAX_HEADER_BYTES}}, "header is over"),
    ],
)
def test_limits_of_a_write(tmp_path: Path, tensors: Any, options: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        write(tmp_path / "f", tensors, **options)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("F33", (1,), b"four"),
        ("F32", (2,), b"four"),
        ("F32", (-1, -1), b"four"),
        ("F4", (3,), b"12"),
        ("U8", (1,) * 65, b"1"),
        ("U8", (2,), memoryview(b"1234")[::2]),
    ],
)
def test_impossible_tensors(dtype: str, shape: tuple[int, ...], data: Any) -> None:
    with pytest.raises(UsageError):
        TensorData(dtype=dtype, shape=shape, data=data)


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": ""},
        {"set_id": "x" * 1025},
        {"role": "\ud800"},
        {"index": 0},
        {"index": 3},
        {"total": 100_000},
    ],
)
def test_impossible_contexts(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(CONTEXT, **change)


@pytest.mark.parametrize("dek", [b"", bytes(31), bytes(33)])
def test_a_dek_of_another_length(path: Path, dek: bytes) -> None:
    with pytest.raises(KeyFormatError, match="expected 32"):
        write(path.with_name("g"), dek=dek)
    with pytest.raises(KeyFormatError, match="expected 32"):
        ProtectedFile(path, dek=dek)


# Keys, contexts, other files


def test_wrong_dek(path: Path) -> None:
    with pytest.raises(AuthenticationError, match="not the key of this file") as caught:
        ProtectedFile(path, dek=bytes(32))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", "acme/other"),
        ("iteration", "4"),
        ("set_id", "other"),
        ("role", "optimizer"),
        ("index", 2),
        ("total", 3),
    ],
)
def test_a_file_of_another_context(path: Path, field: str, value: Any) -> None:
    with pytest.raises(ManifestError, match=f"model.safetensors: {field} is"):
        ProtectedFile(path, dek=DEK, context=dataclasses.replace(CONTEXT, **{field: value}))


def test_a_shard_of_another_save(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "old", context=dataclasses.replace(CONTEXT, set_id="old"), dek=bytes(32))
    with pytest.raises(ManifestError, match="set_id"):
        ProtectedFile(tmp_path / "old", dek=DEK, context=CONTEXT)
    with pytest.raises(AuthenticationError):
        ProtectedFile(tmp_path / "old", dek=DEK)


def test_a_swapped_data_section_of_the_same_save(path: Path, tmp_path: Path) -> None:
    """Same DEK, context, names and sizes: only the salt tells the two files apart."""
    write(tmp_path / "other", metadata={"format": "pt"})
    other, mine = (tmp_path / "other").read_bytes(), path.read_bytes()
    cut = header_bytes(path)
    assert len(other) == len(mine)
    path.write_bytes(mine[:cut] + other[cut:])
    with ProtectedFile(path, dek=DEK, context=CONTEXT) as file:
        for name in file.names():
            with pytest.raises(AuthenticationError, match="not authentic"):
                file.read(name)


def test_a_renamed_or_exchanged_tensor(path: Path) -> None:
    raw, cut = path.read_bytes(), header_bytes(path)
    header = parse_header(raw[:cut], file_size_bytes=len(raw))
    renamed = {name.replace("layer.bias", "layer.cias"): size for name, size in header.sizes.items()}
    path.write_bytes(dataclasses.replace(header, sizes=renamed).encode() + raw[cut:])
    with pytest.raises(AuthenticationError, match="header was changed"):
        ProtectedFile(path, dek=DEK)


def blobs(path: Path) -> tuple[Header, dict[str, tuple[int, int]]]:
    raw = path.read_bytes()
    header = parse_header(raw[: header_bytes(path)], file_size_bytes=len(raw))
    spans, stop = {}, header_bytes(path)
    for name, size in header.sizes.items():
        start, stop = stop, stop + blob_bytes(size, CHUNK_BYTES)
        spans[name] = (start, stop)
    return header, spans


def exchange(path: Path, first: int, second: int, size: int) -> None:
    data = bytearray(path.read_bytes())
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    path.write_bytes(data)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_swapped_chunks(path: Path, first: int, second: int) -> None:
    start = blobs(path)[1]["größe"][0]
    step = CHUNK_BYTES + TAG_BYTES
    exchange(path, start + first * step, start + second * step, step)
    with ProtectedFile(path, dek=DEK) as file, pytest.raises(AuthenticationError, match="'größe'"):
        file.read("größe")


def test_swapped_tensors(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, {"a": u8(noise("a", 100)), "b": u8(noise("b", 100))})
    (_, spans), size = blobs(path), blob_bytes(100, CHUNK_BYTES)
    exchange(path, spans["a"][0], spans["b"][0], size)
    with ProtectedFile(path, dek=DEK) as file:
        for name in "ab":
            with pytest.raises(AuthenticationError, match=f"'{name}'"):
                file.read(name)


def test_a_failed_read_leaves_zeros(path: Path) -> None:
    stop = blobs(path)[1]["layer.weight"][1]
    flip(path, stop - 1)
    buffer = bytearray(b"\xff" * 280)
    with ProtectedFile(path, dek=DEK) as file, pytest.raises(AuthenticationError, match="weight"):
        file.read_into("layer.weight", buffer)
    assert buffer == bytes(280)


# Changed bytes


def flip(path: Path, position: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)[0]
        file.seek(position)
        file.write(bytes([old ^ mask]))


def test_every_flipped_byte_fails(path: Path) -> None:
    """Every byte of the file, two kinds of flips: a named error at the latest when the tensor is read."""
    intact = read_all(path, context=None)
    for position in range(path.stat().st_size):
        for mask in (0x01, 0x80 | position % 128):
            flip(path, position, mask)
            with pytest.raises(WmguardError) as caught:
                read_all(path, context=None)
            assert type(caught.value) in (FormatError, AuthenticationError), position
            flip(path, position, mask)
    assert read_all(path, context=None) == intact


def test_every_truncation_fails(path: Path) -> None:
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(FormatError):
            ProtectedFile(path, dek=DEK)
        assert not is_protected(path)


def test_appended_bytes_fail(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="header implies"):
        ProtectedFile(path, dek=DEK)


def test_a_file_cut_while_it_is_open(path: Path) -> None:
    with ProtectedFile(path, dek=DEK) as file:
        os.truncate(path, header_bytes(path))
        with pytest.raises(FormatError, match="ended early"):
            file.read("empty")


# Headers that are well signed by nobody


@pytest.mark.parametrize("length", [4 << 30, MAX_HEADER_BYTES + 8, (1 << 64) - 1])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, 5 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="expected at most"):
            ProtectedFile(path, dek=DEK)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def with_header(text: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def spell(document: Any, public: Any, **style: Any) -> bytes:
    if isinstance(public, dict):
        public = {name: value for name, value in public.items() if value is not None}
    document["__metadata__"]["wmguard"] = canonical_json(public).decode()
    return with_header(
        json.dumps(document, **({"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False} | style)).encode()
    )


def edit_public(**changes: Any) -> Callable[[Any, Any], bytes]:
    return lambda document, public: spell(document, public | changes)


def edit_table(change: Callable[[Any], Any]) -> Callable[[Any, Any], bytes]:
    def edit(document: Any, public: Any) -> bytes:
        change(document)
        return spell(document, public)

    return edit


def replace(old: bytes, new: bytes) -> Callable[[Any, Any], bytes]:
    def edit(document: Any, public: Any) -> bytes:
        raw = spell(document, public)[8:].rstrip()
        assert old in raw
        return with_header(raw.replace(old, new, 1))

    return edit


def repad(padding: bytes) -> Callable[[Any, Any], bytes]:
    def edit(document: Any, public: Any) -> bytes:
        text = spell(document, public)[8:].rstrip(b" ")
        text += b" " * (-len(text) % 8) + padding
        return len(text).to_bytes(8, "little") + text

    return edit


PLAIN_ENTRY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
BAD_HEADERS: dict[str, Callable[[Any, Any], bytes]] = {
    "not json": lambda document, public: with_header(b"{"),
    "not utf-8": lambda document, public: with_header(b'{"\xff":1}'),
    "not an object": lambda document, public: with_header(b"[]"),
    "nested": lambda document, public: with_header(b"[" * 100_000),
    "long number": lambda document, public: with_header(b"1" * 10_000),
    "empty": lambda document, public: with_header(b""),
    "spaces": lambda document, public: spell(document, public, separators=(", ", ":")),
    "escapes": lambda document, public: spell(document, public, ensure_ascii=True),
    "not sorted": lambda document, public: spell(dict(reversed(document.items())), public, sort_keys=False),
    "plain safetensors": lambda document, public: with_header(canonical_json({"t": PLAIN_ENTRY})),
    "duplicate key": replace(b'"empty":{', b'"empty":{},"empty":{'),
    "eight more spaces": repad(b" " * 8),
    "newlines": repad(b"\n" * 8),
    "zeros": repad(b"\0" * 8),
    "more metadata": edit_table(lambda document: document["__metadata__"].update(format="pt")),
    "gap": edit_table(lambda document: document["scalar"].update(data_offsets=[10_000, 10_024])),
    "overlap": edit_table(lambda document: document["scalar"].update(data_offsets=[0, 24])),
    "false for 0": replace(b'"data_offsets":[0,', b'"data_offsets":[false,'),
    "float": replace(b'"data_offsets":[0,', b'"data_offsets":[0.0,'),
    "minus zero": replace(b'"data_offsets":[0,', b'"data_offsets":[-0,'),
    "two dimensions": edit_table(lambda document: document["scalar"].update(shape=[24, 1])),
    "another dtype": edit_table(lambda document: document["scalar"].update(dtype="I8")),
    "negative size": edit_table(lambda document: document["scalar"].update(shape=[-24])),
    "no such size": edit_table(lambda document: document["scalar"].update(shape=[15])),
    "size of 2^80": edit_table(lambda document: document["scalar"].update(shape=[1 << 80])),
    "more in an entry": edit_table(lambda document: document["scalar"].update(strides=[1])),
    "entry is no object": edit_table(lambda document: document.update(scalar=[24])),
    "empty name": edit_table(lambda document: document.update({"": document.pop("empty")})),
    "version 2": edit_public(version=2),
    "version true": edit_public(version=True),
    "version 1.0": edit_public(version=1.0),
    "another suite": edit_public(suite="AES-128-GCM"),
    "suite in small letters": edit_public(suite="aes-256-gcm"),
    "hidden too, although they show": edit_public(hidden_bytes=4096),
    "hidden size of a text": edit_public(hidden_bytes="4096"),
    "hidden size of true": edit_public(hidden_bytes=True),
    "no suite": edit_public(suite=None),
    "chunks of 0": edit_public(chunk_bytes=0),
    "chunks of 2^40": edit_public(chunk_bytes=1 << 40),
    "short salt": edit_public(salt="00" * 31),
    "capital salt": lambda document, public: spell(document, public | {"salt": "AB" * 32}),
    "salt with spaces": edit_public(salt=" " + "00" * 32),
    "index over total": edit_public(index=3),
    "no model": edit_public(model_id=""),
    "unknown field": edit_public(note="x"),
    "missing field": edit_public(mac=None),
    "second spelling of base64": lambda document, public: spell(document, public | {"inner": "QR=="}),
    "not base64": edit_public(inner="*"),
    "short mac": edit_public(mac="00"),
    "public header is no object": lambda document, public: spell(document, []),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_headers(path: Path, case: str) -> None:
    raw, cut = path.read_bytes(), header_bytes(path)
    document = json.loads(raw[8:cut])
    bad = BAD_HEADERS[case](document, json.loads(document["__metadata__"]["wmguard"]))
    assert bad != raw[:cut]
    path.write_bytes(bad + raw[cut:])
    with pytest.raises(FormatError):
        ProtectedFile(path, dek=DEK)
    with pytest.raises(FormatError):
        inspect_file(path)
    assert not is_protected(path)


GOOD_ENTRY = {"dtype": "U8", "shape": [4], "size_bytes": 4}
BAD_INNERS = {
    "not json": b"{",
    "spaces": json.dumps({"metadata": {}, "tensors": {"t": GOOD_ENTRY}}).encode(),
    "another name": canonical_json({"metadata": {}, "tensors": {"u": GOOD_ENTRY}}),
    "one more": canonical_json({"metadata": {}, "tensors": {"t": GOOD_ENTRY, "u": GOOD_ENTRY}}),
    "another size": canonical_json({"metadata": {}, "tensors": {"t": GOOD_ENTRY | {"shape": [3], "size_bytes": 3}}}),
    "size against shape": canonical_json({"metadata": {}, "tensors": {"t": GOOD_ENTRY | {"shape": [5]}}}),
    "unknown dtype": canonical_json({"metadata": {}, "tensors": {"t": GOOD_ENTRY | {"dtype": "U7"}}}),
    "shape of texts": canonical_json({"metadata": {}, "tensors": {"t": GOOD_ENTRY | {"shape": ["4"]}}}),
    "metadata of numbers": canonical_json({"metadata": {"a": 1}, "tensors": {"t": GOOD_ENTRY}}),
    "no metadata": canonical_json({"tensors": {"t": GOOD_ENTRY}}),
}


@pytest.mark.parametrize("case", BAD_INNERS)
def test_a_faulty_writer_that_has_the_dek(tmp_path: Path, case: str) -> None:
    path = tmp_path / "f"
    write(path, {"t": u8(b"1234")})
    raw, cut = path.read_bytes(), header_bytes(path)
    header = parse_header(raw[:cut], file_size_bytes=len(raw))
    keys = header.keys(DEK)
    inner = AESGCM(keys.inner).encrypt(bytes(12), BAD_INNERS[case], None)
    header = dataclasses.replace(header, inner=inner)
    header = dataclasses.replace(header, mac=header.expected_mac(keys))
    path.write_bytes(header.encode() + raw[cut:])
    with pytest.raises(FormatError):
        ProtectedFile(path, dek=DEK)


# Without keys


def test_inspect_shows_what_is_public_and_no_more(path: Path) -> None:
    shown = inspect_file(path)
    assert {name: shown[name] for name in ("model_id", "iteration", "set_id", "role", "index", "total")} == (
        dataclasses.asdict(CONTEXT)
    )
    assert (shown["version"], shown["suite"], shown["chunk_bytes"]) == (1, "AES-256-GCM", CHUNK_BYTES)
    assert shown["size_bytes"] == path.stat().st_size
    assert shown["tensors"] == {name: tensor.info().size_bytes for name, tensor in sorted(TENSORS.items())}
    assert "BF16" not in json.dumps(shown)


def test_is_protected(path: Path, tmp_path: Path) -> None:
    assert is_protected(path)
    for name, data in {"empty": b"", "text": b"not a model at all", "zeros": bytes(1000)}.items():
        (tmp_path / name).write_bytes(data)
        assert not is_protected(tmp_path / name)
    (tmp_path / "plain").write_bytes(with_header(canonical_json({"t": PLAIN_ENTRY})))
    assert not is_protected(tmp_path / "plain")
    assert not is_protected(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert not is_protected(tmp_path / "pipe")
    with pytest.raises(NotFoundError):
        is_protected(tmp_path / "missing")


def test_the_room_does_not_import_torch() -> None:
    rooms = "hf_wmguard.container.files, hf_wmguard.container.recipients"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
