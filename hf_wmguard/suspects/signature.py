"""Read one record's signature out of a suspect, undoing what can be undone without looking at a dither.

Where a tile is read, and what is done to it first, is chosen by names, shapes, norms and by likeness to the baseline:
never by how well the mark reads there. So an innocent suspect's phases stay uniform whatever is chosen. Every way of
reading that is scored is counted all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from hf_wmguard.suspects.aligned import align
from hf_wmguard.suspects.locate import Layout, Location
from hf_wmguard.suspects.roles import Heads
from hf_wmguard.suspects.sources import Suspect
from hf_wmguard.suspects.unmarked import Unmarked
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import CarrierKey, Reading, try_projections

_STRETCHED = 0.1
"""Root mean square of the log ratio of norms from which rows or columns count as scaled; training moves it by less."""
_PROBES = 8
_STRIDE = 37
OWNER_WEIGHTS = tuple(0.8**turn for turn in range(1, 11))
"""Shares of the owner in a merge that are tried, 0.8 to 0.11: none is further than an eighth from one of them."""
_T = TypeVar("_T")
_Tiles = Sequence[tuple[CarrierKey, Baseline]]
Progress = Callable[[int, int, str], None]
"""Called with carriers looked at, carriers in all, and the name of the last one's matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to read a suspect.

    Args:
        alignment: What was undone: ``none``, ``contents`` (tiles found by what they hold, because their names say
            nothing or mislead), ``norms`` (scaled rows and columns), ``merge at 0.51`` (with what the model was before
            marking, or another fine-tune of that), or what the alignment with the original says.
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
    record: WatermarkRecord,
    keys: Sequence[CarrierKey],
    suspect: Suspect,
    *,
    original: Suspect | None = None,
    progress: Progress | None = None,
) -> list[Attempt]:
    """Return the readings of a suspect: as it lies, unmerged, found by contents, norms set back, and aligned.

    Args:
        record: The private record.
        keys: Its carrier keys.
        suspect: Somebody's weights.
        original: The owner's own model, marked or not.
        progress: Called after every carrier that was looked for where its name says.
    Raises:
        ConfigError: The original's config does not say how attention is divided.
    """
    tiles = list(zip(keys, record.baselines, strict=True))
    if suspect.is_delta:
        return _read_delta(tiles, suspect)
    attempts = _read_whole(tiles, suspect, progress)
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
    """Return what an adapter says: the projections of its base are in the record.

    A mark that is in the base itself is not in any adapter on it: such a carrier is missing.
    """
    layout, projections, bytes_read = Layout(suspect), [], 0
    for key, baseline in tiles:
        location = layout.locate(key.carrier.name, key.carrier.shape) if key.carrier.basis else None
        delta = None if location is None else location.read(suspect, key.carrier.row_start, key.carrier.rows)
        change = try_projections(delta, key)
        projections.append(None if change is None else baseline.projections_of(key) + change)
        bytes_read += 0 if delta is None else _size_bytes(delta)
    return _with_merges(tiles, projections, bytes_read)


def _read_whole(tiles: _Tiles, suspect: Suspect, progress: Progress | None = None) -> list[Attempt]:
    layout = Layout(suspect)
    named = []

    def look(tile: tuple[CarrierKey, Baseline]) -> _Found:
        key, baseline = tile
        location = layout.locate(key.carrier.name, key.carrier.shape)
        return _Found() if location is None else _look(suspect, location, key, baseline)

    for turn, one in enumerate(_side_by_side(suspect, look, tiles), start=1):
        named.append(one)
        if progress is not None:
            progress(turn, len(tiles), tiles[turn - 1][0].carrier.name)
    moved = _search(tiles, named, suspect, layout)
    keys, bytes_read = [key for key, _ in tiles], sum(one.bytes_read for one in moved or named)
    attempts = _with_merges(tiles, [one.projections for one in named], bytes_read)
    for found, alignment in ((named, ""), (moved, "contents")):
        if not found:
            continue
        # Beside what the names say, not in its place: a decoy must not hide a mark that lies where it should.
        if alignment:
            attempts += [
                replace(one, alignment=", ".join(a for a in (alignment, one.alignment) if a != "none"))
                for one in _with_merges(tiles, [one.projections for one in found], bytes_read)
            ]
        if max(one.stretch for one in found) > _STRETCHED:
            scaled = Reading.of(keys, [one.rescaled for one in found])
            name = ", ".join(a for a in (alignment, "norms") if a)
            attempts.append(Attempt(alignment=name, reading=scaled, bytes_read=bytes_read))
    return attempts


