"""Make the test vectors of the container: what a reader must give back, and what it must refuse and how.

Run once for each version of the format, from the root of the repository: ``python tests/vectors/make_vectors.py``.
It never overwrites. Everything in the vectors follows from the constants here: salts are fixed, which no real
file's may be.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.files import FileContext, TensorData, write_protected
from hf_wmguard.container.format import Header, parse_header, seal_header
from hf_wmguard.container.layout import lay_out
from hf_wmguard.container.stream import TAG_BYTES, blob_bytes
from hf_wmguard.container.suites import SUITES, cipher_of

OUT = Path(__file__).parent / "container-v1.json"
DEK, SALT = bytes(range(32)), bytes(range(100, 132))
CONTEXT = FileContext(model_id="vectors/model", iteration="1", set_id="5e7" * 8, index=1, total=2)
CHUNK_BYTES = 32
METADATA = {"format": "pt"}
AES, CHACHA = SUITES


def noise(seed: str, size_bytes: int) -> bytes:
    """Return bytes that follow from a name."""
    return hashlib.shake_256(seed.encode()).digest(size_bytes)


TENSORS = {
    "a.weight": TensorData(dtype="BF16", shape=(5, 8), data=noise("a.weight", 80)),
    "b.weight": TensorData(dtype="BF16", shape=(8, 5), data=noise("b.weight", 80)),
    "empty": TensorData(dtype="F32", shape=(0, 3), data=b""),
    "scalar": TensorData(dtype="I64", shape=(), data=noise("scalar", 8)),
    "whole chunks": TensorData(dtype="U8", shape=(64,), data=noise("whole chunks", 64)),
    "größe": TensorData(dtype="F16", shape=(1,), data=noise("size", 2)),
}
Case = dict[str, Any]


def written(**options: Any) -> bytes:
    """Return the bytes of a protected file."""
    settings: dict[str, Any] = {
        "dek": DEK,
        "context": CONTEXT,
        "metadata": METADATA,
        "chunk_bytes": CHUNK_BYTES,
        "suite": AES,
        "salt": SALT,
        "tensors": TENSORS,
    } | options
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        write_protected(path, settings.pop("tensors"), **settings)
        return path.read_bytes()


def case(name: str, file: bytes, expect: str = "", **more: Any) -> Case:
    """Return one vector; an empty ``expect`` means that the file reads."""
    return {
        "name": name,
        "expect": expect or None,
        "dek": DEK.hex(),
        "context": dataclasses.asdict(CONTEXT),
        "file": base64.b64encode(file).decode(),
        **more,
    }


def contents(tensors: dict[str, TensorData]) -> Case:
    """Return what a reader must give back."""
    return {
        "metadata": METADATA,
        "tensors": {
            name: {"dtype": one.dtype, "shape": list(one.shape), "data": bytes(one.data).hex()}
            for name, one in tensors.items()
        },
    }


def intermediates(file: bytes) -> Case:
    """Return the derived keys, for whoever writes a reader."""
    header = header_of(file)
    keys = header.keys(DEK)
    return {"keys": {"chunks": keys.chunks.hex(), "inner": keys.inner.hex(), "mac": keys.mac.hex()}}


def cut_of(file: bytes) -> int:
    """Return where the data starts."""
    return 8 + int.from_bytes(file[:8], "little")


def header_of(file: bytes) -> Header:
    """Return the header of a file."""
    return parse_header(file[: cut_of(file)], file_size_bytes=len(file))


def spans(file: bytes) -> dict[str, tuple[int, int]]:
    """Return where the blob of every tensor of a named file starts and stops."""
    found, stop = {}, cut_of(file)
    for name, size_bytes in header_of(file).sizes.items():
        start, stop = stop, stop + blob_bytes(size_bytes, CHUNK_BYTES)
        found[name] = (start, stop)
    return found


def good() -> Iterator[Case]:
    """Yield what must read."""
    for suite in SUITES:
        for hidden in (False, True):
            way = f"{suite}{', hidden' if hidden else ''}"
            file = written(suite=suite, hide_names=hidden)
            yield case(way, file, **contents(TENSORS), **intermediates(file))
            file = written(suite=suite, hide_names=hidden, tensors={})
            yield case(f"{way}, no tensors", file, **contents({}), **intermediates(file))
    one = {"empty": TENSORS["empty"]}
    yield case("one empty tensor", written(tensors=one), **contents(one))
    one = {"t": TensorData(dtype="U8", shape=(33,), data=noise("t", 33))}
    yield case("one byte more than a chunk", written(tensors=one), **contents(one))


def changed(file: bytes, position: int, mask: int = 1) -> bytes:
    """Return a file with some bits of one byte flipped."""
    data = bytearray(file)
    data[position] ^= mask
    return bytes(data)


def flips(file: bytes, way: str) -> Iterator[Case]:
    """Yield a flipped bit in each region of a file."""
    cut = cut_of(file)
    text = file[:cut]
    for what, position, expect in (
        ("length", 0, "FormatError"),
        ("padding", cut - 1, "FormatError"),
        ("model id", text.index(b"vectors/model"), "ManifestError"),
        ("salt", text.index(SALT.hex().encode()), "AuthenticationError"),
        ("commitment", text.index(b'commitment\\":\\"') + 16, "AuthenticationError"),
        ("mac", text.index(b'mac\\":\\"') + 8, "AuthenticationError"),
        ("first chunk", cut, "AuthenticationError"),
        ("last tag", len(file) - 1, "AuthenticationError"),
    ):
        # A digit of a hexadecimal number that stays one.
        mask = 1 if text[position : position + 1] not in (b"9", b"a", b"f") else 2
        bad = changed(file, position, mask if position < cut - 1 else 1)
        yield case(f"{way}: a flipped bit in the {what}", bad, expect)
    at = text.index(b'inner\\":\\"') + 10
    other = b"B" if text[at : at + 1] == b"A" else b"A"
    yield case(f"{way}: another inner header", file[:at] + other + file[at + 1 :], "AuthenticationError")


def exchanged(file: bytes, first: int, second: int, size: int) -> bytes:
    """Return a file with two parts of one size in each other's place."""
    data = bytearray(file)
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return bytes(data)


