"""Read mutated protected files: nothing that was changed may be accepted, and only named errors may come out.

    python benchmarks/fuzz_container.py [--executions 200000] [--seed 1] [--json FILE]

Each execution takes one of several authentic files, mutates it (bits, bytes, blocks, lengths, numbers and texts of
the header, chunks and regions swapped between files of one save and of others, cuts, insertions), and reads it: with
the right DEK and the context it should have, in turn all at once and tensor by tensor, and without keys. A mutation
must end in a WmguardError, unless it changed nothing. Tensor by tensor, a change in the padding behind the last
hidden tensor is not looked at, and then what comes out must be what the untouched file holds. Exit 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_wmguard.container.files import (
    FileContext,
    ProtectedFile,
    TensorData,
    inspect_file,
    write_protected,
)
from hf_wmguard.container.suites import SUITES
from hf_wmguard.errors import AuthenticationError, FormatError, ManifestError, WmguardError

DEK = bytes(range(32))
ALLOWED = (AuthenticationError, FormatError, ManifestError)
Contents = dict[str, bytes]
INTERESTING = [
    b"0",
    b"1",
    b"-1",
    b"true",
    b"null",
    b'""',
    b"4294967296",
    b"1e9",
    b"[]",
    b"{}",
    b"\xff",
    b" ",
    b"\\u0000",
]


@dataclass(frozen=True)
class Sample:
    """An authentic file and what it holds."""

    data: bytes
    context: FileContext
    contents: Contents
    cut: int


def samples(generator: random.Random, folder: Path) -> list[Sample]:
    """Return files of every suite and layout, of one save and of another."""
    found = []
    for suite in SUITES:
        for hidden in (False, True):
            # Shards of two saves; no two authentic files claim to be the same shard of the same save.
            for index, save in ((1, "a"), (2, "a"), (1, "b")):
                tensors = {
                    f"layer.{i}": TensorData(dtype="U8", shape=(size,), data=generator.randbytes(size))
                    for i, size in enumerate((0, 5, 64, 64, 100))
                }
                set_id = f"{save}-{suite}-{hidden}"
                context = FileContext(model_id="m", iteration="1", set_id=set_id, index=index, total=2)
                path = folder / "sample"
                write_protected(
                    path, tensors, dek=DEK, context=context, chunk_bytes=64, suite=suite, hide_names=hidden, threads=1
                )
                data = path.read_bytes()
                contents = {name: bytes(one.data) for name, one in tensors.items()}
                found.append(Sample(data, context, contents, 8 + int.from_bytes(data[:8], "little")))
    return found


class Mutator:
    """Ways to change a file."""

    def __init__(self, generator: random.Random, pool: list[Sample]) -> None:
        self._random = generator
        self._pool = pool

    def mutate(self, sample: Sample) -> bytes:
        """Return the file after one to three changes."""
        data = bytearray(sample.data)
        ways: list[Callable[[bytearray, Sample], None]] = [
            self._bits, self._bytes, self._swap, self._copy, self._cut, self._insert, self._remove, self._length,
            self._word, self._other_header, self._other_data, self._digit,
        ]  # fmt: skip
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            if data:
                self._random.choice(ways)(data, sample)
        return bytes(data)

    def _at(self, data: bytearray) -> int:
        return self._random.randrange(len(data))

    def _bits(self, data: bytearray, sample: Sample) -> None:
        data[self._at(data)] ^= 1 << self._random.randrange(8)

    def _bytes(self, data: bytearray, sample: Sample) -> None:
        at = self._at(data)
        data[at : at + 4] = self._random.randbytes(len(data[at : at + 4]))

    def _block(self, data: bytearray, sample: Sample) -> tuple[int, int]:
        # Chunks of this file are 80 bytes; some blocks are others.
        size = self._random.choice((80, 80, 16, 64, 1, 96))
        start = min(sample.cut + 80 * self._random.randrange(8), len(data)) if self._random.random() < 0.7 else 0
        return (start or self._at(data)), size

    def _swap(self, data: bytearray, sample: Sample) -> None:
        (one, size), (two, _) = sorted((self._block(data, sample), self._block(data, sample)))
        if one + size <= two and two + size <= len(data):
            data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]

    def _copy(self, data: bytearray, sample: Sample) -> None:
        (one, size), (two, _) = self._block(data, sample), self._block(data, sample)
        part = data[one : one + size]
        data[two : two + len(part)] = part

    def _cut(self, data: bytearray, sample: Sample) -> None:
        del data[self._random.choice((self._at(data), sample.cut, max(0, len(data) - 80), len(data) - 1)) :]

    def _insert(self, data: bytearray, sample: Sample) -> None:
        at = self._at(data)
        data[at:at] = self._random.randbytes(self._random.choice((1, 8, 80)))

    def _remove(self, data: bytearray, sample: Sample) -> None:
        at, size = self._block(data, sample)
        del data[at : at + size]

    def _length(self, data: bytearray, sample: Sample) -> None:
        length = self._random.choice((0, 1, sample.cut, sample.cut - 16, 4 << 30, (1 << 64) - 1, 1 << 24, len(data)))
        data[:8] = length.to_bytes(8, "little")

    def _word(self, data: bytearray, sample: Sample) -> None:
        at = self._random.randrange(8, max(9, min(sample.cut, len(data))))
        word = self._random.choice(INTERESTING)
        data[at : at + len(word)] = word

    def _digit(self, data: bytearray, sample: Sample) -> None:
        places = [at for at in range(8, min(sample.cut, len(data))) if 48 <= data[at] <= 57]
        if places:
            data[self._random.choice(places)] = self._random.randrange(48, 58)

    def _other_header(self, data: bytearray, sample: Sample) -> None:
        other = self._random.choice(self._pool)
        data[: sample.cut] = other.data[: other.cut]

    def _other_data(self, data: bytearray, sample: Sample) -> None:
        other = self._random.choice(self._pool)
        data[sample.cut :] = other.data[other.cut :]


def read(path: Path, sample: Sample, one_by_one: bool) -> Contents:
    """Return all that a file gives."""
    with ProtectedFile(path, dek=DEK, context=sample.context) as file:
        if one_by_one:
            return {name: bytes(file.read(name)) for name in file.names()}
        return {name: bytes(view) for name, view in file.read_all(threads=1).items()}


def fuzz(executions: int, seed: int) -> dict[str, object]:
    """Return what came out of it; ``wrong`` lists every accepted change and every error without a name."""
    generator = random.Random(seed)  # noqa: S311
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:  # noqa: S108
        folder = Path(name)
        pool = samples(generator, folder)
        mutator, path = Mutator(generator, pool), folder / "mutated"
        # Checked without keys too, and through one descriptor: making and deleting files is slower than reading them.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        for execution in range(executions):
            sample = generator.choice(pool)
            data = mutator.mutate(sample)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, data, 0)
            outcome = judge(path, sample, data, execution)
            outcomes[outcome] += 1
            if outcome.startswith("wrong"):
                wrong.append(f"execution {execution}: {outcome}")
        os.close(descriptor)
    seconds = time.monotonic() - begin
    return {"executions": executions, "seed": seed, "seconds": seconds, "outcomes": dict(outcomes), "wrong": wrong}


def judge(path: Path, sample: Sample, data: bytes, execution: int) -> str:
    """Return the class of the error, ``unchanged``, or what is wrong."""
    try:
        if execution % 4 == 0:
            inspect_file(path)
        got = read(path, sample, execution % 2 == 0)
    except WmguardError as error:
        return type(error).__name__ if isinstance(error, ALLOWED) else f"wrong class {type(error).__name__}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"wrong: {type(error).__name__}"
    if data == sample.data:
        return "unchanged"
    if got != sample.contents:
        return "wrong: accepted with other contents"
    only_some_was_read = (
        execution % 2 == 0 and len(data) == len(sample.data) and data[: sample.cut] == sample.data[: sample.cut]
    )
    return "padding not looked at" if only_some_was_read else "wrong: a change was not seen"


def main() -> None:
    """Fuzz, print the outcome, and end with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the outcome here")
    options = parser.parse_args()
    result = fuzz(options.executions, options.seed)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
