"""A sharded bf16 checkpoint with the shapes of an 8B Llama, streamed to the disk: what the benchmarks of size read.

python benchmarks/big_checkpoint.py OUT_DIR [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

HIDDEN, INNER, KEYS, VOCABULARY = 4096, 14336, 1024, 128256
SHARDS = 4
_BLOCK_WEIGHTS = 1 << 24


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of all tensors, 8.03e9 weights with 32 layers."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        yield f"{block}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.self_attn.k_proj.weight", (KEYS, HIDDEN)
        yield f"{block}.self_attn.v_proj.weight", (KEYS, HIDDEN)
        yield f"{block}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield f"{block}.input_layernorm.weight", (HIDDEN,)
        yield f"{block}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def write_checkpoint(folder: Path, layers: int = 32) -> int:
    """Write the checkpoint; return its size in bytes. One block of Gaussian weights is written again and again."""
    folder.mkdir(parents=True)
    tensors = list(shapes(layers))
    total = 2 * sum(math.prod(shape) for _, shape in tensors)
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(SHARDS)]
    before = 0
    for name, shape in tensors:
        parts[SHARDS * before // total].append((name, shape))
        before += 2 * math.prod(shape)
    weights = (0.02 * torch.randn(_BLOCK_WEIGHTS, generator=torch.Generator().manual_seed(0))).bfloat16()
    block = memoryview(weights.view(torch.uint8).numpy().data)
    weight_map = {}
    for index, part in enumerate(parts):
        name = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        _write_shard(folder / name, part, block)
        weight_map |= {tensor: name for tensor, _ in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    return total


def _write_shard(path: Path, part: list[tuple[str, tuple[int, ...]]], block: memoryview) -> None:
    header, end = {}, 0
    for name, shape in part:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # An odd stride, so that no two matrices are the same.
        done, place = 0, 0
        while done < end:
            piece = block[place : place + min(end - done, len(block) - place)]
            file.write(piece)
            done += len(piece)
            place = (place + len(piece) + 2 * 4999) % len(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    print(f"{write_checkpoint(options.out, options.layers):,} bytes")


if __name__ == "__main__":
    main()
