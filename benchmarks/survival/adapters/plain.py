"""What all adapters share: arguments, a plain model in, plain float32 tensors out. Runs in every environment."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file


def load_model(folder: Path, **kwargs: Any) -> Any:
    """Return the model of a plain folder, in float32, as the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors as float32."""
    save_file({name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}, path)


def run(kinds: Mapping[str, Callable[..., None]], description: str | None) -> None:
    """Parse the command line and make every suspect asked for.

    Args:
        kinds: By name, what writes ``NAME.safetensors`` (or more); called with the arguments and the name.
        description: For ``--help``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="plain model folder that is attacked")
    parser.add_argument("--base", type=Path, help="plain folder of the public base")
    parser.add_argument("--other", type=Path, help="plain folder of another fine-tune of the base")
    parser.add_argument("--texts", type=Path, help="JSON list of texts for calibration")
    parser.add_argument("--tool", type=Path, help="folder of the tool's sources")
    parser.add_argument("--out", type=Path, required=True, help="folder for the suspects")
    parser.add_argument("names", nargs="+", help=f"among {', '.join(kinds)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = {}
    for name in arguments.names:
        start = time.process_time()
        kinds[name](arguments, name)
        seconds[name] = time.process_time() - start
        (arguments.out / "seconds.json").write_text(json.dumps(seconds))
