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
from hf_wmguard.watermark.carriers import MAX_PROJECTIONS, MAX_ROWS, Carrier, is_carrier, select_carriers
from hf_wmguard.watermark.payload import MIN_CODE_BITS
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections, residual

Shapes = dict[str, tuple[int, int]]


def blocks(count: int, *shapes: tuple[int, int]) -> Shapes:
    return {f"layers.{i}.w{j}.weight": shape for i in range(count) for j, shape in enumerate(shapes)}


TINY = blocks(2, *[(128, 128)] * 4, (256, 128), (128, 256))
MINILM = blocks(6, *[(384, 384)] * 4, (1536, 384), (384, 1536))
SQUARES = blocks(20, (64, 64))
CARRIER = Carrier(name="h.0.w", shape=(64, 32), row_start=8, rows=40, side=5, step=0.25, rms=0.125)


def plan(shapes: Shapes, *, budget: float = 0.01, step: float = 2.0, least: int = MIN_CODE_BITS) -> tuple[Carrier, ...]:
    rms = {name: 0.02 + 0.01 * (index % 3) for index, name in enumerate(shapes)}
    return select_carriers(shapes, rms, budget=budget, step=step, min_projections=least)


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


def relative_change(shapes: Shapes, carriers: tuple[Carrier, ...], seed: int) -> float:
    """Put Gaussian weights on their lattices, and return how far they had to go."""
    draw = torch.Generator().manual_seed(seed)
    moved = whole = 0.0
    rms = {carrier.name: carrier.rms for carrier in carriers}
    for name, shape in shapes.items():
        tile: Tensor = rms.get(name, 0.02) * torch.randn(shape, generator=draw)
        whole += float(tile.norm()) ** 2
        for carrier in carriers:
            if carrier.name == name:
                key = CarrierKey.derive(bytes([seed] * 32), carrier, Stream(bytes(32), name).bits(carrier.projections))
                before = tile.clone()
                move_(tile, key, residual(read_projections(tile, key), key))
                moved += float((tile - before).norm()) ** 2
    return math.sqrt(moved / whole)


@pytest.mark.parametrize(
    ("shapes", "budget", "step"),
    [
        (TINY, 0.046, 2.0),
        (TINY, 0.06, 2.0),
        (SQUARES, 0.087, 2.0),
        (SQUARES, 0.1, 2.0),
        (MINILM, 0.01, 2.0),
        (MINILM, 0.006, 1.0),
        (MINILM, 0.02, 4.0),
        (blocks(3, (768, 96), (96, 768), (384, 384)), 0.04, 2.0),
    ],
)
def test_a_full_step_keeps_the_budget_and_uses_it(shapes: Shapes, budget: float, step: float) -> None:
    change = relative_change(shapes, plan(shapes, budget=budget, step=step), seed=1)
    assert 0.8 * budget <= change <= budget


def test_the_change_is_alike_in_every_matrix() -> None:
    carriers = plan(MINILM)
    for carrier in (carriers[0], carriers[1], carriers[5]):
        change = relative_change({carrier.name: carrier.shape}, (carrier,), seed=2)
        assert 0.007 <= change <= 0.0115  # one matrix has few projections, so that chance shows


def test_the_plan_of_a_small_encoder() -> None:
    """The numbers that the measurements in the documents stand on."""
    carriers = plan(MINILM)
    assert len(carriers) == 36
    assert {carrier.shape: carrier.side for carrier in carriers} == {(384, 384): 6, (1536, 384): 12, (384, 1536): 12}
    assert projections(carriers) == 2592
    assert [carrier.name for carrier in carriers] == sorted(MINILM)
    for carrier in carriers:
        assert carrier.step == 2.0 * carrier.rms
        assert (carrier.row_start, carrier.rows) == (0, carrier.shape[0])


def test_the_plan_does_not_depend_on_the_order() -> None:
    rms = dict.fromkeys(MINILM, 0.03)
    backwards = dict(reversed(MINILM.items()))
    options: Any = {"budget": 0.01, "step": 2.0, "min_projections": MIN_CODE_BITS}
    assert select_carriers(MINILM, rms, **options) == select_carriers(backwards, rms, **options)


