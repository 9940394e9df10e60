"""For any tensors: they come back, and no changed byte does."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.files import FileContext, ProtectedFile, TensorData, write_protected
from hf_wmguard.container.inner import DTYPE_BITS
from hf_wmguard.container.stream import blob_bytes, plaintext_bytes
from hf_wmguard.errors import AuthenticationError, FormatError

DEK = bytes(range(32))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = TEXT.filter(lambda text: text and text != "__metadata__")
CONTEXTS = st.builds(
    lambda model, iteration, save, index, more: FileContext(
        model_id=model, iteration=iteration, set_id=save, index=index, total=index + more
    ),
    TEXT.filter(bool),
    TEXT.filter(bool),
    TEXT.filter(bool),
    st.integers(1, 1000),
    st.integers(0, 1000),
)


@st.composite
def tensors(draw: st.DrawFn) -> TensorData:
    dtype = draw(st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits % 8 == 0]))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    size_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    return TensorData(dtype=dtype, shape=shape, data=draw(st.binary(min_size=size_bytes, max_size=size_bytes)))


@settings(deadline=None, max_examples=80)
@given(
    wanted=st.dictionaries(NAME, tensors(), max_size=4),
    context=CONTEXTS,
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
    chunk_bytes=st.integers(16, 200),
    data=st.data(),
)
def test_round_trip_and_ranges(
    wanted: dict[str, TensorData],
    context: FileContext,
    metadata: dict[str, str],
    chunk_bytes: int,
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        record = write_protected(path, wanted, dek=DEK, context=context, metadata=metadata, chunk_bytes=chunk_bytes)
        assert record.size_bytes == path.stat().st_size
        with ProtectedFile(path, dek=DEK, context=context) as file:
            assert (file.names(), file.metadata) == (sorted(wanted), metadata)
            for name, tensor in wanted.items():
                assert file.info(name) == tensor.info()
                assert file.read(name) == tensor.data
                start = data.draw(st.integers(0, tensor.info().size_bytes))
                stop = data.draw(st.integers(start, tensor.info().size_bytes))
                assert file.read_range(name, start, stop) == bytes(tensor.data)[start:stop]


@settings(deadline=None, max_examples=150)
@given(
    wanted=st.dictionaries(NAME, tensors(), min_size=1, max_size=3),
    chunk_bytes=st.integers(16, 200),
    where=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_a_changed_byte_fails(wanted: dict[str, TensorData], chunk_bytes: int, where: float, mask: int) -> None:
    context = FileContext(model_id="m", iteration="1", set_id="s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        write_protected(path, wanted, dek=DEK, context=context, chunk_bytes=chunk_bytes)
        raw = bytearray(path.read_bytes())
        raw[int(where * len(raw))] ^= mask
        path.write_bytes(raw)

        def read() -> None:
            with ProtectedFile(path, dek=DEK) as file:
                for name in file.names():
                    file.read(name)

        with pytest.raises((AuthenticationError, FormatError)):
            read()


@settings(deadline=None, max_examples=150)
@given(data=st.binary(max_size=300), wrap=st.booleans())
def test_no_bytes_crash_the_reader(data: bytes, wrap: bool) -> None:
    """Anything but a protected file is a FormatError, with or without a length that fits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        path.write_bytes(len(data).to_bytes(8, "little") + data if wrap else data)
        with pytest.raises(FormatError):
            ProtectedFile(path, dek=DEK)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from(["version", "suite", "chunk_bytes", "salt", "inner", "mac", "index", "total", "role"])


@settings(deadline=None, max_examples=150)
@given(table=st.dictionaries(TEXT, JSON, max_size=2), public=st.dictionaries(FIELD, JSON, max_size=9))
def test_no_header_crashes_the_reader(table: dict[str, object], public: dict[str, object]) -> None:
    public = {"version": 1, "suite": "AES-256-GCM", **public}
    document = {**table, "__metadata__": {"wmguard": canonical_json(public).decode()}}
    text = canonical_json(document)
    text += b" " * (-len(text) % 8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(FormatError):
            ProtectedFile(path, dek=DEK)


@given(size_bytes=st.integers(0, 1 << 48), chunk_bytes=st.integers(16, 1 << 24))
def test_sizes_and_blobs_are_one_to_one(size_bytes: int, chunk_bytes: int) -> None:
    assert plaintext_bytes(blob_bytes(size_bytes, chunk_bytes), chunk_bytes) == size_bytes
