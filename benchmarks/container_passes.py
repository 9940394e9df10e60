"""What the passes of a load take on one core, each alone: how fast could a load be at all?

    python benchmarks/container_passes.py [--mb 500] [--work DIR]

Prints gigabytes per second: copying ciphertext out of the page cache, decrypting it into memory that was used before,
clearing fresh huge pages, decrypting into fresh ones, and decrypting out of a mapped file without the copy.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHUNK = 4 << 20
SEALED = CHUNK + 16
POPULATE_WRITE = 23
ROUNDS = 5


def area(size_bytes: int) -> mmap.mmap:
    """Return fresh memory in huge pages."""
    fresh = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fresh.madvise(mmap.MADV_HUGEPAGE)
    return fresh


def timed(action: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    kept = action()
    taken = time.perf_counter() - begin
    del kept
    return taken


def main() -> None:
    """Measure each pass, the shortest of some rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))  # noqa: S108
    options = parser.parse_args()
    chunks = range(options.mb * 1_000_000 // CHUNK)
    # One key and one nonce for all chunks: nothing here is secret.
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    sealed = bytearray(cipher.encrypt(nonce, os.urandom(CHUNK), None))
    used, scratch = memoryview(bytearray(CHUNK)), memoryview(bytearray(SEALED))

    def into(out: memoryview, *, step: int) -> memoryview:
        for chunk in chunks:
            cipher.decrypt_into(nonce, sealed, None, out[chunk * step :][:CHUNK])
        return out

    with tempfile.TemporaryFile(dir=options.work) as file:
        for _ in chunks:
            file.write(sealed)
        file.flush()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            passes: dict[str, Callable[[], object]] = {
                "copy out of the page cache": lambda: [
                    os.preadv(file.fileno(), [scratch], chunk * SEALED) for chunk in chunks
                ],
                "decrypt into memory used before": lambda: into(used, step=0),
                "clear fresh huge pages": lambda: area(len(chunks) * CHUNK).madvise(POPULATE_WRITE),
                "decrypt into fresh huge pages": lambda: into(memoryview(area(len(chunks) * CHUNK)), step=CHUNK),
                "decrypt out of a mapped file": lambda: [
                    cipher.decrypt_into(nonce, view[chunk * SEALED :][:SEALED], None, used) for chunk in chunks
                ],
            }
            for name, action in passes.items():
                seconds = min(timed(action) for _ in range(ROUNDS))
                print(f"{name:34s} {len(chunks) * CHUNK / 1e9 / seconds:6.2f} GB/s")


if __name__ == "__main__":
    main()
