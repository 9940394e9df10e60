"""Which matrices carry, and that the plan keeps the budget that was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_wmguard.errors import CapacityError, FormatError
from hf_wmguard.watermark.carriers import (
    MAX_CARRIERS,
    MAX_ROWS,
    TILE_WEIGHTS,
    Carrier,
    Tile,
    choose_tiles,
    is_carrier,
    select_carriers,
)
from hf_wmguard.watermark.payload import MIN_CODE_BITS
from hf_wmguard.watermark.planner import MAX_PROJECTIONS, Mix
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections, residual

Shapes = dict[str, tuple[int, int]]


def blocks(count: int, *shapes: tuple[int, int]) -> Shapes:
    return {f"layers.{i}.w{j}.weight": shape for i in range(count) for j, shape in enumerate(shapes)}


TINY = blocks(2, *[(128, 128)] * 4, (256, 128), (128, 256))
MINILM = blocks(6, *[(384, 384)] * 4, (1536, 384), (384, 1536))
SQUARES = blocks(20, (64, 64))
LLAMA = blocks(32, (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 3)
CARRIER = Carrier(name="h.0.w", shape=(64, 32), row_start=8, rows=40, sides=(5, 4), rms=0.125)
ADAPTER = Carrier(name="h.0.w", shape=(64, 32), row_start=0, rows=64, sides=(6, 3), rms=0.1, basis=bytes(range(128)))
KEY = bytes(range(32))


def rms_of(tile: Tile) -> float:
    return 0.02 + 0.01 * (len(tile.name) % 3)


def plan(
    shapes: Shapes, *, budget: float = 0.01, least: int = MIN_CODE_BITS, key: bytes = KEY, **options: Any
) -> tuple[tuple[Carrier, ...], Mix]:
    stream = Stream(key, "tiles")
    return select_carriers(shapes, rms_of, budget=budget, min_projections=least, stream=stream, **options)


def projections(carriers: tuple[Carrier, ...]) -> int:
    return sum(carrier.projections for carrier in carriers)


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.11.attention.output.dense.weight",
        "encoder.layer.3.intermediate.dense.weight",
        "roberta.encoder.layer.0.output.dense.weight",
        "distilbert.transformer.layer.0.attention.q_lin.weight",
        "distilbert.transformer.layer.5.ffn.lin2.weight",
        "transformer.h.0.attn.c_attn.weight",
        "h.11.mlp.c_fc.weight",
        "model.layers.7.self_attn.k_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.3.block_sparse_moe.experts.7.w1.weight",
        "model.layers.3.mlp.shared_expert.down_proj.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.5.layer.2.DenseReluDense.wi_0.weight",
        "vit.encoder.layer.0.attention.attention.query.weight",
        "vit.layers.0.attention.o_proj.weight",
        "0.auto_model.encoder.layer.2.output.dense.weight",
    ],
)
def test_matrices_of_numbered_blocks_carry(name: str) -> None:
    assert is_carrier(name, (64, 64))


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.pooler.dense.weight",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight",
        "bert.encoder.layer.0.output.dense.bias",
        "cls.predictions.decoder.weight",
        "classifier.weight",
        "classifier.0.weight",
        "roberta.embeddings.token_type_embeddings.weight",
        "classifier.out_proj.weight",
        "distilbert.embeddings.word_embeddings.weight",
        "pre_classifier.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "score.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "lm_head.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.feed_forward.router.weight",
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "vit.embeddings.position_embeddings",
        "vit.pooler.dense.weight",
        "model.layers.0",
        "layers12.dense.weight",
    ],
)
def test_what_a_thief_replaces_first_does_not(name: str) -> None:
    assert not is_carrier(name, (64, 64))


@pytest.mark.parametrize("shape", [(), (64,), (15, 64), (64, 15), (8, 64, 64), (1, 64)])
def test_only_matrices_of_some_size_carry(shape: tuple[int, ...]) -> None:
    assert not is_carrier("model.layers.0.mlp.up_proj.weight", shape)
    assert is_carrier("model.layers.0.mlp.up_proj.weight", (16, 16))


def steps_of(mix: Mix) -> Tensor:
    """Return the step of each projection in some order that is not theirs, float64 [n]."""
    levels = torch.tensor([step for step, count in mix.parts for _ in range(count)], dtype=torch.float64)
    return levels[torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))]


def relative_change(shapes: Shapes, carriers: tuple[Carrier, ...], steps: Tensor, seed: int) -> float:
    """Put Gaussian weights on their lattices, and return how far they had to go."""
    draw = torch.Generator().manual_seed(seed)
    moved, position = 0.0, 0
    # A tile has the rms of its matrix here; of the other matrices only the norm counts.
    whole = sum(rms_of(Tile(name=n, shape=s, row_start=0, rows=s[0])) ** 2 * math.prod(s) for n, s in shapes.items())
    for carrier in carriers:
        part = slice(position, position := position + carrier.projections)
        bits = Stream(KEY, carrier.name).bits(carrier.projections)
        key = CarrierKey.derive(bytes([seed] * 32), carrier, bits, steps[part])
        tile: Tensor = carrier.rms * torch.randn(carrier.rows, carrier.shape[1], generator=draw)
        before = tile.clone()
        move_(tile, key, residual(read_projections(tile, key), key))
        moved += float((tile - before).norm()) ** 2
    return math.sqrt(moved / whole)


@pytest.mark.parametrize(
    ("shapes", "budget", "step"),
    [
        (TINY, 0.046, 2.0),
        (TINY, 0.06, None),
        (SQUARES, 0.087, 2.0),
        (SQUARES, 0.1, None),
        (MINILM, 0.01, None),
        (MINILM, 0.006, 1.0),
        (MINILM, 0.02, 4.0),
        (blocks(3, (768, 96), (96, 768), (384, 384)), 0.04, None),
    ],
)
def test_a_full_step_keeps_the_budget_and_uses_it(shapes: Shapes, budget: float, step: float | None) -> None:
    carriers, mix = plan(shapes, budget=budget, step=step)
    change = relative_change(shapes, carriers, steps_of(mix), seed=1)
    assert 0.8 * budget <= change <= budget


def test_tiles_of_a_large_model_keep_the_budget_too() -> None:
    """A tile stands for its matrix: the budget is measured against the whole of it."""
    shapes = blocks(3, (8192, 2048), (8192, 2048))
    carriers, mix = plan(shapes, budget=0.004)
    assert all(carrier.rows < carrier.shape[0] for carrier in carriers)
    assert 0.8 * 0.004 <= relative_change(shapes, carriers, steps_of(mix), seed=3) <= 0.004


def test_the_change_is_alike_in_every_matrix() -> None:
    carriers, mix = plan(MINILM, step=2.0)
    for carrier in (carriers[0], carriers[1], carriers[5]):
        change = relative_change({carrier.name: carrier.shape}, (carrier,), steps_of(mix), seed=2)
        assert 0.007 <= change <= 0.0115  # one matrix has few projections, so that chance shows


def test_the_plan_of_a_small_encoder() -> None:
    """The numbers that the measurements in the documents stand on."""
    carriers, mix = plan(MINILM)
    assert len(carriers) == 36
    sides = {(carrier.shape, carrier.sides) for carrier in carriers}
    # What rounding down leaves over goes to a few of each shape.
    small, wide, tall = (384, 384), (384, 1536), (1536, 384)
    assert sides == {(small, (7, 7)), (small, (8, 8)), *((one, (m, m)) for one in (wide, tall) for m in (14, 15))}
    assert projections(carriers) == mix.projections == 3735
    assert mix.parts == ((0.75, 2907), (2.0, 545), (5.0, 283))
    assert [carrier.name for carrier in carriers] == sorted(MINILM)
    assert all((carrier.row_start, carrier.rows) == (0, carrier.shape[0]) for carrier in carriers)


def test_one_step_for_all() -> None:
    carriers, mix = plan(MINILM, step=2.0)
    assert mix.parts == ((2.0, projections(carriers)),)


def test_the_plan_does_not_depend_on_the_order() -> None:
    assert plan(LLAMA) == plan(dict(reversed(LLAMA.items())))


def test_small_matrices_are_left_out_where_one_projection_is_too_much() -> None:
    carriers, _ = plan({**MINILM, "layers.0.small.weight": (16, 16)}, budget=0.008, step=2.0)
    assert [carrier.name for carrier in carriers] == sorted(MINILM)


@pytest.mark.parametrize("count", [1, 500, 1040, 3000, 9000])
def test_large_models_stay_near_the_most_projections(count: int) -> None:
    """Rounding must not leave a model of thousands of matrices without one projection each."""
    carriers, mix = plan(blocks(count, (4096, 4096)), budget=0.05)
    assert 0.9 * MAX_PROJECTIONS <= projections(carriers) == mix.projections <= MAX_PROJECTIONS
    assert len(carriers) == min(count, MAX_CARRIERS)


def test_little_of_a_large_model_is_read() -> None:
    """All matrices of a model of 30 million weights are read whole, and at most 2% of the bytes of an 8B one."""
    carriers, _ = plan(blocks(1, (4096, 4096)), budget=0.05)
    assert (carriers[0].row_start, carriers[0].rows) == (0, 4096)
    carriers, _ = plan(LLAMA)
    every = sum(math.prod(shape) for shape in LLAMA.values())
    # Of another 1.05 billion weights in embedding and head nothing is read.
    assert TILE_WEIGHTS < sum(carrier.rows * carrier.shape[1] for carrier in carriers) < 0.02 * every


def test_the_key_chooses_tiles_and_they_lie_in_every_block() -> None:
    (carriers, _), (others, _) = plan(LLAMA), plan(LLAMA, key=bytes(32))
    assert len(carriers) == len(others) == MAX_CARRIERS
    assert plan(LLAMA)[0] == carriers
    assert {carrier.name for carrier in carriers} != {carrier.name for carrier in others}
    for chosen in (carriers, others):
        per_block = [sum(carrier.name.startswith(f"layers.{i}.") for carrier in chosen) for i in range(32)]
        assert per_block == [4] * 32
    starts = [carrier.row_start for carrier in carriers]
    assert len(set(starts)) > 100
    assert max(c.row_start + c.rows - c.shape[0] for c in carriers) <= 0


def test_any_row_of_a_matrix_may_carry() -> None:
    shapes = blocks(1, (1 << 16, 2048))
    starts = [choose_tiles(shapes, Stream(bytes([n] * 32), "tiles"))[0].row_start for n in range(64)]
    rows = choose_tiles(shapes, Stream(KEY, "tiles"))[0].rows
    assert rows == TILE_WEIGHTS // 2048
    assert min(starts) < 0.1 * ((1 << 16) - rows)
    assert max(starts) > 0.9 * ((1 << 16) - rows)


def test_adapters_carry_in_their_row_space() -> None:
    bases = {name: (8, bytes(8 * shape[1])) for name, shape in MINILM.items()}
    carriers, mix = plan(MINILM, bases=bases)
    assert projections(carriers) == mix.projections >= MIN_CODE_BITS
    for carrier in carriers:
        assert carrier.rank == 8
        assert carrier.sides == ((7, 7) if carrier.shape == (384, 384) else (27, 8))


@pytest.mark.parametrize(
    ("shapes", "budget", "step"),
    [
        (TINY, 0.01, None),
        (TINY, 1e-9, None),
        (TINY, 0.0001, 0.5),
        (TINY, 0.01, 4.0),
        (MINILM, 0.001, None),
        (MINILM, 0.01, 8.0),
        (SQUARES, 0.05, None),
        (blocks(200, (64, 64), (16, 16)), 0.001, None),
        (blocks(50, *[(64, 64)] * 6), 0.0001, 2.0),
        (blocks(3, (2000, 17), (4000, 400)), 0.001, 1.0),
    ],
)
def test_the_advised_budget_suffices_and_a_smaller_one_does_not(
    shapes: Shapes, budget: float, step: float | None
) -> None:
    with pytest.raises(CapacityError, match="too few carriers") as caught:
        plan(shapes, budget=budget, step=step)
    advised = float(caught.value.hint.split("budget to ")[1].split(",")[0])
    assert budget < advised <= 0.2
    assert projections(plan(shapes, budget=advised, step=step)[0]) >= MIN_CODE_BITS
    with pytest.raises(CapacityError):
        plan(shapes, budget=advised - 0.001, step=step)


@pytest.mark.parametrize(("shapes", "step"), [(blocks(2, (64, 64)), 0.5), (TINY, 16.0), ({"h.0.w": (16, 16)}, None)])
def test_no_budget_is_advised_where_none_would_do(shapes: Shapes, step: float | None) -> None:
    for budget in (0.01, 0.2):
        with pytest.raises(CapacityError, match="too few carriers") as caught:
            plan(shapes, budget=budget, step=step)
        assert "raise the budget" not in caught.value.hint
        assert "signature=None" in caught.value.hint


def test_a_model_without_carriers() -> None:
    with pytest.raises(CapacityError, match="no matrix") as caught:
        plan({})
    assert "signature=None" in caught.value.hint


@pytest.mark.parametrize("carrier", [CARRIER, ADAPTER])
def test_json_round_trip(carrier: Carrier) -> None:
    value = json.loads(json.dumps(carrier.to_json()))
    assert value["shape"] == [64, 32]
    assert Carrier.from_json(value) == carrier


def test_what_follows_from_the_fields() -> None:
    assert (CARRIER.projections, CARRIER.rank) == (20, 0)
    assert (ADAPTER.projections, ADAPTER.rank) == (18, 4)


def test_the_basis_is_not_printed() -> None:
    assert len(repr(ADAPTER)) < 200


def malformed() -> Iterator[tuple[str, object]]:
    value = CARRIER.to_json()
    for name in value:
        yield f"no {name}", {key: item for key, item in value.items() if key != name}
    changes: dict[str, list[object]] = {
        "name": [None, 3],
        "shape": [[64], [64, 32, 1], "64", None, [64.0, 32], ["64", "32"], [True, 32], [MAX_ROWS + 1, 32], [10, 32]],
        "row_start": [-1, 0.0, True, "8", None, 25],
        "rows": [0, -1, 57, 40.0, "40"],
        "sides": [[0, 4], [5, 0], [-5, -4], [41, 4], [5, 33], [5], [5, 4, 1], 5, [5.0, 4], ["5", "4"], [True, 4]],
        "rms": [0.0, -0.1, 5e-324, math.inf, math.nan, "0.1", True],
        "basis": ["AA==", "AA", "A", "?", None, 0],
        "extra": [1],
    }
    for name, items in changes.items():
        for item in items:
            yield f"{name}={item!r}", value | {name: item}
    adapter = ADAPTER.to_json()
    yield "more directions than the rank", adapter | {"sides": [6, 5]}
    yield "half a basis", adapter | {"basis": adapter["basis"][:84]}
    wide = {"shape": [4096, 4096], "row_start": 0, "rows": 4096}
    yield "more projections than any model has", value | wide | {"sides": [4096, 2]}
    yield "not an object", []
    yield "nothing", None


@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in malformed()])
def test_a_malformed_record_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        Carrier.from_json(value)
