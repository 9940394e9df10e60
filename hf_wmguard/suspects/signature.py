"""Read one record's signature out of a suspect, undoing what can be undone without looking at a dither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import CarrierKey, Reading, try_projections

_STRETCHED = 0.1
"""Root mean square of the log ratio of norms from which rows or columns count as scaled; training moves it by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to read a suspect. Every attempt is a test that the p-value is corrected for.

    Args:
        alignment: What was undone: ``none``, ``norms`` or what the alignment with the original says.
        reading: What was read.
        bytes_read: Bytes of weights that were read for it.
    """

    alignment: str
    reading: Reading
    bytes_read: int


def read_attempts(
    record: WatermarkRecord, keys: Sequence[CarrierKey], tile_of: Callable[[Carrier], Tensor | None]
) -> list[Attempt]:
    """Return the readings of a suspect: as it is, and with its row and column norms set back if they were scaled.

    Args:
        record: The private record.
        keys: Its carrier keys.
        tile_of: Gives a carrier's tile, any float dtype [rows, columns], or None where there is none.
    """
    plain: list[Tensor | None] = []
    bytes_read, stretch = 0, 0.0
    for key, baseline in zip(keys, record.baselines, strict=True):
        tile = tile_of(key.carrier)
        plain.append(try_projections(tile, key))
        bytes_read += 0 if tile is None else tile.numel() * tile.element_size()
        if tile is not None and plain[-1] is not None:
            stretch = max(stretch, baseline.stretch(tile, key.carrier))
    attempts = [Attempt(alignment="none", reading=Reading.of(keys, plain), bytes_read=bytes_read)]
    if stretch > _STRETCHED:
        # The tiles are read again: setting norms back takes longer than all the rest, and is seldom called for.
        scaled = [
            None if projections is None else _rescaled(baseline, tile_of(key.carrier), key)
            for key, baseline, projections in zip(keys, record.baselines, plain, strict=True)
        ]
        attempts.append(Attempt(alignment="norms", reading=Reading.of(keys, scaled), bytes_read=bytes_read))
    return attempts


def _rescaled(baseline: Baseline, tile: Tensor | None, key: CarrierKey) -> Tensor | None:
    return None if tile is None else try_projections(baseline.rescale(tile, key.carrier), key)
