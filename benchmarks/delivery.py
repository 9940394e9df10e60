"""Delivery to a Hub against the plain client: push, and pull with load, of the same bytes.

    python benchmarks/delivery.py [--gb 2] [--rounds 3] [--work DIR] [--json FILE]

"Plain" is `upload_folder` of the plaintext folder into a new private repo, and `snapshot_download` with
`from_pretrained`. Ours is `push`, which also checks every signed digest first, and `pull`, which checks them at the
end, with `load_protected`. "Streamed" is `load_protected` of the repo itself, which writes nothing to disk. Everything
runs in turn, `--rounds` times and in changing order, against the Hub of the tests in a process of its own on loopback,
by LFS; ratios are of the shortest times and of the medians. Needs room for about eight times --gb in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from ranges import hub


def make_model(folder: Path, size_bytes: int) -> None:
    """Save a bf16 Llama of about that size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner = 1024, 4096
    layer = 4 * hidden * hidden + 3 * hidden * inner
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=max(1, size_bytes // (2 * layer)),
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    torch.set_default_dtype(torch.float32)


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def run(work: Path, size_bytes: int, rounds: int) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoModelForCausalLM

    from hf_wmguard import load_protected, protect_folder
    from hf_wmguard.container.recipients import generate_identity
    from hf_wmguard.delivery.pulling import pull
    from hf_wmguard.delivery.pushing import push
    from hf_wmguard.keys import OwnerKey, write_key_pair

    OwnerKey.generate().write(work / "owner.key")
    identity = generate_identity()
    write_key_pair(work / "i.key", identity.to_text().encode(), identity.recipient().to_text().encode())
    make_model(work / "plain", size_bytes)
    reference = f"file:{work / 'i.key'}"
    api = HfApi()
    seconds: dict[str, list[float]] = {}

    def note(what: str, call: Callable[[], Any]) -> None:
        os.sync()
        seconds.setdefault(what, []).append(timed(call))

    def pull_and_load(repo: str) -> None:
        pull(f"hub://{repo}", work / "pulled")
        load_protected(work / "pulled", identity=reference, auto_class=AutoModelForCausalLM)

    def plain_and_load(repo: str) -> None:
        snapshot_download(repo, local_dir=work / "downloaded")
        AutoModelForCausalLM.from_pretrained(work / "downloaded")

    for turn in range(rounds):
        # New ciphertext and new repos each time: what a Hub has already is not sent again.
        shutil.rmtree(work / "protected", ignore_errors=True)
        protect_folder(
            work / "plain", work / "protected", owner_key=f"file:{work / 'owner.key'}", recipients=(f"{reference}.pub",)
        )
        plain, ours = f"acme/plain-{turn}", f"acme/ours-{turn}"
        _salt(work / "plain", turn)
        api.create_repo(plain, private=True)
        up = [
            ("upload_folder", lambda: api.upload_folder(repo_id=plain, folder_path=work / "plain")),  # noqa: B023
            ("push", lambda: push(work / "protected", f"hub://{ours}")),  # noqa: B023
        ]
        down = [
            ("download and load", lambda: plain_and_load(plain)),  # noqa: B023
            ("pull and load", lambda: pull_and_load(ours)),  # noqa: B023
        ]
        # Whoever comes second finds a disk that is still writing for the first.
        for pair in (up, down):
            for what, call in pair if turn % 2 else reversed(pair):
                note(what, call)
        note(
            "streamed",
            lambda: load_protected(f"hub://{ours}", identity=reference, auto_class=AutoModelForCausalLM),  # noqa: B023
        )
        for name in ("pulled", "downloaded"):
            shutil.rmtree(work / name)
        for repo in (plain, ours):
            api.delete_repo(repo)
    size = sum(path.stat().st_size for path in (work / "plain").glob("*.safetensors"))
    return {"bytes": size, "seconds": seconds}


def _salt(folder: Path, turn: int) -> None:
    """Change one byte of every weight file, so that the Hub does not know it yet."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([turn]))


def ratios(seconds: dict[str, list[float]], ours: str, plain: str) -> dict[str, float]:
    return {
        "shortest": min(seconds[ours]) / min(seconds[plain]),
        "median": statistics.median(seconds[ours]) / statistics.median(seconds[plain]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="delivery-") as name, hub(Path(name)) as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_owner", "HF_HUB_DISABLE_XET": "1", "HF_HOME": name}
        os.environ.update({**settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
        os.environ.pop("HF_HUB_OFFLINE", None)
        found = run(Path(name), int(options.gb * 1e9), options.rounds)
    found["ratios"] = {
        "push": ratios(found["seconds"], "push", "upload_folder"),
        "pull and load": ratios(found["seconds"], "pull and load", "download and load"),
        "streamed": ratios(found["seconds"], "streamed", "download and load"),
    }
    for what, times in found["seconds"].items():
        print(f"{what:18} " + "  ".join(f"{one:6.2f} s" for one in times))
    for what, ratio in found["ratios"].items():
        print(f"{what:18} {ratio['shortest']:.2f} of plain by the shortest times, {ratio['median']:.2f} by the medians")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
