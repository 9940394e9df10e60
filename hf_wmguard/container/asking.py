"""Asking a person for a passphrase: only the command line can, a library has no terminal of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hf_wmguard.errors import ConfigError

Asker = Callable[[str, bool], str]

_asker: ContextVar[Asker | None] = ContextVar("asker", default=None)


@contextmanager
def asking(asker: Asker) -> Iterator[None]:
    """Let ``passphrase:prompt`` ask in this block.

    Args:
        asker: Called with what is asked for, and whether it is new and must be typed twice; returns the answer.
    """
    token = _asker.set(asker)
    try:
        yield
    finally:
        _asker.reset(token)


def ask(what: str, new: bool) -> str:
    """Return what a person types.

    Raises:
        ConfigError: Nobody can be asked.
    """
    asker = _asker.get()
    if asker is None:
        raise ConfigError(
            f"nobody can be asked for a {what} here", hint="write passphrase:env:NAME or passphrase:file:PATH"
        )
    return asker(what, new)
