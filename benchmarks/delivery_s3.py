"""Throughput of a push to S3 beside plain boto3 `upload_file` of the same bytes, into the same server on this machine.

    python benchmarks/delivery_s3.py [--mb 512] [--rounds 3] [--json FILE]

The server is moto's, in a process of its own. Rounds are interleaved, another way first each time; each goes into an
empty prefix. Plain is boto3 with its own defaults, file after file. Ours is all of a first push, from the packed folder
to the pointer. Packing, which reads and checks every signed byte once more, is timed beside it.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import torch
from safetensors.torch import save_file

from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.delivery.parcel import Parcel, pack
from hf_wmguard.delivery.s3 import push_to_s3
from hf_wmguard.protection import protect_folder
from hf_wmguard.stores.location import parse_location

SERVER = """
from moto.server import ThreadedMotoServer
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def server() -> Iterator[str]:
    """Yield the address of an S3 of its own process."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"  # type: ignore[union-attr]
    finally:
        process.communicate("")


def make_folder(root: Path, size_bytes: int) -> Parcel:
    """Return a packed folder of about this size."""
    key = root / "reader.pub"
    key.write_text(f"{generate_identity().recipient().to_text().strip()}\n")
    (root / "plain").mkdir()
    count = max(1, size_bytes // (64 << 20))
    save_file({f"w{i}": torch.randn(16384, 2048).bfloat16() for i in range(count)}, root / "plain/model.safetensors")
    (root / "plain/config.json").write_text("{}")
    protect_folder(root / "plain", root / "out", recipients=(f"file:{key}",), max_shard_bytes=256 << 20)
    return pack(root / "out")


def plain_push(client: Any, parcel: Parcel, prefix: str) -> None:
    """Upload the same files as boto3 does it."""
    for name in parcel.names:
        client.upload_file(str(parcel.folder / name), "models", f"{prefix}/{name}")


def empty(client: Any) -> None:
    """Give the server its memory back."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="models"):
        for one in page.get("Contents", ()):
            client.delete_object(Bucket="models", Key=one["Key"])


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))  # noqa: S108
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    secret = "stand-in"  # noqa: S105
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": secret, "AWS_REGION": "us-east-1"}
    times: dict[str, list[float]] = {"plain": [], "ours": [], "pack": []}
    with tempfile.TemporaryDirectory(dir=options.work) as work, server() as endpoint:
        os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="models")
        parcel = make_folder(Path(work), options.mb << 20)
        size = parcel.size_bytes
        for index in range(options.rounds + 1):
            order = ["plain", "ours"] if index % 2 else ["ours", "plain"]
            for which in (*order, "pack"):
                begin = time.perf_counter()
                if which == "plain":
                    plain_push(client, parcel, f"plain-{index}")
                elif which == "ours":
                    push_to_s3(parcel, parse_location(f"s3://models/ours-{index}"), threads=options.threads)
                else:
                    pack(parcel.folder)
                # The first round warms up.
                times[which] += [time.perf_counter() - begin] if index else []
                empty(client)
        client.close()
    ratios = [plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=True)]
    result = {
        "size_bytes": size,
        "threads": options.threads,
        "seconds": times,
        "mb_per_s": {which: size / 1e6 / min(taken) for which, taken in times.items()},
        "throughput_of_minima": min(times["plain"]) / min(times["ours"]),
        "throughput_median": statistics.median(ratios),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
