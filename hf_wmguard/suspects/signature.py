"""Read one record's signature out of a suspect, undoing what can be undone without looking at a dither.

Where a tile is read, and what is done to it first, is chosen by names, shapes, norms and by likeness to the baseline:
never by how well the mark reads there. So an innocent suspect's phases stay uniform whatever is chosen. Every way of
reading that is scored is counted all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from hf_wmguard.suspects.aligned import align
from hf_wmguard.suspects.locate import Layout, Location
from hf_wmguard.suspects.roles import Heads
from hf_wmguard.suspects.sources import Suspect
from hf_wmguard.suspects.unmarked import Unmarked
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import CarrierKey, Reading, try_projections

_STRETCHED = 0.1
"""Root mean square of the log ratio of norms from which rows or columns count as scaled; training moves it by less."""
_PROBES = 12
OWNER_WEIGHTS = tuple(0.8**turn for turn in range(1, 11))
"""Shares of the owner in a merge that are tried, 0.8 to 0.11: none is further than an eighth from one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to read a suspect.

    Args:
        alignment: What was undone: ``none``, ``contents`` (tiles found by what they hold, because their names say
            nothing or mislead), ``norms`` (scaled rows and columns), ``merge`` with what the model was before marking,
            or what the alignment with the original says.
        reading: What was read.
        bytes_read: Bytes of weights that were read for it.
        tests: How many alternatives stood behind it; each is a test that the p-value is corrected for.
    """

    alignment: str
    reading: Reading
    bytes_read: int
    tests: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A carrier's tile in the suspect, if there is one: projections as they lie and with norms set back."""

    projections: Tensor | None = None
    rescaled: Tensor | None = None
    likeness: float = 0.0
    stretch: float = 0.0
    bytes_read: int = 0


def read_attempts(
    record: WatermarkRecord, keys: Sequence[CarrierKey], suspect: Suspect, *, original: Suspect | None = None
) -> list[Attempt]:
    """Return the readings of a suspect: as it is, with norms set back, unmerged, and aligned with the original.

    Args:
        record: The private record.
        keys: Its carrier keys.
        suspect: Somebody's weights.
        original: The owner's own model, marked or not.
    Raises:
        ConfigError: The original's config does not say how attention is divided.
    """
    tiles = list(zip(keys, record.baselines, strict=True))
    if suspect.is_delta:
        return _read_delta(tiles, suspect)
    attempts = _read_whole(tiles, suspect)
    if original is not None:
        reference = Unmarked(original, record, keys)
        aligned = align(reference, suspect, heads=Heads.from_config(original.config))
        if aligned.aligned and aligned.description != "none":
            (attempt, *_) = _read_whole(tiles, aligned)
            attempts.append(replace(attempt, alignment=aligned.description, tests=aligned.tries))
    return attempts


def _read_delta(tiles: Sequence[tuple[CarrierKey, Baseline]], suspect: Suspect) -> list[Attempt]:
    """Return what an adapter says: the projections of its base are in the record."""
    layout, projections, bytes_read = Layout(suspect), list[Tensor | None](), 0
    for key, baseline in tiles:
        location = layout.locate(key.carrier.name, key.carrier.shape)
        delta = None if location is None else location.read(suspect, key.carrier.row_start, key.carrier.rows)
        change = try_projections(delta, key)
        projections.append(None if change is None else baseline.projections_of(key) + change)
        bytes_read += 0 if delta is None else delta.numel() * delta.element_size()
    plain = Attempt(alignment="none", reading=_reading(tiles, projections), bytes_read=bytes_read)
    return [plain, *_unmerged(tiles, projections, plain)]


def _reading(tiles: Sequence[tuple[CarrierKey, Baseline]], projections: Sequence[Tensor | None]) -> Reading:
    return Reading.of([key for key, _ in tiles], projections)


