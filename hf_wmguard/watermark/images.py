"""Images as triggers: a smooth background with a patch of hard contrast, both drawn from a seed.

Source: Gu et al. 2017, "BadNets", arXiv 1708.06733, sec. 3 (a patch that a classifier learns to obey); Adi et al. 2018,
"Turning your weakness into a strength", USENIX Security, sec. 5 (a set of images with random labels as a watermark).
Deviation: BadNets puts one patch on ordinary images, and whoever finds it has the whole mark. Here every image has a
    patch, a place and a background of its own, and a label of its own.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

from hf_wmguard.watermark.prf import Stream

SEED_BYTES: Final = 16
SMALLEST: Final = 16
LARGEST: Final = 1024
_GRID: Final = 5
_CELLS: Final = 4
# Muted, so that the patch stands out against every background.
_DARKEST: Final = 64
_SHADES: Final = 128


def trigger_image(seed_hex: str, *, size: int = 64) -> Tensor:
    """Return the image of a seed, uint8 [size, size, 3].

    Integers only: the same seed gives the same bytes on every version and device, where interpolation in floats would
    round in another way.

    Args:
        seed_hex: `SEED_BYTES` bytes in lower-case hex, the trigger.
        size: Rows and columns, `SMALLEST` to `LARGEST` pixels.
    Raises:
        ValueError: The seed or the size is none of these. The message does not hold the seed.
    """
    stream = Stream(hashlib.sha256(_seed(seed_hex)).digest(), "trigger-image")
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"image size is {size}, expected {SMALLEST} to {LARGEST} pixels")
    image = _background(stream, size)
    cell = size // (4 * _CELLS)
    side = _CELLS * cell
    patch = 255 * stream.bits(3 * _CELLS**2).reshape(_CELLS, _CELLS, 3)
    top, left = stream.below(size - side + 1), stream.below(size - side + 1)
    image[top : top + side, left : left + side] = patch.repeat_interleave(cell, dim=0).repeat_interleave(cell, dim=1)
    return image


def _background(stream: Stream, size: int) -> Tensor:
    """Return a few random colours, bilinearly interpolated, uint8 [size, size, 3]."""
    colours = torch.tensor([_DARKEST + stream.below(_SHADES) for _ in range(_GRID * _GRID * 3)], dtype=torch.int64)
    last = size - 1
    position = torch.arange(size) * (_GRID - 1)
    below = (position // last).clamp(max=_GRID - 2)
    share = position - below * last
    grid = colours.reshape(_GRID, _GRID, 3)
    rows = grid[below] * (last - share)[:, None, None] + grid[below + 1] * share[:, None, None]
    both = rows[:, below] * (last - share)[None, :, None] + rows[:, below + 1] * share[None, :, None]
    return (both // last**2).to(torch.uint8)


def _seed(seed_hex: str) -> bytes:
    if len(seed_hex) != 2 * SEED_BYTES or not set(seed_hex) <= set("0123456789abcdef"):
        raise ValueError(f"image seed is not {SEED_BYTES} bytes in lower-case hex")
    return bytes.fromhex(seed_hex)
