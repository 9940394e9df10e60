"""Metric modules for `evaluate`, loaded by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_wmguard.errors import ConfigError

_FOLDER = Path(__file__).parent


def load_metric(name: str) -> Any:
    """Return an `evaluate` metric that this package ships.

    Raises:
        ConfigError: No metric of that name.
    """
    import evaluate

    path = _FOLDER / name / f"{name}.py"
    known = sorted(module.parent.name for module in _FOLDER.glob("*/*.py"))
    if name not in known:
        raise ConfigError(f"no metric {name!r}", hint=f"known: {', '.join(known)}")
    return evaluate.load(str(path))
