"""The owner's original as it would be without the mark: what a suspect may safely be aligned to.

Aligned to the marked weights themselves, an innocent model of the same shape would be dragged towards the mark: a
least-squares map has parameters enough to copy some of it. Here every tile's projections are first set back to the
baseline, which was measured before marking; what is left is independent of the dithers, and so is the alignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_wmguard.errors import FormatError
from hf_wmguard.suspects.locate import Layout
from hf_wmguard.suspects.sources import Suspect
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import CarrierKey


class Unmarked(Suspect):
    """A suspect of the same names and shapes as the original, without the mark of one record.

    Args:
        original: The owner's own model, marked or not.
        record: The private record.
        keys: Its carrier keys.
    Raises:
        FormatError: The original lacks a carrier, or holds it fused or transposed.
    """

    def __init__(self, original: Suspect, record: WatermarkRecord, keys: Sequence[CarrierKey]) -> None:
        self._original = original
        self.config = original.config
        layout = Layout(original)
        self._marks: dict[str, tuple[CarrierKey, Baseline]] = {}
        for key, baseline in zip(keys, record.baselines, strict=True):
            location = layout.locate(key.carrier.name, key.carrier.shape)
            # A whole tensor as it lies, or its rows would not be the carrier's.
            tensor = location.whole if location is not None else None
            if tensor is None or original.shapes()[tensor] != key.carrier.shape:
                raise FormatError(
                    f"the original does not hold {key.carrier.name} as it was marked",
                    hint="give the model that was marked as --original, or its source",
                )
            self._marks[tensor] = (key, baseline)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return self._original.shapes()

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Return rows of a tensor in float32, those of a tile without its mark; errors as `read_projections`."""
        rows = self._original.rows(name, start, count).float()
        if name not in self._marks:
            return rows
        key, baseline = self._marks[name]
        first, last = key.carrier.row_start, key.carrier.row_start + key.carrier.rows
        low, high = max(start, first), min(start + count, last)
        if low < high:
            tile = self._original.rows(name, first, last - first).float().clone()
            baseline.unmark_(tile, key)
            rows = rows.clone()
            rows[low - start : high - start] = tile[low - first : high - first]
        return rows
