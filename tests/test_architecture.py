"""The rule of the house, read from the syntax tree of every module: who imports whom, and what no module does.

A room imports only from rooms above it, so that the pure and the dangerous parts can be read on their own:
the watermark knows no files, the container knows no tensors.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_wmguard

PACKAGE = Path(hf_wmguard.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# From the most trusted to the least; rooms in one tuple never import each other.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("canonical", "hardening"),
    ("atomic",),
    ("folders",),
    ("config",),
    ("reports",),
    ("keys",),
    ("stores",),
    ("watermark", "container", "evidence"),
    ("suspects",),
    ("delivery", "storage", "probing"),
    ("metrics",),
    ("protect", "rewrapping"),
    ("verdicts",),
    ("verification", "embedding", "protection", "decryption"),
    ("loading",),
    ("training",),
    ("robustness",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
BASE = {"errors", "canonical", "keys"}
# What a room may import from outside the standard library, where that is part of the rule.
ONLY = {
    "errors": set(),
    "canonical": set(),
    "hardening": set(),
    "atomic": set(),
    "folders": set(),
    "config": {"yaml"},
    "reports": set(),
    "keys": {"cryptography"},
    "stores": set(),
    "delivery": set(),
    "storage": set(),
    "watermark": {"torch"},
    "container": {"cryptography"},
    "evidence": {"cryptography"},
    "robustness": {"torch", "transformers", "peft", "numpy", "gguf", "matplotlib", "pyarrow"},
}
# Each keeper of keys has one module, which alone imports its client, and each store one in either room.
CLIENTS = {
    "stores/hub.py": {"huggingface_hub"},
    "stores/hub_errors.py": {"huggingface_hub", "httpx", "httpx2"},
    "stores/s3.py": {"boto3", "botocore"},
    "delivery/hub.py": {"huggingface_hub"},
    "delivery/hub_client.py": {"huggingface_hub"},
    "delivery/hub_repo.py": {"huggingface_hub"},
    "delivery/card.py": {"huggingface_hub", "yaml"},
    "delivery/figures.py": {"matplotlib", "numpy"},
    "delivery/hub_download.py": {"huggingface_hub"},
    "delivery/s3.py": {"boto3", "botocore"},
    "storage/aws.py": {"boto3", "botocore"},
    "storage/audit_hub.py": {"huggingface_hub"},
    "container/providers/awskms.py": {"boto3", "botocore"},
    "container/providers/azurekv.py": {"azure"},
    "container/providers/gcpkms.py": {"google", "requests"},
    "container/providers/keyring.py": {"keyring"},
    "container/providers/pkcs11.py": {"pkcs11"},
    "container/providers/vault.py": {"hvac", "requests", "urllib3"},
}
TRANSFORMERS_ROOMS = {"probing", "loading", "training", "robustness"}
# Attacks that only touch weights: torch, and nothing of ours but each other.
PURE = {
    f"robustness/{name}.py" for name in ("attacks", "quantization", "calibrated", "merging", "compression", "structure")
}
# The report of an unsaved run comes when the interpreter exits, after logging has been shut down.
PRINTING = {"cli", "training/callback.py"}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node except what stands under ``if TYPE_CHECKING``, which is never executed."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from run_time_nodes(node)


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything a module imports, also inside functions."""
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_faults(path: str, source: str) -> list[str]:
    """Return what a module at ``path``, relative to the package, imports against the rule."""
    faults = []
    room = room_of(path)
    for name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        if not top:
            faults.append(f"{path}: relative import of {name}")
        elif top == "hf_wmguard":
            faults += own_import_faults(path, room, rest)
        elif top not in sys.stdlib_module_names:
            if top not in ({"torch"} if path in PURE else CLIENTS.get(path) or ONLY.get(room, {top})):
                faults.append(f"{path}: {room} imports {top}")
            if top == "transformers" and room not in TRANSFORMERS_ROOMS:
                faults.append(f"{path}: {room} imports transformers")
    return faults


def own_import_faults(path: str, room: str, rest: str) -> list[str]:
    other = rest.split(".")[0]
    if path == "__init__.py" or other not in RANK:
        return [f"{path}: imports hf_wmguard.{rest} when it is imported itself"]
    if other == room:
        return []
    if RANK[other] >= RANK[room]:
        return [f"{path}: {room} imports {other}, which stands beside or below it"]
    if room == "watermark" and other not in BASE:
        return [f"{path}: the watermark imports {other}"]
    return [f"{path} is pure torch"] if path in PURE else []