def test_small_matrices_are_left_out_where_one_projection_is_too_much() -> None:
    shapes = {**MINILM, "layers.0.small.weight": (16, 16)}
    assert [carrier.name for carrier in plan(shapes)] == sorted(MINILM)


@pytest.mark.parametrize("count", [1, 500, 1040, 3000, 9000])
def test_large_models_stay_near_the_most_projections_and_above_the_fewest(count: int) -> None:
    """Rounding must not leave a model of thousands of matrices without one projection each."""
    carriers = plan(blocks(count, (4096, 4096)), budget=0.05)
    assert MIN_CODE_BITS <= projections(carriers) <= max(4 * MAX_PROJECTIONS, count)


@pytest.mark.parametrize("count", [32, 80])
def test_a_language_model_with_grouped_attention(count: int) -> None:
    carriers = plan(blocks(count, (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 3))
    assert MIN_CODE_BITS <= projections(carriers) <= 2 * MAX_PROJECTIONS
    assert len(carriers) == 7 * count


@pytest.mark.parametrize(
    ("shapes", "budget", "step"),
    [
        (TINY, 0.01, 2.0),
        (TINY, 0.0001, 0.5),
        (TINY, 0.01, 4.0),
        (MINILM, 0.001, 2.0),
        (MINILM, 0.01, 8.0),
        (SQUARES, 0.08, 2.0),
        (blocks(200, (64, 64), (16, 16)), 0.001, 2.0),
        (blocks(3, (2000, 17), (4000, 400)), 0.001, 1.0),
    ],
)
def test_the_advised_budget_suffices_and_a_smaller_one_does_not(shapes: Shapes, budget: float, step: float) -> None:
    with pytest.raises(CapacityError, match="too few carriers") as caught:
        plan(shapes, budget=budget, step=step)
    advised = float(caught.value.hint.split("budget to ")[1].split(",")[0])
    assert budget < advised <= 0.2
    assert projections(plan(shapes, budget=advised, step=step)) >= MIN_CODE_BITS
    with pytest.raises(CapacityError):
        plan(shapes, budget=advised - 0.001, step=step)


@pytest.mark.parametrize(("shapes", "step"), [(blocks(2, (64, 64)), 0.5), (TINY, 16.0)])
def test_no_budget_is_advised_where_none_would_do(shapes: Shapes, step: float) -> None:
    for budget in (0.01, 0.2):
        with pytest.raises(CapacityError, match="too few carriers") as caught:
            plan(shapes, budget=budget, step=step)
        assert "raise the budget" not in caught.value.hint
        assert "signature=None" in caught.value.hint


def test_a_model_without_carriers() -> None:
    with pytest.raises(CapacityError, match="no matrix") as caught:
        plan({})
    assert "signature=None" in caught.value.hint


def test_json_round_trip() -> None:
    value = json.loads(json.dumps(CARRIER.to_json()))
    assert value["shape"] == [64, 32]
    assert Carrier.from_json(value) == CARRIER
    assert CARRIER.projections == 25


def malformed() -> Iterator[tuple[str, object]]:
    value = CARRIER.to_json()
    for name in value:
        yield f"no {name}", {key: item for key, item in value.items() if key != name}
    changes: dict[str, list[object]] = {
        "name": [None, 3],
        "shape": [[64], [64, 32, 1], "64", None, [64.0, 32], ["64", "32"], [True, 32], [MAX_ROWS + 1, 32], [10, 32]],
        "row_start": [-1, 0.0, True, "8", None, 25],
        "rows": [0, -1, 57, 40.0, "40"],
        "side": [0, -5, 41, 33, 65, 2.5, "5", True],
        "step": [0.0, -0.25, math.inf, math.nan, "0.25", 1, None],
        "rms": [0.0, -0.1, math.inf, math.nan, "0.1", True],
        "extra": [1],
    }
    for name, items in changes.items():
        for item in items:
            yield f"{name}={item!r}", value | {name: item}
    yield "not an object", []
    yield "nothing", None


@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in malformed()])
def test_a_malformed_record_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        Carrier.from_json(value)
