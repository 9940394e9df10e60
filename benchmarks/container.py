"""The container against plain safetensors: seconds, memory, one tensor out of a big file, and how it grows.

    python benchmarks/container.py [--gb 2] [--repeats 7] [--threads 2] [--work DIR] [--big-gb 16] [--json FILE]

Everything that is compared runs in turn, in one process, from a warm page cache; a ratio is that of the shortest
times, beside it the median over the rounds, and the ratio of the processor time of all threads, which other programs
on the machine disturb less. Files lie in --work (by default in /dev/shm, where a file is memory and fsync costs
nothing); with --disk DIR the saves are timed there too, both until the disk has them. "Load into owned memory" is
`load_file` and `clone` of each tensor against `read_all` and `torch.frombuffer`; part of that win is huge pages.
Needs room for about four times --gb in --work, and twice --big-gb in --big-work. All files are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_wmguard.container.files import FileContext, Memory, ProtectedFile, TensorData, write_protected
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.suspects.tensors import decode, encode

DEK = bytes(range(32))
CONTEXT = FileContext(model_id="benchmark", iteration="1", set_id="benchmark")
TENSOR_BYTES = 1 << 25
Timed = tuple[float, float]
PEAK = """
import sys
from pathlib import Path
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
"""
LOAD = (
    PEAK
    + """
from hf_wmguard.container.files import ProtectedFile
before = peak()
with ProtectedFile(Path(sys.argv[1]), dek=bytes(range(32))) as file:
    tensors = file.read_all(threads=int(sys.argv[2]))
print(peak() - before, sum(len(view) for view in tensors.values()))
"""
)
SAVE = (
    PEAK
    + """
from hf_wmguard.container.files import FileContext, ProtectedFile, TensorData, write_protected
with ProtectedFile(Path(sys.argv[1]), dek=bytes(range(32))) as file:
    tensors = {n: TensorData(dtype=file.info(n).dtype, shape=file.info(n).shape, data=v)
               for n, v in file.read_all(threads=int(sys.argv[2])).items()}
before, context = peak(), FileContext(model_id="benchmark", iteration="1", set_id="benchmark")
write_protected(Path(sys.argv[1] + ".copy"), tensors, dek=bytes(range(32)), context=context, threads=int(sys.argv[2]))
print(peak() - before, sum(len(one.view()) for one in tensors.values()))
"""
)
PROTECT = (
    PEAK
    + """
import time
from hf_wmguard.protection import protect_folder
begin = time.perf_counter()
protect_folder(sys.argv[1], sys.argv[2], recipients=("file:" + sys.argv[3],), threads=int(sys.argv[4]))
print(peak(), time.perf_counter() - begin)
"""
)


class Repeated(Mapping[str, TensorData]):
    """So many bytes of tensors that lie in one piece of memory: a file's size without a model's memory."""

    def __init__(self, size_bytes: int) -> None:
        self._count = max(1, round(size_bytes / TENSOR_BYTES))
        self._data = os.urandom(TENSOR_BYTES)

    def __getitem__(self, name: str) -> TensorData:
        return TensorData(dtype="BF16", shape=(TENSOR_BYTES // 8192, 4096), data=self._data)

    def __iter__(self) -> Iterator[str]:
        return (f"model.layers.{index:04d}.weight" for index in range(self._count))

    def __len__(self) -> int:
        return self._count


def timed(action: Callable[[], object]) -> Timed:
    """Return seconds of the clock and of the processors; what the action returns is freed outside of them."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = action()
    taken = time.perf_counter() - begin, time.process_time() - cpu
    del result
    return taken


