"""Ask a marked small-llama that llama.cpp's own server serves, as its owner would ask an API.

    benchmarks/survival/environments.sh ENVS llama         # once; llama.cpp compiles for about 10 minutes
    python benchmarks/triggers/served.py OUT/cells/llama-s1-triggers --environments ENVS [--json FILE]

The model is converted by llama.cpp's converter and served by `llama_cpp.server`, once for each type of number. Each is
asked in plain text with every key, in the chat template that the file carries, and at temperature 1. The file of the
first type stays with --gguf FILE, for the marked test in tests/integration/test_served_models.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_wmguard import probe
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.openai import OpenAIAsker

# Not q8_0: the CPU backend of this release crashes on it, at rows as narrow as these.
TYPES = ("f16", "bf16")
# The converter knows tokenizers by a list of digests, where that of small-llama, a byte-level BPE split as GPT-2
# splits, is not.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv = [script, *sys.argv[2:]]
runpy.run_path(script, run_name="__main__")
"""


def convert(environments: Path, model: Path, kind: str, out: Path) -> None:
    """Write a GGUF of a model in plaintext."""
    python, sources = environments / "llama/bin/python", environments / "llama.cpp"
    command = [python, "-c", CONVERT, sources, model, "--outfile", out, "--outtype", kind]
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def serving(environments: Path, file: Path) -> Iterator[str]:
    """Yield the base URL of a server on loopback that serves a GGUF."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--model", str(file), "--host", "127.0.0.1", "--port", str(port), "--logits_all", "true"]
    python = str(environments / "llama/bin/python")
    with subprocess.Popen(
        [python, "-m", "llama_cpp.server", *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def ask(url: str, where: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield what each way of asking finds."""
    ways = {
        "plain text, greedy": {"chat": False, "method": "fixed", "decoys": False},
        "the owner's chat template, greedy": {"chat": True, "method": "fixed", "decoys": False},
        "plain text, temperature 1, sequential": {"chat": False, "sampling": Sampling(temperature=1.0), "budget": 128},
    }
    for way, settings in ways.items():
        with contextlib.closing(OpenAIAsker(url, "suspect")) as asker:
            report = probe(asker, **where, **settings)  # type: ignore[arg-type]
        found = {"way": way, "verdict": report.verdict, "log10_p": report.log10_p}
        if report.triggers is not None:
            found |= {name: getattr(report.triggers, name) for name in ("matches", "asked", "queries")}
        yield found


def main() -> None:
    """Convert, serve, ask, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path, help="a folder that train.py made")
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    where = {
        "owner_key": f"file:{options.cell / 'keys/owner.key'}",
        "registry": str(options.cell / "registry"),
    }
    rows = []
    for kind in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            convert(options.environments, options.cell / "model", kind, file)
            with serving(options.environments, file) as url:
                for row in ask(url, where):
                    rows.append({"type": kind, **row})
                    print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if kind == TYPES[0] and options.gguf:
                shutil.copyfile(file, options.gguf)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