def _unmerged(
    tiles: Sequence[tuple[CarrierKey, Baseline]], projections: Sequence[Tensor | None], plain: Attempt
) -> list[Attempt]:
    """Return what the projections say if the suspect is a merge with what the model was before it was marked.

    Another fine-tune of the same base is far nearer to the base than to the owner along the mark's directions, so that
    a merge with it is undone almost as well.
    """
    return [
        replace(
            plain,
            alignment=f"merge at {weight:.2f}",
            reading=_reading(
                tiles,
                [
                    None if read is None else baseline.unmerge(read, key, weight)
                    for (key, baseline), read in zip(tiles, projections, strict=True)
                ],
            ),
        )
        for weight in OWNER_WEIGHTS
    ]


def _read_whole(tiles: Sequence[tuple[CarrierKey, Baseline]], suspect: Suspect) -> list[Attempt]:
    layout = Layout(suspect)
    found = []
    for key, baseline in tiles:
        location = layout.locate(key.carrier.name, key.carrier.shape)
        found.append(_Found() if location is None else _look(suspect, location, key, baseline))
    moved = _search(tiles, found, suspect, layout)
    projections = [one.projections for one in found]
    plain = Attempt(
        alignment="contents" if moved else "none",
        reading=_reading(tiles, projections),
        bytes_read=sum(one.bytes_read for one in found),
        tests=2 if moved else 1,
    )
    attempts = [plain, *_unmerged(tiles, projections, plain)]
    if max(one.stretch for one in found) > _STRETCHED:
        attempts.append(replace(plain, alignment="norms", reading=_reading(tiles, [one.rescaled for one in found])))
    return attempts


def _look(suspect: Suspect, location: Location, key: CarrierKey, baseline: Baseline) -> _Found:
    carrier = key.carrier
    tile = location.read(suspect, carrier.row_start, carrier.rows)
    # Codes of a quantised matrix are no weights; a float of another meaning would only read as noise.
    projections = try_projections(tile, key) if tile.is_floating_point() else None
    if projections is None:
        return _Found(bytes_read=tile.numel() * tile.element_size())
    stretch = baseline.stretch(tile, carrier)
    return _Found(
        projections=projections,
        rescaled=try_projections(baseline.rescale(tile, carrier), key) if stretch > _STRETCHED else projections,
        likeness=baseline.likeness(projections, key),
        stretch=stretch,
        bytes_read=tile.numel() * tile.element_size(),
    )


def _alike(projections: int) -> float:
    """Return the correlation with the baseline from which a tile is the same one.

    Another tile's is 0 +- 1 / sqrt(n); noise of one rms, or 90% pruned, still leaves about 0.7.
    """
    return min(0.9, max(0.5, 4.5 / math.sqrt(projections)))


def _search(
    tiles: Sequence[tuple[CarrierKey, Baseline]], found: list[_Found], suspect: Suspect, layout: Layout
) -> bool:
    """Put tiles that are not where their names say at the place that holds them; return whether any was moved.

    A few are looked for first: of a model that is not the owner's none is found anywhere, and the search ends there.
    Where some were moved, what was found nowhere is no tile of the owner's, and is not read.
    """
    unlike = [i for i, (key, _) in enumerate(tiles) if found[i].likeness < _alike(key.carrier.projections)]
    # The largest first, whose likeness says most.
    unlike.sort(key=lambda i: -tiles[i][0].carrier.projections)
    moved = 0
    for turn, i in enumerate(unlike):
        if turn == _PROBES and not moved:
            return False
        key, baseline = tiles[i]
        scores = {
            location: _likeness(suspect, location, key, baseline) for location in layout.locations(key.carrier.shape)
        }
        best = max(scores, key=scores.__getitem__, default=None)
        if best is not None and scores[best] >= _alike(key.carrier.projections):
            found[i], moved = _look(suspect, best, key, baseline), moved + 1
    for i in unlike if moved else ():
        if found[i].likeness < _alike(tiles[i][0].carrier.projections):
            found[i] = _Found(bytes_read=found[i].bytes_read)
    return moved > 0


def _likeness(suspect: Suspect, location: Location, key: CarrierKey, baseline: Baseline) -> float:
    tile = location.read(suspect, key.carrier.row_start, key.carrier.rows)
    projections = try_projections(tile, key) if tile.is_floating_point() else None
    return 0.0 if projections is None else baseline.likeness(projections, key)