def _with_merges(tiles: _Tiles, projections: Sequence[Tensor | None], bytes_read: int) -> list[Attempt]:
    """Return the reading of projections as they are, and as they were if the suspect is a merge with the baseline.

    Another fine-tune of the same base is far nearer to the base than to the owner along the mark's directions, so that
    a merge with it is undone almost as well.
    """
    keys = [key for key, _ in tiles]
    attempts = [Attempt(alignment="none", reading=Reading.of(keys, projections), bytes_read=bytes_read)]
    for weight in OWNER_WEIGHTS:
        undone = [
            None if one is None else baseline.unmerge(one, key, weight)
            for (key, baseline), one in zip(tiles, projections, strict=True)
        ]
        reading = Reading.of(keys, undone)
        attempts.append(Attempt(alignment=f"merge at {weight:.2f}", reading=reading, bytes_read=bytes_read))
    return attempts


def _side_by_side(suspect: Suspect, look: Callable[[_T], _Found], things: Iterable[_T]) -> Iterator[_Found]:
    """Yield what is found at each thing, in order, as many at a time as the suspect can be read."""
    if suspect.concurrency == 1:
        yield from map(look, things)
        return
    with ThreadPoolExecutor(suspect.concurrency) as pool:
        looking = [pool.submit(look, one) for one in things]
        try:
            for one in looking:
                yield one.result()
        finally:
            # After an error the others are not waited for.
            pool.shutdown(cancel_futures=True)


def _look(suspect: Suspect, location: Location, key: CarrierKey, baseline: Baseline) -> _Found:
    carrier = key.carrier
    tile = location.read(suspect, carrier.row_start, carrier.rows)
    # Codes of a quantised matrix are no weights.
    if not tile.is_floating_point():
        return _Found(bytes_read=_size_bytes(tile))
    stretch, in_proportion = baseline.stretch(tile, carrier)
    # Where the step is far larger or smaller than the weights, phases no longer depend on them: with the norms set
    # back they do, and as it lies the tile says nothing. The rule looks at the weights only.
    projections = try_projections(tile, key) if in_proportion else None
    rescaled = try_projections(baseline.rescale(tile, carrier), key) if stretch > _STRETCHED else projections
    best = rescaled if projections is None else projections
    likeness = 0.0 if best is None else baseline.likeness(best, key)
    if projections is None and likeness < _least(key):
        # Neither in proportion nor, with its norms set back, alike: nothing of the owner's can be read here.
        rescaled = None
    return _Found(
        projections=projections,
        rescaled=rescaled,
        likeness=likeness,
        stretch=stretch,
        bytes_read=_size_bytes(tile),
    )


def _size_bytes(tile: Tensor) -> int:
    return tile.numel() * tile.element_size()


def _search(tiles: _Tiles, named: list[_Found], suspect: Suspect, layout: Layout) -> list[_Found]:
    """Return where tiles that are not where their names say are found by what they hold; nothing where none is.

    A few are looked for first: of a model that is not the owner's none is found anywhere, and the search ends there.
    What is neither where its name says nor anywhere else is no tile of the owner's, and is not read.
    """
    unlike = [i for i, ((key, _), one) in enumerate(zip(tiles, named, strict=True)) if one.likeness < _least(key)]
    # One of many may be unlike by chance.
    if len(unlike) <= len(tiles) // 32:
        return []
    # The largest first, whose likeness says most, and from all over the model.
    unlike.sort(key=lambda i: (-tiles[i][0].carrier.projections, i * _STRIDE % len(tiles)))
    found, moved = list(named), 0
    for turn, i in enumerate(unlike):
        if turn == _PROBES and not moved:
            break
        key, baseline = tiles[i]
        best, read = _Found(), 0
        look = partial(_look, suspect, key=key, baseline=baseline)
        for other in _side_by_side(suspect, look, _candidates(layout, key.carrier)):
            read += other.bytes_read
            if other.likeness > best.likeness:
                best = other
        accepted = best.likeness >= _enough(key)
        moved += accepted
        found[i] = replace(best if accepted else _Found(), bytes_read=named[i].bytes_read + read)
    return found if moved else []


def _candidates(layout: Layout, carrier: Carrier) -> list[Location]:
    """Return where a carrier may lie if not where its name says.

    To read a tile of a transposed matrix is to read it whole: such places only under the carrier's own name, or where
    there are no others.
    """
    every = layout.locations(carrier.shape)
    own = layout.locate(carrier.name, carrier.shape)
    name = None if own is None else own.pieces[0].tensor
    return [one for one in every if not one.transposed or one.pieces[0].tensor == name] or list(every)


def _likeness_of_marked(key: CarrierKey) -> float:
    """Return the correlation that a marked tile has with its baseline: the mark moved each projection by up to D/2."""
    return 1 / math.sqrt(1 + float(((key.step / key.carrier.rms) ** 2).mean()) / 12)


def _least(key: CarrierKey) -> float:
    """Return the likeness below which a tile is not the one its name says.

    Another tile's is 0 +- 1 / sqrt(n). What an attack leaves of the right one lies between that and a marked tile's.
    """
    return min(3 / math.sqrt(key.carrier.projections), 0.5 * _likeness_of_marked(key))


def _enough(key: CarrierKey) -> float:
    """Return the likeness from which the best of many tiles is the right one."""
    return max(4 / math.sqrt(key.carrier.projections), 0.5 * _likeness_of_marked(key))
