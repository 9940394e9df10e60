"""The test vectors of the container: every good one reads, every bad one fails with the error it names."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stranger

from hf_wmguard import errors
from hf_wmguard.container.files import FileContext, ProtectedFile
from hf_wmguard.container.format import parse_header

HERE = Path(__file__).parent
VECTORS: list[dict[str, Any]] = json.loads((HERE / "container-v1.json").read_text())
GOOD = [vector for vector in VECTORS if vector["expect"] is None]
BAD = [vector for vector in VECTORS if vector["expect"] is not None]


def named(vectors: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def opened(vector: dict[str, Any], path: Path) -> ProtectedFile:
    path.write_bytes(base64.b64decode(vector["file"]))
    return ProtectedFile(path, dek=bytes.fromhex(vector["dek"]), context=FileContext(**vector["context"]))


@named(GOOD)
def test_good_vectors_read(vector: dict[str, Any], tmp_path: Path) -> None:
    with opened(vector, tmp_path / "f") as file:
        together = file.read_all(threads=2)
        found = {
            name: {"dtype": file.info(name).dtype, "shape": list(file.info(name).shape), "data": file.read(name).hex()}
            for name in file.names()
        }
        assert {name: bytes(view).hex() for name, view in together.items()} == {
            name: one["data"] for name, one in found.items()
        }
        assert found == vector["tensors"]
        assert file.metadata == vector["metadata"]


@named(GOOD)
def test_the_document_is_enough_to_read_them(vector: dict[str, Any]) -> None:
    file, dek = base64.b64decode(vector["file"]), bytes.fromhex(vector["dek"])
    keys, tensors, metadata = stranger.read(file, dek)
    assert (tensors, metadata) == (vector["tensors"], vector["metadata"])
    if "keys" in vector:
        assert {name: key.hex() for name, key in keys.items()} == vector["keys"]
        cut = 8 + int.from_bytes(file[:8], "little")
        ours = parse_header(file[:cut], file_size_bytes=len(file)).keys(dek)
        assert (ours.chunks.hex(), ours.inner.hex(), ours.mac.hex()) == tuple(
            vector["keys"][name] for name in ("chunks", "inner", "mac")
        )


def read_one_by_one(vector: dict[str, Any], path: Path) -> None:
    with opened(vector, path) as file:
        for name in file.names():
            file.read(name)
        # What no tensor has: padding is judged where all is read.
        file.read_all(threads=1)


def read_at_once(vector: dict[str, Any], path: Path) -> None:
    with opened(vector, path) as file:
        file.read_all(threads=2)


@pytest.mark.parametrize("read", [read_one_by_one, read_at_once])
@named(BAD)
def test_bad_vectors_fail_as_they_say(vector: dict[str, Any], read: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.WmguardError) as caught:
        read(vector, tmp_path / "f")
    assert type(caught.value) is getattr(errors, vector["expect"])
    assert caught.value.hint
    assert vector["dek"] not in str(caught.value)


def test_every_kind_of_vector_is_there() -> None:
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS) > 70
    assert {vector["expect"] for vector in BAD} == {"AuthenticationError", "FormatError", "ManifestError"}


def test_vectors_are_never_made_again() -> None:
    before = (HERE / "container-v1.json").read_bytes()
    run = subprocess.run([sys.executable, HERE / "make_vectors.py"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "never made again" in run.stderr
    assert (HERE / "container-v1.json").read_bytes() == before
