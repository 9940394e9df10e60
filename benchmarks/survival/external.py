"""Start the adapters, each in its own environment, on one attacked model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ADAPTERS = {"quant": "quantizers.py", "gptq": "gptq.py", "merge": "merges.py", "llama": "gguf_files.py"}
HERE = Path(__file__).resolve().parent
LIMIT_S = 1_800


class ToolError(Exception):
    """An adapter stopped; the message ends with what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Where the environments are.

    Args:
        folder: As ``environments.sh`` made it.
    """

    folder: Path

    def has(self, tool: str) -> bool:
        """Return whether the environment of a tool is there."""
        return (self.folder / tool / "bin" / "python").exists()

    def run(self, tool: str, names: Sequence[str], *, out: Path, **paths: Path) -> dict[str, float]:
        """Make the suspects of one tool; return the CPU seconds of each.

        Raises:
            ToolError: The adapter failed; what it made before that is there.
        """
        out.mkdir(parents=True, exist_ok=True)
        if tool == "llama":
            paths["tool"] = self.folder / "llama.cpp"
        options = [text for key, path in paths.items() for text in (f"--{key}", str(path))]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Extensions that a library compiles on first use look for ninja beside the interpreter.
        environment["PATH"] = f"{self.folder / tool / 'bin'}:{environment['PATH']}"
        done = subprocess.run(
            [self.folder / tool / "bin" / "python", HERE / "adapters" / ADAPTERS[tool], "--out", out, *options, *names],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise ToolError(f"{tool} {' '.join(names)}: exit {done.returncode}\n{done.stderr[-1500:]}")
        seconds: dict[str, float] = json.loads((out / "seconds.json").read_text())
        return seconds
