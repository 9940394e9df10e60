"""What `secrets` draws in the tests: fixed by a seed and by the name of the test or fixture that draws.

Keys, salts and seeds decide which weights carry a signature and which answers a trigger set asks for, so that a tiny
model learns more of one key's set than of another's. Fixed, a test that fails here fails everywhere. Another
``WMGUARD_TEST_SEED`` is another draw of every key; ``scripts/test`` under a few of them shows what passes by luck.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SEED = os.environ.get("WMGUARD_TEST_SEED", "0")

# Below this it is the name of a temporary file: those of two runs in one folder must differ.
_KEY_BYTES = 16

_random_bytes = secrets.token_bytes


@contextmanager
def fixed_draws(name: str) -> Iterator[None]:
    """Let `secrets` draw what the seed and ``name`` say, the same in every run, no two draws alike."""
    process, numbers = os.getpid(), itertools.count()

    def token_bytes(nbytes: int | None = None) -> bytes:
        size = 32 if nbytes is None else nbytes
        # A forked process would draw again what its parent draws next.
        if size < _KEY_BYTES or os.getpid() != process:
            return _random_bytes(size)
        return hashlib.shake_256(f"{SEED}\n{name}\n{next(numbers)}".encode()).digest(size)

    def token_hex(nbytes: int | None = None) -> str:
        return token_bytes(nbytes).hex()

    def randbits(k: int) -> int:
        return int.from_bytes(token_bytes(max(_KEY_BYTES, -(-k // 8)))) & ((1 << k) - 1)

    with pytest.MonkeyPatch.context() as patch:
        for function in (token_bytes, token_hex, randbits):
            patch.setattr(secrets, function.__name__, function)
        yield
