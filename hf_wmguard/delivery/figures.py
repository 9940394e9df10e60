"""The picture in a model card: what of a repository is ciphertext, and that its bytes tell nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_KINDS = {
    "ciphertext": ("encrypted, signed", "#1f4e79"),
    "signed": ("plain, signed", "#2a7f62"),
    "plain": ("plain, unsigned", "#d1662a"),
}
_GREY = "#9aa5b1"
_DPI = 110
MAX_SAMPLE_BYTES = 16 << 20
MIN_SAMPLE_BYTES = 64 << 10


def draw_contents(kinds: Mapping[str, tuple[str, int]], encrypted: Sequence[Path]) -> bytes | None:
    """Return a PNG of two panels, or None where matplotlib is not installed.

    On the left the bytes of each kind of file; on the right how often each byte value occurs in the ciphertext, beside
    what chance gives.

    Args:
        kinds: By file name: ``ciphertext``, ``signed`` or ``plain``, and its size in bytes.
        encrypted: The ciphertext files, of which at most `MAX_SAMPLE_BYTES` are read.
    """
    try:
        # Not through pyplot, which would choose a backend for the whole process and keep every figure.
        from matplotlib.figure import Figure
    except ImportError:
        return None
    counts = count_bytes(encrypted)
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    figure.set_facecolor("white")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.15]})
    _draw_sizes(left, kinds)
    _draw_histogram(right, counts)
    buffer = io.BytesIO()
    # The same save gives the same bytes: a push with nothing new must not differ by a version of matplotlib.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def count_bytes(encrypted: Sequence[Path]) -> list[int]:
    """Return how often each byte value occurs in the tensors of ciphertext files, up to `MAX_SAMPLE_BYTES` in all."""
    import numpy as np

    counts, left = np.zeros(256, dtype=np.int64), MAX_SAMPLE_BYTES
    for path in encrypted:
        with path.open("rb") as file:
            # What stands before the tensors is JSON, not ciphertext.
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                left -= len(block)
                counts += np.bincount(np.frombuffer(block, dtype=np.uint8), minlength=256)
    return [int(count) for count in counts]


def entropy_bits(counts: Sequence[int]) -> float:
    """Return the entropy of a byte in bits, 0 to 8."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


def _draw_sizes(axes: Any, kinds: Mapping[str, tuple[str, int]]) -> None:
    total = sum(size for _, size in kinds.values()) or 1
    rows = [
        (label, colour, [size for of, size in kinds.values() if of == kind]) for kind, (label, colour) in _KINDS.items()
    ]
    rows = [row for row in rows if row[2]]
    axes.barh(
        range(len(rows)), [max(1, sum(sizes)) for _, _, sizes in rows], color=[row[1] for row in rows], height=0.6
    )
    axes.set_xscale("log")
    # Room for the words behind the longest bar.
    axes.set_xlim(100, max(10_000, total) ** 1.45)
    axes.minorticks_off()
    for place, (_, _, sizes) in enumerate(rows):
        files = f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}"
        share = f"{100 * sum(sizes) / total:.3g} %"
        axes.annotate(
            f"{_size(sum(sizes))} ({share}), {files}",
            (max(sum(sizes), 100), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("bytes (logarithmic)", fontsize=9)
    axes.set_title("What lies in this repository", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_histogram(axes: Any, counts: Sequence[int]) -> None:
    total = sum(counts)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Byte values in the ciphertext", fontsize=10, loc="left")
    axes.set_xlabel("byte value", fontsize=9)
    axes.tick_params(labelsize=8)
    if total < MIN_SAMPLE_BYTES:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "too few bytes to judge", ha="center", va="center", fontsize=9, transform=axes.transAxes)
        return
    share = [100 * 256 * count / total for count in counts]
    # Three standard deviations of a count that chance gives, in the same units.
    spread = 300 * math.sqrt(255 / total)
    measured = f"measured in {_size(total)}"
    axes.axhspan(100 - spread, 100 + spread, color=_GREY, alpha=0.3, lw=0, label="chance, within 3 standard deviations")
    axes.stairs(share, [value - 0.5 for value in range(257)], fill=True, color="#1f4e79", label=measured)
    axes.set_xlim(-1, 256)
    axes.set_xticks([0, 64, 128, 192, 255])
    axes.set_ylim(0, max(140.0, 1.1 * max(share)))
    axes.set_ylabel("% of an even share", fontsize=9)
    axes.set_title(
        f"Byte values in the ciphertext: entropy {entropy_bits(counts):.4f} of 8 bits", fontsize=10, loc="left"
    )
    axes.legend(fontsize=8, loc="upper right", frameon=False, ncols=2, borderaxespad=0.2)


def _size(size_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes} bytes"