def moved() -> Iterator[Case]:
    """Yield swapped and repeated chunks, tensors and shards, and cut files."""
    file, step = written(), CHUNK_BYTES + TAG_BYTES
    where = spans(file)
    a, b = where["a.weight"][0], where["b.weight"][0]
    bad = "AuthenticationError"
    yield case("two chunks of a tensor swapped", exchanged(file, a, a + step, step), bad)
    yield case("chunks of two tensors swapped", exchanged(file, a, b, step), bad)
    size = where["a.weight"][1] - a
    yield case("two tensors swapped", exchanged(file, a, b, size), bad)
    yield case("a chunk repeated", file[: a + step] + file[a : a + step] + file[a + 2 * step :], bad)
    other = written(salt=bytes(32))
    yield case("the data of another file of this save", file[: cut_of(file)] + other[cut_of(other) :], bad)
    yield case("the wrong DEK", file, bad, dek=bytes(32).hex())
    for field, value in (("index", 2), ("set_id", "0" * 24), ("model_id", "x/y"), ("iteration", "2"), ("role", "r")):
        wrong = written(context=dataclasses.replace(CONTEXT, **{field: value}))
        yield case(f"a file of another {field}", wrong, "ManifestError")
        relabelled = dataclasses.replace(header_of(wrong), context=CONTEXT).encode() + wrong[cut_of(wrong) :]
        yield case(f"a file of another {field}, relabelled", relabelled, bad)
    for start in (7, 8, cut_of(file) - 1, cut_of(file), a + step, b, len(file) - TAG_BYTES, len(file) - 1):
        yield case(f"cut after {start} bytes", file[:start], "FormatError")
    yield case("one byte too many", file + b"\0", "FormatError")


