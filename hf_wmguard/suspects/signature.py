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
# What a merge has diluted is extrapolated from the baseline: a merge in which the owner has weight w leaves w of what
# training and marking moved. Within 10% of every w down to 0.09.
_GAINS = tuple(1.2**power for power in range(1, 14))

_Tiles = Sequence[tuple[CarrierKey, Baseline]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to read a suspect.

    Args:
        alignment: What was undone: ``none``, ``contents`` (tiles found by what they hold, because their names say
            nothing or mislead), ``norms`` (scaled rows and columns), ``diluted 0.48`` (merged with what it was
            trained from, or another fine-tune of that, at this owner weight), or what the alignment with the original
            says.
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
    """Return the readings of a suspect: as it is, with norms set back, and aligned with the original.

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
            attempts += [
                replace(
                    attempt,
                    alignment=", ".join(one for one in (aligned.description, attempt.alignment) if one != "none"),
                    tests=attempt.tests * aligned.tries,
                )
                for attempt in _read_whole(tiles, aligned)
            ]
    return attempts


def _read_delta(tiles: _Tiles, suspect: Suspect) -> list[Attempt]:
    """Return what an adapter says: the projections of its base are in the record."""
    layout, projections, bytes_read = Layout(suspect), [], 0
    for key, baseline in tiles:
        location = layout.locate(key.carrier.name, key.carrier.shape)
        delta = None if location is None else location.read(suspect, key.carrier.row_start, key.carrier.rows)
        change = try_projections(delta, key)
        projections.append(None if change is None else baseline.projections_of(key) + change)
        bytes_read += 0 if delta is None else delta.numel() * delta.element_size()
    return _with_dilutions(tiles, projections, bytes_read)


def _read_whole(tiles: _Tiles, suspect: Suspect) -> list[Attempt]:
    layout = Layout(suspect)
    found = []
    for key, baseline in tiles:
        location = layout.locate(key.carrier.name, key.carrier.shape)
        found.append(_Found() if location is None else _look(suspect, location, key, baseline))
    moved = _search(tiles, found, suspect, layout)
    attempts = _with_dilutions(tiles, [one.projections for one in found], sum(one.bytes_read for one in found))
    plain = attempts[0]
    if moved:
        plain = attempts[0] = replace(plain, alignment="contents", tests=2)
    if max(one.stretch for one in found) > _STRETCHED:
        scaled = Reading.of([key for key, _ in tiles], [one.rescaled for one in found])
        attempts.append(replace(plain, alignment="norms", reading=scaled))
    return attempts


def _with_dilutions(tiles: _Tiles, projections: Sequence[Tensor | None], bytes_read: int) -> list[Attempt]:
    """Return the reading of projections as they are, and of what they were before a merge with the base.

    A merge with the base, in which the owner has weight w, leaves base + w (marked - base); 1 / w of the way from
    the baseline leads back. Another fine-tune of the base adds its own way, as noise.
    """
    keys = [key for key, _ in tiles]
    attempts = [Attempt(alignment="none", reading=Reading.of(keys, projections), bytes_read=bytes_read)]
    bases = [baseline.projections_of(key) for key, baseline in tiles]
    for gain in _GAINS:
        undone = [
            None if one is None else base + gain * (one - base) for one, base in zip(projections, bases, strict=True)
        ]
        reading = Reading.of(keys, undone)
        attempts.append(Attempt(alignment=f"diluted {1 / gain:.2f}", reading=reading, bytes_read=bytes_read))
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


def _search(tiles: _Tiles, found: list[_Found], suspect: Suspect, layout: Layout) -> bool:
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