def habit_faults(path: str, source: str) -> list[str]:
    """Return what a module does that no module does."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            # Asserts are gone under python -O, and a check that can be switched off is none.
            faults.append(f"{where}: assert")
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or any(isinstance(one, ast.Name) and one.id == "Exception" for one in ast.walk(node.type))
        ):
            faults.append(f"{where}: catches everything")
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and not {path, room_of(path)} & PRINTING
        ):
            faults.append(f"{where}: print")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            faults.append(f"{where}: star import")
    if Path(path).name == "utils.py":
        faults.append(f"{path}: a module is named after what it holds")
    if source.count("\n") > MAX_LINES:
        faults.append(f"{path}: more than {MAX_LINES} lines")
    return faults


def relative(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_imports_point_upwards(module: Path) -> None:
    path = relative(module)
    assert path == "__init__.py" or room_of(path) in RANK, "a new room needs its place in ROOMS"
    assert import_faults(path, module.read_text()) == []


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_no_module_does_what_none_does(module: Path) -> None:
    assert habit_faults(relative(module), module.read_text()) == []


def test_callback_prints_only_at_exit() -> None:
    tree = ast.parse((PACKAGE / "training/callback.py").read_text())
    printing = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == ["_report_unsaved"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("watermark/x.py", "import transformers"),
        ("watermark/x.py", "import numpy as np"),
        ("watermark/x.py", "from hf_wmguard.container.files import ProtectedFile"),
        ("watermark/x.py", "from hf_wmguard.atomic import write_atomic"),
        ("container/x.py", "import torch"),
        ("container/x.py", "def f():\n    from torch import Tensor"),
        ("container/x.py", "import boto3"),
        ("container/providers/vault.py", "def f():\n    import boto3"),
        ("container/x.py", "from hf_wmguard.evidence.manifest import Manifest"),
        ("evidence/x.py", "import torch.nn as nn"),
        ("evidence/x.py", "from hf_wmguard.watermark.record import WatermarkRecord"),
        ("errors.py", "from hf_wmguard.canonical import canonical_json"),
        ("keys.py", "import hf_wmguard.protect"),
        ("suspects/x.py", "from hf_wmguard import protect"),
        ("verification.py", "import transformers"),
        ("cli/x.py", "from transformers import AutoModel"),
        ("protect.py", "from hf_wmguard.loading import load_protected"),
        ("robustness/attacks.py", "from hf_wmguard.errors import UsageError"),
        ("robustness/merging.py", "import numpy"),
        ("robustness/suite.py", "import datasets"),
        ("training/x.py", "from . import mark"),
        ("training/x.py", "from hf_wmguard import load_protected"),
        ("__init__.py", "from hf_wmguard.config import WatermarkConfig"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, source: str) -> None:
    assert import_faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("watermark/x.py", "import math, torch\nfrom hf_wmguard.keys import OwnerKey"),
        ("container/x.py", "from hf_wmguard.keys import read_reference\nimport hashlib"),
        ("container/providers/vault.py", "def f():\n    import hvac"),
        ("training/x.py", "import transformers.modeling_utils\nfrom hf_wmguard.loading import read_state_dict"),
        ("verification.py", "from hf_wmguard.protect import Committed\nimport torch"),
        ("__init__.py", "if TYPE_CHECKING:\n    from hf_wmguard.config import WatermarkConfig"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert import_faults(path, source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("keys.py", "assert True"),
        ("keys.py", "try:\n    pass\nexcept:\n    pass"),
        ("keys.py", "try:\n    pass\nexcept Exception:\n    pass"),
        ("keys.py", "try:\n    pass\nexcept (OSError, Exception) as error:\n    pass"),
        ("keys.py", "def f():\n    print(1)"),
        ("training/mark.py", "print(1)"),
        ("keys.py", "from os import *"),
        ("cli/utils.py", ""),
        ("keys.py", "\n" * (MAX_LINES + 1)),
    ],
)
def test_a_forbidden_habit_is_seen(path: str, source: str) -> None:
    assert habit_faults(path, source)


def test_allowed_habits_are_not() -> None:
    assert habit_faults("cli/main.py", "print(1)") == []
    assert habit_faults("keys.py", "try:\n    pass\nexcept BaseException:\n    raise\n") == []
