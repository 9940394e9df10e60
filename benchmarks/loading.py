"""Time and peak memory of every way to load a model, plain and protected, each in a process of its own.

    python benchmarks/loading.py --megabytes 1000

A generated bfloat16 causal LM is saved twice, plain and protected; its files are read once before, so that all reads
come from the page cache. Peak is the growth of the resident set over what the imports left, in sizes of the model.
"plain, mapped" leaves the weights in the file until they are used; "plain, owned" copies them, as every other way does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hf_wmguard.loading
from hf_wmguard.config import ProtectionConfig, WatermarkConfig
from hf_wmguard.container.recipients import generate_identity, load_identity
from hf_wmguard.keys import OwnerKey, write_key_pair
from hf_wmguard.protect import ProtectedWriter
from hf_wmguard.training.saving import weights_go_to

WAYS = (
    "plain, mapped",
    "plain, owned",
    "load_protected",
    "load_protected, digests checked",
    "load_protected, float32",
    "from_pretrained",
    "eager state dict",
)
HIDDEN = 1024


def make_model(megabytes: int) -> LlamaForCausalLM:
    """Return a bfloat16 model of about so many megabytes."""
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    layers = max(1, (megabytes * 500_000 - 8000 * HIDDEN) // layer)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.tie_weights()
    return model


def make_folders(root: Path, megabytes: int, shard_size: str) -> int:
    """Save the model plain and protected, and return its size in bytes."""
    OwnerKey.generate().write(root / "owner.key")
    identity = generate_identity()
    write_key_pair(root / "inference.key", identity.to_text().encode(), identity.recipient().to_text().encode())
    config = WatermarkConfig(
        model_id="acme/benchmark",
        owner_key=f"file:{root / 'owner.key'}",
        registry=str(root / "registry"),
        protection=ProtectionConfig(recipients=(f"file:{root / 'inference.key.pub'}",)),
    )
    model = make_model(megabytes)
    model.save_pretrained(root / "plain", max_shard_size=shard_size)
    with ProtectedWriter(root / "protected", config=config, owner=OwnerKey.load(config.owner_key)) as writer:
        with weights_go_to(writer.add, model):
            model.save_pretrained(writer.staging, max_shard_size=shard_size)
        writer.finish(state="pending")
    return sum(path.stat().st_size for path in (root / "plain").glob("*.safetensors"))


def load(root: Path, way: str) -> torch.nn.Module:
    """Load one of the two folders."""
    identity, plain, protected = f"file:{root / 'inference.key'}", root / "plain", root / "protected"
    if way.startswith("plain"):
        model = AutoModelForCausalLM.from_pretrained(plain)
        if way == "plain, owned":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model
    if way == "from_pretrained":
        os.environ["WMGUARD_IDENTITY"] = identity
        return AutoModelForCausalLM.from_pretrained(protected)
    if way == "eager state dict":
        tensors = hf_wmguard.loading.read_state_dict(protected, (load_identity(identity),))
        return LlamaForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(plain), state_dict=tensors, dtype="auto"
        )
    changes = {"dtype": torch.float32} if way.endswith("float32") else {}
    return hf_wmguard.loading.load_protected(
        protected,
        identity=identity,
        auto_class=AutoModelForCausalLM,
        check_digests=way.endswith("digests checked"),
        **changes,
    )


def peak_bytes() -> int:
    """Return the largest resident set so far; not from getrusage, which also counts the parent's before the exec."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def measure(root: Path, way: str) -> dict[str, float]:
    """Load once in this process."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for path in root.rglob("*.safetensors"):
        path.read_bytes() if path.stat().st_size < 1 << 20 else _touch(path)
    before, start = peak_bytes(), time.perf_counter()
    model = load(root, way)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes() - before, "parameters": sum(1 for _ in model.parameters())}


def _touch(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--max-shard-size", default="500MB")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run and the largest peak count")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("ROOT", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make_folders(Path(folder), args.megabytes, args.max_shard_size)
        results = {way: [] for way in args.ways}
        # Interleaved, so that a busy moment of the machine does not hit one way alone.
        for _ in range(args.repeats):
            for way in args.ways:
                command = [sys.executable, __file__, "--measure", folder, way]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
    table = {
        way: {
            "seconds": min(run["seconds"] for run in runs),
            "gigabytes_per_second": size / 1e9 / min(run["seconds"] for run in runs),
            "peak_in_models": max(run["peak_bytes"] for run in runs) / size,
        }
        for way, runs in results.items()
    }
    if args.json:
        print(json.dumps({"size_bytes": size, "ways": table}))
        return
    print(f"{size / 1e9:.2f} GB of bfloat16, {args.repeats} runs\n")
    print(f"| {'way':32} | {'seconds':>8} | {'GB/s':>5} | {'peak, x model':>13} |")
    for way, row in table.items():
        print(
            f"| {way:32} | {row['seconds']:8.2f} | {row['gigabytes_per_second']:5.2f} | {row['peak_in_models']:13.2f} |"
        )


if __name__ == "__main__":
    main()