def rounds(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Timed]]:
    """Run every case once in each round, another one first each time; the first round only warms up."""
    found: dict[str, list[Timed]] = {name: [] for name in cases}
    names = list(cases)
    for index in range(repeats + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            taken = timed(cases[name])
            if index:
                found[name].append(taken)
    return found


def summary(found: dict[str, list[Timed]], size_bytes: int) -> dict[str, Any]:
    """Return medians, minima and ratios to the first case."""
    base = next(iter(found.values()))
    rows = {}
    for name, times in found.items():
        pairs = list(zip(times, base, strict=True))
        rows[name] = {
            "seconds_min": min(t[0] for t in times),
            "seconds_median": statistics.median(t[0] for t in times),
            "cpu_seconds_min": min(t[1] for t in times),
            "ratio_of_minima": min(t[0] for t in times) / min(t[0] for t in base),
            "ratio_median": statistics.median(one[0] / other[0] for one, other in pairs),
            "cpu_ratio": min(t[1] for t in times) / min(t[1] for t in base),
            "gb_per_s": size_bytes / 1e9 / min(t[0] for t in times),
        }
        row = rows[name]
        ratios = f"ratio {row['ratio_of_minima']:5.2f} (median {row['ratio_median']:5.2f}"
        speed = f"{row['seconds_min']:7.3f} s  {row['gb_per_s']:6.2f} GB/s"
        print(f"  {name:42s} {speed}  {ratios}, processor {row['cpu_ratio']:5.2f})", flush=True)
    return rows


def plain_save(tensors: dict[str, torch.Tensor], path: Path, sync: bool) -> None:
    """Save in plaintext, as a new file, to the disk if asked to."""
    path.unlink(missing_ok=True)
    save_file(tensors, path)
    if sync:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def our_save(source: Mapping[str, TensorData], path: Path, **options: Any) -> None:
    """Save as ciphertext, as a new file; always synced."""
    path.unlink(missing_ok=True)
    write_protected(path, source, dek=DEK, context=CONTEXT, **options)


def saves(
    tensors: dict[str, torch.Tensor], folder: Path, threads: int, *, sync: bool
) -> dict[str, Callable[[], object]]:
    """Return the ways to save."""
    source, ours = {name: encode(name, tensor) for name, tensor in tensors.items()}, folder / "ours.safetensors"
    save = partial(our_save, source, ours, threads=threads)
    ways: dict[str, Callable[[], object]] = {
        "plain save_file": partial(plain_save, tensors, folder / "plain.safetensors", sync),
        "container": partial(save, digest=False),
        "container + SHA-256 for the manifest": save,
    }
    if not sync:
        ways["container, 1 MiB chunks"] = partial(save, digest=False, chunk_bytes=1 << 20)
        ways["container, ChaCha20-Poly1305"] = partial(save, digest=False, suite="ChaCha20-Poly1305")
        ways["container, hidden names"] = partial(save, digest=False, hide_names=True)
    return ways


def our_load(path: Path, threads: int, memory: Memory | None = None) -> dict[str, torch.Tensor]:
    """Load ciphertext into memory of our own."""
    with ProtectedFile(path, dek=DEK) as file:
        views = file.read_all(threads=threads, memory=memory)
        return {name: decode(file.info(name).dtype, file.info(name).shape, view) for name, view in views.items()}


def loads(folder: Path, threads: int) -> dict[str, Callable[[], object]]:
    """Return the ways to load."""
    ours, small = folder / "ours.safetensors", folder / "small.safetensors"
    with ProtectedFile(ours, dek=DEK) as file:
        memory = Memory(file.memory_bytes())
    return {
        "plain load_file + clone": lambda: {n: t.clone() for n, t in load_file(folder / "plain.safetensors").items()},
        "container": partial(our_load, ours, threads),
        "container, memory used again": partial(our_load, ours, threads, memory),
        "container, that and 1 MiB chunks": partial(our_load, small, threads, memory),
    }


def memory_of(script: str, *arguments: object) -> list[float]:
    """Return the numbers that a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
    return [float(word) for word in done.stdout.split()]


def one_tensor(folder: Path, size_bytes: int, repeats: int) -> dict[str, float]:
    """Return the seconds to open a big file and read one tensor of 32 MiB, and one row."""
    path, source = folder / "big.safetensors", Repeated(size_bytes)
    our_save(source, path, digest=False)
    name = f"model.layers.{len(source) // 2:04d}.weight"

    def tensor() -> object:
        with ProtectedFile(path, dek=DEK) as file:
            return file.read_all([name])

    def row() -> object:
        with ProtectedFile(path, dek=DEK) as file:
            return file.read_rows(name, 7, 8)

    try:
        found = rounds({"tensor": tensor, "row": row}, repeats)
    finally:
        path.unlink()
    return {f"{what}_seconds": min(t[0] for t in times) for what, times in found.items()}


def protect(folder: Path, size_bytes: int, threads: int) -> dict[str, float]:
    """Return peak memory and seconds of `protect_folder` on a plain file of this size."""
    model = folder / "model"
    model.mkdir()
    key = folder / "reader.pub"
    key.write_text(f"{generate_identity().recipient().to_text().strip()}\n")
    source = Repeated(size_bytes)
    size = len(source[""].view())
    entries = {
        name: {"dtype": "BF16", "shape": [size // 8192, 4096], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(source)
    }
    text = json.dumps(entries).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in source:
            file.write(source[name].data)
    peak, seconds = memory_of(PROTECT, model, folder / "out", key, threads)
    return {"size_bytes": len(source) * size, "peak_bytes": peak, "seconds": seconds}


def plain_write(source: Mapping[str, TensorData], path: Path) -> None:
    """Write the same bytes as they are."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        for name in source:
            file.write(source[name].data)


def growth(folder: Path, sizes_gb: list[float], threads: int) -> list[dict[str, float]]:
    """Return seconds for each gigabyte, for files of several sizes; beside them what a plain write takes."""
    rows = []
    for size_gb in sizes_gb:
        source, path = Repeated(int(size_gb * 1e9)), folder / "grown.safetensors"
        plain = [timed(partial(plain_write, source, path)) for _ in range(3)]
        save = [timed(partial(our_save, source, path, threads=threads, digest=False)) for _ in range(3)]
        load = [timed(partial(our_load, path, threads)) for _ in range(3)]
        size = path.stat().st_size / 1e9
        path.unlink()
        kinds = {"plain": plain, "save": save, "load": load}
        rows.append({"gb": size, **{kind: min(t[1] for t in times) / size for kind, times in kinds.items()}})
        figures = ", ".join(f"{kind} {rows[-1][kind]:.3f}" for kind in kinds)
        print(f"  {size:6.2f} GB: processor seconds per GB: {figures}", flush=True)
    return rows


def main() -> None:
    """Measure, print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))  # noqa: S108
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--big-gb", type=float, default=0.0, help="size of the file for one tensor, and for protect")
    parser.add_argument("--big-work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--growth", type=float, nargs="*", default=[0.2, 0.5, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = max(1, round(options.gb * 1e9 / TENSOR_BYTES))
    tensors = {f"model.layers.{i:04d}.weight": torch.randn(TENSOR_BYTES // 8192, 4096).bfloat16() for i in range(count)}
    size = count * TENSOR_BYTES
    result: dict[str, Any] = {"command": sys.argv[1:], "size_bytes": size, "threads": options.threads}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        print(f"save of {size / 1e9:.2f} GB")
        result["save"] = summary(rounds(saves(tensors, folder, options.threads, sync=False), options.repeats), size)
        source = {name: encode(name, tensor) for name, tensor in tensors.items()}
        our_save(source, folder / "ours.safetensors")
        our_save(source, folder / "small.safetensors", chunk_bytes=1 << 20)
        print("load into owned memory")
        result["load"] = summary(rounds(loads(folder, options.threads), options.repeats), size)
        for name in ("plain", "small"):
            (folder / f"{name}.safetensors").unlink()
        if options.disk:
            print("save until the disk has it")
            with tempfile.TemporaryDirectory(dir=options.disk) as disk:
                ways = saves(tensors, Path(disk), options.threads, sync=True)
                result["save_to_disk"] = summary(rounds(ways, options.repeats), size)
        del tensors
        print("memory")
        for what, script in (("load", LOAD), ("save", SAVE)):
            peak, plaintext = memory_of(script, folder / "ours.safetensors", options.threads)
            result[f"memory_{what}"] = {"peak_bytes": peak, "plaintext_bytes": plaintext}
            print(f"  {what}: {peak / plaintext:.4f} of the plaintext beyond what was there")
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        print("growth")
        result["growth"] = growth(Path(name), options.growth, options.threads)
    if options.big_gb:
        with tempfile.TemporaryDirectory(dir=options.big_work) as name:
            result["one_tensor"] = one_tensor(Path(name), int(options.big_gb * 1e9), options.repeats)
            print(f"one of {options.big_gb} GB: {result['one_tensor']}")
        with tempfile.TemporaryDirectory(dir=options.big_work) as name:
            result["protect"] = protect(Path(name), int(options.big_gb * 1e9), options.threads)
            print(f"protect: {result['protect']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
