"""Judging a suspect on a Hub by ranges against downloading it: bytes and seconds, marked and innocent.

    python benchmarks/ranges.py [--layers 32] [--work DIR] [--json FILE]

32 layers are 8.03e9 weights in bf16, 16 GB, and need room for about twice that in --work. The Hub is that of the
tests, in a process of its own on loopback, so that a download is as fast as it gets: over a network the ratio of times
comes nearer to that of bytes. "Download" is `snapshot_download` into a folder; judging that folder is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from big_checkpoint import write_checkpoint

REPO = "acme/suspect"
ROOT = Path(__file__).parents[1]


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Run the Hub; yield its endpoint."""
    command = [sys.executable, "-m", "tests.hub", "--folder", str(folder), "--no-record"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield next(iter(process.stdout or ())).strip()
    finally:
        process.terminate()
        process.wait()


def timed(call: Any, *args: Any, **kwargs: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = call(*args, **kwargs)
    return time.perf_counter() - begin, value


def run(layers: int, work: Path) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    from hf_wmguard import SignatureConfig, WatermarkConfig, embed_folder, verify
    from hf_wmguard.keys import OwnerKey

    size_bytes = write_checkpoint(work / "plain", layers)
    found: dict[str, Any] = {"suspect_bytes": size_bytes}
    for name in ("owner", "stranger"):
        OwnerKey.generate().write(work / f"{name}.key")
    configs = {
        name: WatermarkConfig(
            model_id=f"acme/{name}",
            owner_key=f"file:{work / f'{name}.key'}",
            registry=str(work / f"registry-{name}"),
            signature=SignatureConfig(),
            triggers=None,
        )
        for name in ("owner", "stranger")
    }
    # The stranger's key marked a model of the same shapes, of which only the registry is kept.
    embed_folder(work / "plain", work / "other", configs["stranger"])
    shutil.rmtree(work / "other")
    embed_folder(work / "plain", work / "marked", configs["owner"])
    shutil.rmtree(work / "plain")
    api = HfApi()
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=work / "marked")
    shutil.rmtree(work / "marked")
    for name in ("owner", "stranger"):
        where = {"owner_key": configs[name].owner_key, "registry": configs[name].registry}
        seconds, report = timed(verify, f"hub://{REPO}", **where)
        read = report.suspect["read"]
        found[name] = {
            "verdict": report.verdict,
            "log10_p": report.log10_p,
            "seconds": seconds,
            "bytes": read["bytes"],
            "share": read["bytes"] / size_bytes,
            "requests": read["requests"],
        }
    found["download_seconds"], _ = timed(snapshot_download, REPO, local_dir=work / "download")
    shutil.rmtree(work / "download")
    for name in ("owner", "stranger"):
        found[name]["share_of_time"] = found[name]["seconds"] / found["download_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="ranges-") as temporary, hub(Path(temporary)) as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_owner", "HF_HUB_DISABLE_XET": "1"}
        os.environ.update({**settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": temporary})
        os.environ.pop("HF_HUB_OFFLINE", None)
        found = run(options.layers, Path(temporary))
    for name in ("owner", "stranger"):
        one = found[name]
        print(
            f"{name}: {one['verdict']}, log10 p {one['log10_p']:.1f}, {one['bytes']:,} of {found['suspect_bytes']:,} "
            f"bytes ({one['share']:.2%}) in {one['requests']} requests and {one['seconds']:.2f} s, "
            f"{one['share_of_time']:.3f} of a download ({found['download_seconds']:.1f} s)"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
