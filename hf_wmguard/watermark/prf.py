"""Keyed randomness: the same bytes on every version, device and platform.

No framework generator is used, because their streams change between releases and devices, while a mark must
be readable years later. A stream is SHAKE-256 in counter mode over a 32-byte key and a label.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_BLOCK_BYTES = 1 << 16
_SHORT_BYTES = 512
_KEY_BYTES = 32


class Stream:
    """A deterministic stream of uniform values for one key and one label.

    Each draw moves the stream on; two streams of the same key and different labels are independent.

    Args:
        key: 32 bytes, a subkey that is used for nothing else.
        label: Parts that name the use. They are encoded as a JSON list, so that no two lists collide.
    Raises:
        ValueError: The key is not 32 bytes.
    Source: SHAKE-256, FIPS 202, sec. 6.2.
    """

    __slots__ = ("__buffer", "__counter", "__offset", "__prefix")

    def __init__(self, key: bytes, *label: str | int) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"stream key has {len(key)} bytes, expected {_KEY_BYTES}")
        text = json.dumps(["hf-wmguard/1/stream", *label], separators=(",", ":")).encode()
        # Key and label are both of known length before the counter, so that no (key, label, counter) can be
        # confused with another.
        self.__prefix = key + len(text).to_bytes(8, "big") + text
        self.__counter = 0
        # Most streams are short: the first block is made small, and whole only when more of it is asked for.
        # SHAKE's short output is the beginning of its long one, so that the bytes are the same.
        self.__buffer = self.__block(0, _SHORT_BYTES)
        self.__offset = 0

    def __block(self, counter: int, size_bytes: int) -> bytes:
        return hashlib.shake_256(self.__prefix + counter.to_bytes(8, "big")).digest(size_bytes)

    def bytes(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if self.__offset + count > len(self.__buffer) == _SHORT_BYTES:
            self.__buffer = self.__block(0, _BLOCK_BYTES)
        parts = [self.__buffer[self.__offset : self.__offset + count]]
        have, self.__offset = len(parts[0]), self.__offset + len(parts[0])
        while have < count:
            self.__counter += 1
            self.__buffer = self.__block(self.__counter, _BLOCK_BYTES)
            parts.append(self.__buffer[: count - have])
            have, self.__offset = have + len(parts[-1]), len(parts[-1])
        return b"".join(parts)

    def bits(self, count: int) -> Tensor:
        """Return uniform bits, uint8 [count]."""
        packed = torch.frombuffer(bytearray(self.bytes(max(1, (count + 7) // 8))), dtype=torch.uint8)
        shifts = torch.arange(8, dtype=torch.uint8)
        return ((packed[:, None] >> shifts) & 1).flatten()[:count].contiguous()

    def signs(self, rows: int, columns: int) -> Tensor:
        """Return uniform signs, float32 [rows, columns] of -1 and +1."""
        return (1.0 - 2.0 * self.bits(rows * columns).float()).reshape(rows, columns)

    def uniform(self, count: int) -> Tensor:
        """Return uniform values in [0, 1) with 53 random bits each, float64 [count]."""
        words = array("q", self.bytes(8 * count))
        if sys.byteorder == "big":
            words.byteswap()
        raw = torch.tensor(words, dtype=torch.int64)
        return ((raw >> 11) & ((1 << 53) - 1)).double() * 2.0**-53

    def below(self, bound: int) -> int:
        """Return a uniform integer in [0, bound), without modulo bias (rejection sampling).

        Raises:
            ValueError: The bound is not between 1 and 2^32.
        """
        if not 1 <= bound <= 1 << 32:
            raise ValueError(f"bound is {bound}, expected 1 to 2^32")
        limit = (1 << 64) - (1 << 64) % bound
        while True:
            value = int.from_bytes(self.bytes(8), "big")
            if value < limit:
                return value % bound

    def choice(self, items: Sequence[T]) -> T:
        """Return one of the items, each as likely as any other."""
        return items[self.below(len(items))]

    def permutation(self, count: int) -> list[int]:
        """Return a uniform permutation of 0 .. count-1 (Fisher-Yates)."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def __repr__(self) -> str:
        return "Stream(<secret>)"
