"""Rewrap a protected folder of 16 GB: seconds, and the bytes that were read; and what one guess of a passphrase costs.

    python benchmarks/rewrap.py [--gigabytes 16] [--work DIR] [--runs 5]

The weights are a sparse file of the size that the manifest names: rewrapping does not read them, which is what is
shown, so that their content is of no matter. The bytes read are those of the whole process (``/proc/self/io``).
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import tempfile
import time
from pathlib import Path

from hf_wmguard.canonical import canonical_time
from hf_wmguard.container.passphrase import Passphrase
from hf_wmguard.container.recipients import X25519Identity, dek_commitment, generate_identity, seal_recipients
from hf_wmguard.evidence.manifest import RECIPIENTS_NAME, FileEntry, Manifest, write_manifest
from hf_wmguard.keys import OwnerKey
from hf_wmguard.rewrapping import rewrap


def write_folder(folder: Path, owner: OwnerKey, reader: X25519Identity, size_bytes: int) -> None:
    """Write a folder of this size with two recipients."""
    dek, set_id = secrets.token_bytes(32), secrets.token_hex(16)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size_bytes)
    recipients = [X25519Identity.from_owner(owner).recipient(), reader.recipient()]
    (folder / RECIPIENTS_NAME).write_bytes(seal_recipients(dek, recipients, set_id=set_id, model_id="acme/large"))
    manifest = Manifest(
        model_id="acme/large",
        iteration="1",
        set_id=set_id,
        created=canonical_time(),
        step=None,
        state="complete",
        files=(FileEntry(name="model.safetensors", size_bytes=size_bytes, sha256="0" * 64),),
        dek_commitment=dek_commitment(dek, set_id),
        commitment=None,
        commitment_time=None,
        signature=None,
        triggers=None,
        sealed_state=None,
    )
    write_manifest(folder, manifest, owner)


def read_bytes() -> int:
    """Return how many bytes this process has read so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder, reader = Path(work) / "model", generate_identity()
        folder.mkdir()
        size_bytes = int(options.gigabytes * 1e9)
        write_folder(folder, OwnerKey.generate(), reader, size_bytes)
        public = Path(work) / "new.pub"
        public.write_text(generate_identity().recipient().to_text())
        seconds, read = [], []
        for run in range(2 * options.runs):
            change = {"remove": [f"file:{public}"]} if run % 2 else {"add": [f"file:{public}"]}
            before, begin = read_bytes(), time.perf_counter()
            rewrap(folder, identity=reader, **change)
            seconds.append(time.perf_counter() - begin)
            read.append(read_bytes() - before)
    print(f"rewrap of {size_bytes / 1e9:g} GB: median {statistics.median(seconds):.4f} s, slowest {max(seconds):.4f} s")
    print(f"bytes read: {max(read)}")
    seconds = []
    for _ in range(options.runs):
        begin = time.perf_counter()
        _ = Passphrase("six random words are a passphrase").key_id
        seconds.append(time.perf_counter() - begin)
    print(f"Argon2id, 256 MiB, 3 passes, 4 lanes: median {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
