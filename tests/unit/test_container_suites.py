"""The two suites, hidden names, and what the keys of a file depend on."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
from test_container import CHUNK_BYTES, CONTEXT, DEK, TENSORS, flip, header_bytes, noise, read_all, u8, write

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.files import Memory, ProtectedFile, TensorData, inspect_file, is_protected
from hf_wmguard.container.format import Header, parse_header, seal_header
from hf_wmguard.container.inner import TensorInfo
from hf_wmguard.container.layout import MIN_HIDDEN_BYTES, hidden_starts, lay_out, padme
from hf_wmguard.container.stream import TAG_BYTES
from hf_wmguard.container.suites import AES_256_GCM, CHACHA20_POLY1305, SUITES, cipher_of, default_suite, suite_for
from hf_wmguard.errors import AuthenticationError, FormatError, UsageError, WmguardError

PLAIN = {name: bytes(tensor.data) for name, tensor in TENSORS.items()}
WAYS = [(suite, hidden) for suite in SUITES for hidden in (False, True)]


def header_of(path: Path) -> Header:
    raw = path.read_bytes()
    return parse_header(raw[: header_bytes(path)], file_size_bytes=len(raw))


@pytest.mark.parametrize(("suite", "hidden"), WAYS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_way_comes_back(tmp_path: Path, suite: str, hidden: bool, threads: int) -> None:
    path = tmp_path / "f"
    record = write(path, suite=suite, hide_names=hidden, threads=threads, metadata={"format": "pt"})
    assert record.size_bytes == path.stat().st_size
    assert inspect_file(path)["suite"] == suite
    assert read_all(path) == PLAIN
    with ProtectedFile(path, dek=DEK, context=CONTEXT) as file:
        assert file.keys() == file.names() == sorted(TENSORS)
        assert file.metadata == {"format": "pt"}
        assert {name: file.info(name) for name in TENSORS} == {name: one.info() for name, one in TENSORS.items()}
        together = file.read_all(threads=threads)
        assert {name: bytes(view) for name, view in together.items()} == PLAIN
        assert not any(view.readonly for view in together.values())
        for start in range(0, 281, 31):
            assert file.read_range("layer.weight", start, 280) == PLAIN["layer.weight"][start:]


@pytest.mark.parametrize(("suite", "hidden"), WAYS)
def test_every_flipped_byte_fails_in_every_way(tmp_path: Path, suite: str, hidden: bool) -> None:
    path = tmp_path / "f"
    write(path, {"a": u8(noise("a", 100)), "b": u8(b"b")}, suite=suite, hide_names=hidden, chunk_bytes=1024)
    cut = header_bytes(path)
    # Of thousands of bytes of padding, some.
    for position in (*range(cut), *range(cut, path.stat().st_size, 41 if hidden else 1)):
        flip(path, position)
        with pytest.raises(WmguardError) as caught, ProtectedFile(path, dek=DEK) as file:
            file.read_all(threads=1)
        assert type(caught.value) in (FormatError, AuthenticationError), position
        flip(path, position)
    assert read_all(path) == {"a": noise("a", 100), "b": b"b"}


def test_the_same_threads_or_not_make_the_same_file(tmp_path: Path) -> None:
    tensors = {f"t{index}": u8(noise(str(index), 40 * index)) for index in range(30)}
    for hidden in (False, True):
        records = [
            write(tmp_path / "f", tensors, threads=threads, salt=bytes(32), hide_names=hidden) for threads in (1, 2, 7)
        ]
        assert records[0] == records[1] == records[2]
        data = (tmp_path / "f").read_bytes()
        assert write(tmp_path / "f", tensors, salt=bytes(32), hide_names=hidden, digest=False).sha256 == ""
        assert (tmp_path / "f").read_bytes() == data


def test_a_suite_cannot_be_exchanged(tmp_path: Path) -> None:
    """The name of the suite is in the keys: a header that was relabelled and nothing else does not open."""
    write(tmp_path / "f", suite=AES_256_GCM)
    raw = (tmp_path / "f").read_bytes()
    header = dataclasses.replace(header_of(tmp_path / "f"), suite=CHACHA20_POLY1305)
    (tmp_path / "f").write_bytes(header.encode() + raw[header_bytes(tmp_path / "f") :])
    with pytest.raises(AuthenticationError, match="header was changed"):
        ProtectedFile(tmp_path / "f", dek=DEK)


@pytest.mark.parametrize("suite", ["", "AES-128-GCM", "aes-256-gcm", "AES-256-GCM "])
def test_an_unknown_suite_is_refused(tmp_path: Path, suite: str) -> None:
    if suite:
        with pytest.raises(UsageError, match="suite"):
            write(tmp_path / "f", suite=suite)
    with pytest.raises(UsageError, match="suite"):
        cipher_of(suite, bytes(32))


def test_the_default_suite_suits_the_processor() -> None:
    assert suite_for(b"model name : x\nflags\t\t: fpu aes sse\n") == AES_256_GCM
    assert suite_for(b"Features\t: fp asimd aes pmull\n") == AES_256_GCM
    assert suite_for(b"flags : fpu sse vaes\n") == CHACHA20_POLY1305
    assert suite_for(b"nothing known") == AES_256_GCM
    assert default_suite() in SUITES


def other_inner(header: Header, tensors: dict[str, TensorInfo]) -> Header:
    """Return a header that says something else about the tensors, sealed and signed by who has the DEK."""
    other, _ = seal_header(
        DEK,
        header.context,
        tensors,
        {},
        suite=header.suite,
        chunk_bytes=header.chunk_bytes,
        hidden=header.hidden_bytes is not None,
        salt=header.salt,
    )
    return other


@pytest.mark.parametrize("hidden", [False, True])
def test_dtype_and_shape_are_bound_to_every_chunk(tmp_path: Path, hidden: bool) -> None:
    """Even with the DEK, another dtype or shape of the same size makes no chunk open."""
    path = tmp_path / "f"
    write(path, {"t": TensorData(dtype="F16", shape=(8, 4), data=noise("t", 64))}, hide_names=hidden)
    raw, cut = path.read_bytes(), header_bytes(path)
    for dtype, shape in (("BF16", (8, 4)), ("F16", (4, 8)), ("F16", (32,))):
        header = other_inner(header_of(path), {"t": TensorInfo(dtype=dtype, shape=shape, size_bytes=64)})
        bad = header.encode()
        other = tmp_path / "other"
        other.write_bytes(bad + raw[cut:])
        with ProtectedFile(other, dek=DEK) as file:
            assert file.info("t").shape == shape
            with pytest.raises(AuthenticationError, match="not authentic"):
                file.read("t")
    assert read_all(path) == {"t": noise("t", 64)}


# Hidden names


def test_hidden_files_show_one_number(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write(path, hide_names=True)
    shown = inspect_file(path)
    assert shown["tensors"] == {}
    assert shown["hidden_bytes"] == MIN_HIDDEN_BYTES
    written = path.read_bytes()
    for name in TENSORS:
        assert name.encode() not in written
    assert is_protected(path)
    few = tmp_path / "few"
    write(few, {"x": u8(b"x")}, hide_names=True)
    # Other names, another number of them and other sizes: as long a file, but for the encrypted header.
    assert few.stat().st_size - header_bytes(few) == len(written) - header_bytes(path)


def test_no_safetensors_reader_takes_a_hidden_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", hide_names=True)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy")


def test_padded_sizes() -> None:
    assert [padme(size) for size in (0, 1, 2, 9, 100, 1000, 4097, 10_000)] == [0, 1, 2, 10, 104, 1024, 4352, 10_240]
    for size in [*range(2, 3000), *(10**power + 7 for power in range(4, 15))]:
        assert size <= padme(size) <= size * 1.12
        assert padme(padme(size)) == padme(size)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 5, 0], [64, 64, 1], [4096], [4033, 1], [5000, 3, 0, 129]])
def test_hidden_layouts(tmp_path: Path, sizes: list[int]) -> None:
    tensors = {f"t{index}": u8(noise(str(index), size)) for index, size in enumerate(sizes)}
    for chunk_bytes in (16, 100, 4096):
        write(tmp_path / "f", tensors, hide_names=True, chunk_bytes=chunk_bytes)
        assert read_all(tmp_path / "f") == {name: bytes(one.data) for name, one in tensors.items()}
        with ProtectedFile(tmp_path / "f", dek=DEK) as file:
            starts, _ = hidden_starts({name: one.info() for name, one in tensors.items()})
            assert all(start % 64 == 0 for start in starts.values())
            assert {n: bytes(v) for n, v in file.read_all().items()} == {n: bytes(t.data) for n, t in tensors.items()}


def with_padding(path: Path, position: int) -> None:
    """Write a hidden file whose plaintext has a one at ``position``, as a faulty program with the DEK might."""
    infos = {name: one.info() for name, one in TENSORS.items()}
    options: Any = {"suite": AES_256_GCM, "chunk_bytes": CHUNK_BYTES, "hidden": True}
    header, keys = seal_header(DEK, CONTEXT, infos, {}, **options)
    cipher = cipher_of(AES_256_GCM, keys.chunks)
    (extent,) = lay_out({}, infos, hidden=True, cipher=cipher, chunk_bytes=CHUNK_BYTES)
    plain = bytearray(extent.stream.size_bytes)
    for segment in extent.segments:
        plain[segment.start : segment.stop] = PLAIN[segment.name]
    plain[position] |= 1
    data = bytearray()
    for chunk in range(extent.stream.count):
        start, stop = extent.stream.span(chunk)
        sealed = bytearray(stop - start + TAG_BYTES)
        extent.stream.seal(chunk, memoryview(plain)[start:stop], memoryview(sealed))
        data += sealed
    path.write_bytes(header.encode() + data)


def test_padding_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    starts, total = hidden_starts({name: one.info() for name, one in TENSORS.items()})
    gap = starts["layer.bias"] + 28
    for position in (gap, starts["layer.weight"] - 1, total - 1):
        with_padding(path, position)
        with ProtectedFile(path, dek=DEK) as file:
            memory = Memory(file.memory_bytes())
            with pytest.raises(FormatError, match="padding is not zero"):
                file.read_all(memory=memory, threads=2)
            assert bytes(memory.view) == bytes(len(memory.view))
            assert file.read("scalar") == PLAIN["scalar"]
    with_padding(path, gap)
    with ProtectedFile(path, dek=DEK) as file, pytest.raises(FormatError, match="padding"):
        file.read("layer.bias")
    with_padding(path, starts["scalar"])
    with ProtectedFile(path, dek=DEK) as file:
        file.read_all()


@pytest.mark.parametrize("hidden_bytes", [0, 100, 4095, 4097, 1 << 51, -1])
def test_hidden_sizes_that_no_file_has(tmp_path: Path, hidden_bytes: int) -> None:
    path = tmp_path / "f"
    write(path, hide_names=True)
    raw, cut = path.read_bytes(), header_bytes(path)
    document = json.loads(raw[8:cut])
    public = json.loads(document["__metadata__"]["wmguard"]) | {"hidden_bytes": hidden_bytes}
    document["__metadata__"]["wmguard"] = canonical_json(public).decode()
    text = canonical_json(document)
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[cut:])
    with pytest.raises(FormatError):
        ProtectedFile(path, dek=DEK)


# All at once


@pytest.mark.parametrize("hidden", [False, True])
def test_a_failed_load_leaves_zeros(tmp_path: Path, hidden: bool) -> None:
    path = tmp_path / "f"
    write(path, {f"t{index}": u8(noise(str(index), 1000)) for index in range(9)}, hide_names=hidden)
    flip(path, path.stat().st_size - 1)
    with ProtectedFile(path, dek=DEK) as file:
        memory = Memory(file.memory_bytes() + 64)
        memory.view[:] = b"\xff" * len(memory.view)
        with pytest.raises(AuthenticationError):
            file.read_all(memory=memory, threads=3)
        assert bytes(memory.view) == bytes(file.memory_bytes()) + b"\xff" * 64


def test_memory_is_used_again(tmp_path: Path) -> None:
    write(tmp_path / "f")
    with ProtectedFile(tmp_path / "f", dek=DEK) as file:
        memory = Memory(file.memory_bytes())
        seen: list[tuple[str, int]] = []
        for _ in range(2):
            views = file.read_all(memory=memory, threads=1, progress=lambda name, count: seen.append((name, count)))
            assert {name: bytes(view) for name, view in views.items()} == PLAIN
        assert sum(count for _, count in seen) == 2 * sum(map(len, PLAIN.values()))
        with pytest.raises(UsageError, match="memory of"):
            file.read_all(memory=Memory(10))
    assert bytes(views["scalar"]) == PLAIN["scalar"]
    assert "Memory" in repr(memory)


@pytest.mark.parametrize("threads", [0, -1, 65])
def test_impossible_numbers_of_threads(tmp_path: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        write(tmp_path / "f", threads=threads)
    write(tmp_path / "f")
    with ProtectedFile(tmp_path / "f", dek=DEK) as file, pytest.raises(UsageError, match="threads"):
        file.read_all(threads=threads)


@pytest.mark.parametrize("hidden", [False, True])
def test_some_of_the_tensors(tmp_path: Path, hidden: bool) -> None:
    write(tmp_path / "f", hide_names=hidden)
    with ProtectedFile(tmp_path / "f", dek=DEK) as file:
        for names in ([], ["scalar"], ["layer.weight", "empty", "größe"], file.names()):
            seen: list[tuple[str, int]] = []
            views = file.read_all(names, threads=2, progress=lambda name, count, seen=seen: seen.append((name, count)))
            assert {name: bytes(view) for name, view in views.items()} == {name: PLAIN[name] for name in names}
            assert {name for name, _ in seen} <= set(names)
            assert sum(count for _, count in seen) == sum(len(PLAIN[name]) for name in names)
        with pytest.raises(UsageError, match="twice"):
            file.read_all(["scalar", "scalar"])
        with pytest.raises(UsageError, match="no tensor"):
            file.read_all(["nope"])


def test_rows(tmp_path: Path) -> None:
    write(tmp_path / "f")
    with ProtectedFile(tmp_path / "f", dek=DEK) as file:
        assert file.read_rows("layer.weight", 2, 4) == PLAIN["layer.weight"][80:160]
        assert file.read_rows("empty", 0, 0) == b""
        for name, start, stop in (("scalar", 0, 1), ("layer.bias", 0, 8), ("layer.bias", 3, 2)):
            with pytest.raises(UsageError, match="rows"):
                file.read_rows(name, start, stop)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("needs /dev/full")
    from hf_wmguard.container.writing import _write_at

    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="space"):
        _write_at(full.fileno(), memoryview(b"x"), 0)