def spelt(file: bytes, change: Callable[[Any, Any], Any]) -> bytes:
    """Return a file with another header, canonical but for what ``change`` does to the table and the public header."""
    cut = cut_of(file)
    document = json.loads(file[8:cut])
    public = json.loads(document["__metadata__"]["wmguard"])
    change(document, public)
    document["__metadata__"]["wmguard"] = canonical_json(public).decode()
    text = canonical_json(document)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[cut:]


def headers() -> Iterator[Case]:
    """Yield headers that no writer makes."""
    file = written()
    changes: dict[str, Callable[[Any, Any], Any]] = {
        "version 2": lambda table, public: public.update(version=2),
        "suite AES-128-GCM": lambda table, public: public.update(suite="AES-128-GCM"),
        "chunks of 2^40 bytes": lambda table, public: public.update(chunk_bytes=1 << 40),
        "an unknown field": lambda table, public: public.update(note="x"),
        "hidden although names show": lambda table, public: public.update(hidden_bytes=4096),
        "overlapping offsets": lambda table, public: table["scalar"].update(data_offsets=[0, 24]),
        "a gap": lambda table, public: table["scalar"].update(data_offsets=[9000, 9024]),
        "a format entry": lambda table, public: table["__metadata__"].update(format="pt"),
        "a two-dimensional blob": lambda table, public: table["scalar"].update(shape=[24, 1]),
    }
    for name, change in changes.items():
        yield case(f"header with {name}", spelt(file, change), "FormatError")
    relabelled = dataclasses.replace(header_of(file), suite=CHACHA).encode() + file[cut_of(file) :]
    yield case("relabelled with the other suite", relabelled, "AuthenticationError")
    yield case("header of 4 GB", (4 << 30).to_bytes(8, "little") + file[8:], "FormatError")
    yield case("header of 2^64 - 1 bytes", b"\xff" * 8 + file[8:], "FormatError")
    escaped = json.dumps(json.loads(file[8 : cut_of(file)]), sort_keys=True, separators=(",", ":")).encode()
    escaped += b" " * (-len(escaped) % 8)
    yield case("header in another spelling", len(escaped).to_bytes(8, "little") + escaped, "FormatError")
    entries = {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    plain = canonical_json(entries)
    plain += b" " * (-len(plain) % 8)
    yield case("plaintext in place of ciphertext", len(plain).to_bytes(8, "little") + plain + bytes(8), "FormatError")
    yield case("an empty file", b"", "FormatError")


def padding() -> Iterator[Case]:
    """Yield an authentic hidden file whose padding carries something."""
    infos = {"t": TENSORS["a.weight"].info()}
    header, keys = seal_header(DEK, CONTEXT, infos, METADATA, suite=AES, chunk_bytes=4096, hidden=True, salt=SALT)
    cipher = cipher_of(AES, keys.chunks)
    (extent,) = lay_out({}, infos, hidden=True, cipher=cipher, chunk_bytes=4096)
    plain = bytearray(TENSORS["a.weight"].view()) + bytearray(extent.stream.size_bytes - 80)
    plain[-1] = 1
    sealed = bytearray(len(plain) + TAG_BYTES)
    extent.stream.seal(0, memoryview(plain), memoryview(sealed))
    yield case("padding that is not zero", header.encode() + sealed, "FormatError")


def main() -> None:
    """Write the vectors, or nothing where they are there already."""
    if OUT.exists():
        sys.exit(f"error: {OUT.name}: test vectors are never made again; give a new version a new name")
    cases = [*good(), *moved(), *headers(), *padding()]
    for suite in SUITES:
        cases += flips(written(suite=suite), suite)
    cases += flips(written(hide_names=True), "hidden")
    lines = ",\n".join(json.dumps(one, sort_keys=True, ensure_ascii=True) for one in cases)
    OUT.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} vectors")


if __name__ == "__main__":
    main()
