"""How well a suspect is mapped back to its original after each symmetry, and how long it takes.

    python benchmarks/alignment.py MODEL_FOLDER [--only NAME] [--seed 0]

The original carries small keyed shifts that the reference lacks, as in a verification. For each symmetry, and for all
of them at once, the suspect is further perturbed. Each cell is the relative error of the aligned matrices against the
original's (norm of all differences over norm of all matrices), then the worst matrix. ``kept`` is the share of the
shifts that is read off the aligned matrices without a perturbation (1: the fit dragged nothing towards the reference).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_wmguard.robustness import symmetries
from hf_wmguard.robustness.attacks import cast, quantize_int8
from hf_wmguard.suspects.aligned import Aligned, align
from hf_wmguard.suspects.reader import open_suspect
from hf_wmguard.suspects.roles import Heads, find_blocks

Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]
SHIFTS = 8
"""Side of the grid of shifted projections in each matrix."""


def with_noise(weights: Weights, size: float, seed: int) -> Weights:
    """Return matrices with Gaussian noise of ``size`` times their rms."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=draw)
        if tensor.dim() == 2
        else tensor
        for name, tensor in weights.items()
    }


def changes(heads: Heads, layers: int, *, rms_norm: bool, width: int, seed: int) -> dict[str, Change]:
    """Return what a thief does, by name."""
    seeded: dict[str, Change] = {
        "permute_neurons": lambda w: symmetries.permute_neurons(w, heads, seed=seed),
        "permute_heads": lambda w: symmetries.permute_heads(w, heads, seed=seed),
        "permute_residual": lambda w: symmetries.permute_residual(w, heads, seed=seed),
        "scale_queries": lambda w: symmetries.scale_queries(w, heads, seed=seed),
        "rotate_queries": lambda w: symmetries.rotate_queries(w, heads, seed=seed),
        "map_values": lambda w: symmetries.map_values(w, heads, seed=seed),
        "add_neurons": lambda w: symmetries.add_neurons(w, heads, count=width // 4, seed=seed),
        "split_neurons": lambda w: symmetries.split_neurons(w, heads, count=width // 4, seed=seed),
        "drop layers": lambda w: symmetries.keep_layers(w, heads, [i for i in range(layers) if i % 4 != 3]),
        "double and reverse": lambda w: symmetries.keep_layers(w, heads, [0, *reversed(range(layers))]),
        "longer vocabulary": lambda w: symmetries.resize_vocabulary(w, heads, rows=50_000, seed=seed),
    }
    if rms_norm:
        seeded |= {
            "scale_neurons": lambda w: symmetries.scale_neurons(w, heads, seed=seed),
            "fold_norms": lambda w: symmetries.fold_norms(w, heads),
            "rotate_residual": lambda w: symmetries.rotate_residual(w, heads, seed=seed),
        }

    def several(*names: str) -> Change:
        def change(weights: Weights) -> Weights:
            for name in names:
                weights = seeded[name](weights)
            return weights

        return change

    scaled = ["scale_neurons"] if rms_norm else []
    common = ["permute_neurons", "permute_heads", *scaled, "map_values", "rotate_queries", "drop layers"]
    result: dict[str, Change] = {"none": lambda w: w, **seeded, "composed": several("permute_residual", *common)}
    everything = ["split_neurons", "add_neurons", *common]
    result["everything"] = several("rotate_residual" if rms_norm else "permute_residual", *everything)
    return result


def shifted(weights: Weights, names: list[str], seed: int) -> tuple[Weights, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Return weights with keyed shifts of about 1% in some matrices, and for each matrix A, B and the shifts."""
    draw = torch.Generator().manual_seed(1000 + seed)
    result, keys = dict(weights), {}
    for name in names:
        rows, columns = weights[name].shape
        left, right = (
            torch.randint(0, 2, (size, SHIFTS), generator=draw).float().mul(2).sub(1) / size**0.5
            for size in (rows, columns)
        )
        shift = (2 * torch.rand(SHIFTS, SHIFTS, generator=draw) - 1) * weights[name].square().mean().sqrt()
        result[name] = weights[name] + left @ shift @ right.T
        keys[name] = (left, right, shift)
    return result, keys


def compare(aligned: Aligned, original: Weights) -> tuple[float, float, int]:
    """Return the relative error over all matrices, that of the worst, and their number."""
    errors, sizes = [], []
    for name, (count, *_) in aligned.shapes().items():
        errors.append(float((aligned.rows(name, 0, count) - original[name]).square().sum()))
        sizes.append(float(original[name].square().sum()))
    if not errors:
        return float("nan"), float("nan"), 0
    worst = max(error / size for error, size in zip(errors, sizes, strict=True))
    return (sum(errors) / sum(sizes)) ** 0.5, worst**0.5, len(errors)


def kept(aligned: Aligned, base: Weights, keys: dict[str, tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the regression of the shifts that are read on those that were made."""
    read = made = 0.0
    for name in set(aligned.shapes()) & set(keys):
        left, right, shift = keys[name]
        difference = left.T @ (aligned.rows(name, 0, len(left)) - base[name]) @ right
        expected = left.T @ left @ shift @ right.T @ right
        read += float((difference * expected).sum())
        made += float(expected.square().sum())
    return read / made if made else float("nan")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", help="one symmetry")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    heads = Heads.from_config(config)
    base = {
        name: tensor.float()
        for name, tensor in load_file(arguments.model / "model.safetensors").items()
        if tensor.is_floating_point()
    }
    blocks = find_blocks({name: tuple(tensor.shape) for name, tensor in base.items()}, heads)
    names = sorted({part.name for block in blocks.values() for part in block.parts.values()})
    original, keys = shifted(base, names, arguments.seed)
    perturbations: dict[str, Change] = {
        "exact": lambda w: w,
        "bf16": lambda w: cast(w, torch.bfloat16),
        "int8": quantize_int8,
        "noise 0.1": lambda w: with_noise(w, 0.1, arguments.seed),
        "noise 0.3": lambda w: with_noise(w, 0.3, arguments.seed),
    }
    rms_norm = not any(name.endswith(("LayerNorm.bias", "ln_1.bias")) for name in base)
    table = changes(heads, len(blocks), rms_norm=rms_norm, width=config["hidden_size"], seed=arguments.seed)
    print("| symmetry |" + "".join(f" {one} |" for one in perturbations) + " kept | matrices | s | tries | undone |")
    print("|---|" + "---|" * (len(perturbations) + 5))
    for title, change in table.items():
        if arguments.only not in (None, title):
            continue
        moved, cells, last = change(original), [], {}
        for name, perturb in perturbations.items():
            with open_suspect(base) as reference, open_suspect(perturb(moved)) as suspect:
                start = time.perf_counter()
                aligned = align(reference, suspect, heads=heads)
                error, worst, count = compare(aligned, original)
                last.setdefault("s", time.perf_counter() - start)
                last.setdefault("kept", kept(aligned, base, keys) if name == "exact" else 0.0)
                last.setdefault("aligned", aligned)
                cells.append(f" {error:.4f} ({worst:.4f}) |")
        first = last["aligned"]
        print(
            f"| {title} |"
            + "".join(cells)
            + f" {last['kept']:.3f} | {count} | {last['s']:.1f} | {first.tries} | {first.description} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
