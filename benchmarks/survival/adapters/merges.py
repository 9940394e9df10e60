"""mergekit: the owner's model merged with its base or with another fine-tune, at the owner's weight in the name."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import plain
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

METHODS = ("linear", "slerp", "ties", "dare_ties")
WEIGHTS = (0.5, 0.3, 0.1)
DENSITY = 0.5


def configuration(method: str, partner: str, weight: float, arguments: Namespace) -> dict[str, Any]:
    """Return mergekit's YAML as a dictionary.

    With the base as partner, methods that add deltas to the base get the owner's delta alone, times the weight; with
    another fine-tune they get both, times the weight and its complement.
    """
    owner, base, other = (str(path) for path in (arguments.model, arguments.base, arguments.other))
    second = base if partner == "base" else other
    common: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    if method == "slerp":
        models = [{"model": second}, {"model": owner}]
        return common | {"base_model": second, "models": models, "parameters": {"t": weight}}
    shares = [(owner, weight), (second, 1 - weight)]
    if method == "linear":
        return common | {"models": [{"model": path, "parameters": {"weight": share}} for path, share in shares]}
    if partner == "base":
        shares = shares[:1]
    models = [{"model": path, "parameters": {"weight": share, "density": DENSITY}} for path, share in shares]
    return common | {"base_model": base, "models": models, "parameters": {"normalize": False}}


def merge(arguments: Namespace, name: str, *, method: str, partner: str, weight: float) -> None:
    """Run one merge and keep its weights."""
    config = MergeConfiguration.model_validate(configuration(method, partner, weight, arguments))
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=1)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        run_merge(config, folder, options)
        plain.save_tensors(
            dict(plain.load_model(Path(folder)).named_parameters()), arguments.out / f"{name}.safetensors"
        )


KINDS = {
    f"merge_{method}_{partner}_{weight}": partial(merge, method=method, partner=partner, weight=weight)
    for method in METHODS
    for partner in ("base", "other")
    for weight in WEIGHTS
}

if __name__ == "__main__":
    plain.run(KINDS, __doc__)
