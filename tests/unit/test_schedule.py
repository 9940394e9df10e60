"""When the mark comes in, and that it comes in evenly and ends exactly where it should."""

from __future__ import annotations

import pytest
import torch

from hf_wmguard.training.schedule import Phase, Ramp
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections, residual


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps_per_epoch", "start"),
    [
        (1.0, 30, 10, 20),
        (0.5, 30, 10, 25),
        (0.01, 30, 10, 29),
        (0.55, 30, 10, 24),
        (3.0, 30, 10, 0),
        (12.0, 30, 10, 0),
        (1.0, 7, 10, 0),
        (1.0, 25, 10, 15),
        # Without a length: the share of the run.
        (1.0, 200, None, 0),
        (0.25, 200, None, 150),
        (5.0, 200, None, 0),
        (1e-9, 200, None, 199),
        (1.0, 1, None, 0),
    ],
)
def test_a_phase_is_counted_from_the_end(
    epochs: float, max_steps: int, steps_per_epoch: int | None, start: int
) -> None:
    phase = Phase.last(epochs, max_steps=max_steps, steps_per_epoch=steps_per_epoch)
    assert (phase.start, phase.end) == (start, max_steps)
    inside = [step for step in range(max_steps + 3) if phase.contains(step)]
    assert inside == list(range(start + 1, max_steps + 1))


@pytest.mark.parametrize(
    ("start", "end", "share", "last"),
    [(0, 160, 0.25, 120), (80, 160, 0.25, 140), (0, 3, 0.99, 1), (5, 6, 0.5, 6), (0, 9, 0, 9)],
)
def test_a_cooldown_is_taken_from_the_end(start: int, end: int, share: float, last: int) -> None:
    assert Phase(start=start, end=end).without_last(share) == Phase(start=start, end=last)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.75, 1.0])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 10), (20, 30), (5, 1005)])
def test_the_way_is_taken_evenly_and_to_its_end(start: int, end: int, share: float) -> None:
    ramp = Ramp(phase=Phase(start=start, end=end), share=share)
    assert start < ramp.full <= end
    total, done = ramp.full - start, 0.0
    for step in range(1, end + 1):
        before = done
        done += ramp.strength(step) * (1 - done)
        if step <= start:
            assert done == 0.0
        else:
            assert done == pytest.approx(min(1.0, (step - start) / total))
            assert done - before == pytest.approx(1 / total if step <= ramp.full else 0.0, abs=1e-12)
    assert done == 1.0


def test_states_follow_the_strength() -> None:
    ramp = Ramp(phase=Phase(start=10, end=20), share=0.5)
    assert ramp.full == 15
    assert [ramp.state(step) for step in (0, 10, 11, 14, 15, 20, 25)] == [
        "pending",
        "pending",
        "ramping",
        "ramping",
        "complete",
        "complete",
        "complete",
    ]
    assert [ramp.strength(step) for step in (0, 10, 11, 14, 15, 16, 20, 25)] == [0, 0, 0.2, 0.5, 1, 1, 1, 1]


def test_a_phase_of_one_step_embeds_at_once() -> None:
    ramp = Ramp(phase=Phase(start=4, end=5), share=0.75)
    assert [ramp.strength(step) for step in (4, 5)] == [0.0, 1.0]
    assert [ramp.state(step) for step in (4, 5)] == ["pending", "complete"]


def test_weights_follow_the_ramp_onto_the_lattice() -> None:
    """On real projections, with training that pulls them away in between."""
    carrier = Carrier(name="h.0.w", shape=(32, 32), row_start=0, rows=32, sides=(4, 4), rms=0.15)
    steps = torch.full((16,), 2.0, dtype=torch.float64)
    key = CarrierKey.derive(bytes(range(32)), carrier, Stream(bytes(range(32)), "bits").bits(16), steps)
    draw = torch.Generator().manual_seed(0)
    ramp = Ramp(phase=Phase(start=3, end=12), share=0.6)
    for drift in (0.0, 1e-3):
        tile = 0.15 * torch.randn(32, 32, generator=draw)
        way = residual(read_projections(tile, key), key)
        for step in range(1, 13):
            tile += drift * torch.randn(32, 32, generator=draw)
            move_(tile, key, ramp.strength(step) * residual(read_projections(tile, key), key))
            if drift == 0.0 and step >= ramp.phase.start:
                left = max(0, ramp.full - step) / (ramp.full - ramp.phase.start)
                torch.testing.assert_close(residual(read_projections(tile, key), key), left * way, atol=1e-6, rtol=0)
        assert float(residual(read_projections(tile, key), key).abs().max()) < 1e-6
