"""The mark inside an adapter's own tangent space: exact, closed form, and no dearer than in a whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_wmguard.errors import CapacityError
from hf_wmguard.watermark.carriers import Carrier, select_carriers
from hf_wmguard.watermark.lowrank import Reach, adapter_projections, row_space
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey, change_norm, project, residual, soft_bits

ROWS, COLUMNS, RANK, SCALING = 192, 256, 8, 2.0
START, COUNT = 32, 128


def make(rank: int = RANK, right: int = RANK) -> tuple[CarrierKey, Tensor, Tensor, Tensor]:
    """Return a key whose directions lie in the row space of A, and W0, A and B."""
    base = 0.05 * torch.randn(ROWS, COLUMNS)
    down = (torch.rand(rank, COLUMNS) * 2 - 1) / math.sqrt(COLUMNS)
    carrier = Carrier(
        name="model.layers.0.a.weight",
        shape=(ROWS, COLUMNS),
        row_start=START,
        rows=COUNT,
        sides=(6, right),
        rms=0.05,
        basis=row_space(down),
    )
    steps = torch.full((6 * right,), 0.75, dtype=torch.float64)
    key = CarrierKey.derive(b"k" * 32, carrier, torch.randint(2, (6 * right,)), steps)
    return key, base, down, torch.zeros(ROWS, rank)


def tile_of(base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return (base + SCALING * up @ down)[START : START + COUNT]


def wanted(key: CarrierKey, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return residual(project(tile_of(base, down, up), key), key)


def embed(key: CarrierKey, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return B after the full step."""
    moved = up.clone()
    moved[START : START + COUNT] += Reach.of(down, key).change(key, wanted(key, base, down, up), SCALING)
    return moved


def test_basis_spans_the_row_space() -> None:
    down = torch.randn(RANK, COLUMNS)
    data = row_space(down)
    basis = torch.frombuffer(bytearray(data), dtype=torch.int8).reshape(COLUMNS, RANK).double()
    basis = torch.linalg.qr(basis).Q
    inside = torch.linalg.qr(down.double().T).Q
    # Cosines of the angles between the two spaces.
    assert float(torch.linalg.svdvals(basis.T @ inside).min()) > 0.9995
    assert row_space(down.bfloat16()) != b""
    assert row_space(3.0 * down) == data


@pytest.mark.parametrize("broken", [torch.zeros(4, 32), torch.ones(4, 32), torch.eye(64)[:, :32]])
def test_dependent_rows_are_named(broken: Tensor) -> None:
    with pytest.raises(CapacityError, match="dependent rows") as caught:
        row_space(broken)
    assert caught.value.hint


def test_adapter_projections_are_those_of_its_product() -> None:
    key, _, down, _ = make()
    up = torch.randn(ROWS, RANK)
    expected = project(SCALING * (up @ down)[START : START + COUNT], key)
    assert torch.allclose(adapter_projections(down, up[START : START + COUNT], SCALING, key), expected, atol=1e-5)


@pytest.mark.parametrize("right", [1, 3, RANK])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_step_lands_on_the_lattice(right: int, drift: float) -> None:
    key, base, down, up = make(right=right)
    # A trains on after the commitment, and B is no longer zero.
    down = down + drift * torch.randn_like(down) * down.std()
    up = up + 0.02 * torch.randn_like(up)
    before = wanted(key, base, down, up)
    moved = embed(key, base, down, up)
    after = wanted(key, base, down, moved)
    assert float(before.abs().max()) > 0.005
    assert float(after.abs().max()) < 1e-6
    assert torch.equal(moved[:START], up[:START])
    assert torch.equal(moved[START + COUNT :], up[START + COUNT :])
    assert soft_bits(project(tile_of(base, down, moved), key), key).abs().min() > 0.999


def test_change_is_as_small_as_in_a_whole_matrix() -> None:
    key, base, down, up = make()
    shift = wanted(key, base, down, up)
    made = torch.linalg.vector_norm(tile_of(base, down, embed(key, base, down, up)) - tile_of(base, down, up))
    assert float(made) == pytest.approx(change_norm(key, shift), rel=2e-3)
    assert float(made) == pytest.approx(Reach.of(down, key).change_norm(key, shift), rel=1e-4)


def test_no_other_change_of_b_is_smaller() -> None:
    key, base, down, up = make(right=4)
    down = down * torch.linspace(0.2, 5.0, RANK)[:, None]
    shift = wanted(key, base, down, up)
    change = Reach.of(down, key).change(key, shift, SCALING)
    best = float(torch.linalg.vector_norm(SCALING * change @ down))
    # The plain inverse of A B also lands on the lattice; only with orthonormal rows of A is it as small.
    plain = (
        key.left
        @ (key.left_gram_inverse @ shift @ torch.linalg.pinv(down.double() @ key.right.double()) / SCALING).float()
    )
    moved = adapter_projections(down, plain, SCALING, key)
    assert torch.allclose(moved, shift, atol=1e-6)
    assert best < 0.95 * float(torch.linalg.vector_norm(SCALING * plain @ down))


def test_directions_that_left_the_row_space_are_counted_and_left_alone() -> None:
    key, base, down, up = make()
    inside = torch.linalg.qr(down.T).Q
    other = torch.randn(RANK, COLUMNS)
    gone = other - other @ inside @ inside.T
    reach = Reach.of(torch.cat([down[:3], gone[3:]]), key)
    assert reach.lost == RANK - 3
    assert bool(torch.isfinite(reach.inverse).all())
    # What it still moves, it moves at no absurd price.
    assert reach.change_norm(key, wanted(key, base, down, up)) < 10 * change_norm(key, wanted(key, base, down, up))
    assert Reach.of(torch.zeros_like(down), key).lost == RANK


def test_adapters_carry_within_the_budget_or_say_what_would_help() -> None:
    torch.manual_seed(3)
    shapes = {f"model.layers.{layer}.{part}.weight": (256, 256) for layer in range(4) for part in "qkvo"}
    bases = {name: (RANK, row_space(torch.randn(RANK, 256))) for name in shapes}
    carriers, mix = select_carriers(
        shapes, lambda tile: 0.05, budget=0.06, min_projections=512, stream=Stream(b"k" * 32, "t"), bases=bases
    )
    assert all(one.rank == RANK and one.sides[1] <= RANK for one in carriers)
    assert mix.projections == sum(one.projections for one in carriers)
    with pytest.raises(CapacityError, match="too few") as caught:
        select_carriers(
            dict(list(shapes.items())[:2]),
            lambda tile: 0.05,
            budget=0.06,
            min_projections=2048,
            stream=Stream(b"k" * 32, "t"),
            bases={name: (2, row_space(torch.randn(2, 256))) for name in shapes},
        )
    assert "raise r or adapt more matrices" in caught.value.hint
