"""Where a matrix lies: against the modules of transformers themselves, where they have the layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_wmguard.suspects.fusing import Runs, qkv_runs
from hf_wmguard.suspects.locate import Layout
from hf_wmguard.suspects.reader import open_suspect
from hf_wmguard.suspects.sources import InMemory

H = 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, int],
    start: int = 0,
    count: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tensor | None:
    suspect = InMemory(tensors, config or {})
    place = Layout(suspect).locate(name, shape)
    return None if place is None else place.read(suspect, start, shape[0] if count is None else count)


def check(tensors: Mapping[str, Tensor], name: str, expected: Tensor, config: Mapping[str, Any] | None = None) -> None:
    """Read the whole matrix, and tiles across every border in it."""
    shape = (expected.shape[0], expected.shape[1])
    for start, count in [(0, shape[0]), (1, shape[0] - 1), (3, 6), (shape[0] - 1, 1)]:
        tile = read(tensors, name, shape, start, count, config)
        assert tile is not None
        assert torch.equal(tile, expected[start : start + count])


def test_onnx_style_transposes() -> None:
    weight = random(36, H)
    check({"h.0.mlp.up.weight": weight.T.contiguous()}, "h.0.mlp.up.weight", weight)
    check({"model.h.0.mlp.up.weight": weight.T.contiguous()}, "h.0.mlp.up.weight", weight)
    # The right way round stands above the other, wherever both are.
    both = {"a.h.0.w.weight": weight.T.contiguous(), "b.h.0.w.weight": weight}
    check(both, "h.0.w.weight", weight)
    twice = {"a.h.0.w.weight": weight.T.contiguous(), "b.h.0.w.weight": weight.T.contiguous()}
    assert read(twice, "h.0.w.weight", (36, H)) is None


def test_a_large_transposed_matrix_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_wmguard.suspects.locate._CHUNK_VALUES", 100)
    weight = random(36, H)
    check({"h.0.up.weight": weight.T.contiguous()}, "h.0.up.weight", weight)


@pytest.mark.parametrize("kv", [24, 12, 6])
@pytest.mark.parametrize("fused", ["qkv_proj", "Wqkv", "qkv", "W_pack", "c_attn"])
@pytest.mark.parametrize("transposed", [False, True])
def test_queries_keys_and_values_one_after_the_other(kv: int, fused: str, transposed: bool) -> None:
    q, k, v = random(H, H), random(kv, H, seed=1), random(kv, H, seed=2)
    stored = torch.cat((q, k, v))
    tensors = {f"m.layers.0.attn.{fused}.weight": stored.T.contiguous() if transposed else stored}
    for part, expected in {"q": q, "k": k, "v": v}.items():
        check(tensors, f"layers.0.attn.{part}_proj.weight", expected)


def test_sizes_that_no_heads_have_are_not_found() -> None:
    tensors = {"l.0.attn.qkv_proj.weight": random(H + 2 * 10, H)}
    assert read(tensors, "l.0.attn.q_proj.weight", (H, H)) is None
    assert read({"l.0.attn.qkv_proj.weight": random(H + 1, H)}, "l.0.attn.q_proj.weight", (H, H)) is None
    assert read({"l.0.attn.qkv_proj.weight": random(3 * H, H + 1)}, "l.0.attn.q_proj.weight", (H, H)) is None
    # Another module's, and another layer's.
    assert read({"l.0.cross.qkv_proj.weight": random(3 * H, H)}, "l.0.attn.q_proj.weight", (H, H)) is None
    assert read({"l.1.attn.qkv_proj.weight": random(3 * H, H)}, "l.0.attn.q_proj.weight", (H, H)) is None


def heads_of(name: str, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the fused weight of a transformers module and what it splits an input into, as matrices.

    The module's own code does the splitting: run on unit vectors, the output of a linear layer is its matrix.
    """
    import transformers

    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[name]
    model = transformers.AutoModel.from_config(kind(**config))
    fused = next(module for path, module in model.named_modules() if path.endswith("query_key_value"))
    attention = next(module for module in model.modules() if getattr(module, "query_key_value", None) is fused)
    weight = fused.weight.detach()
    rows = torch.arange(weight.shape[0], dtype=torch.float32)
    split = attention._reshape if hasattr(attention, "_reshape") else attention._split_heads
    found = split(rows.reshape(1, 1, -1).clone())
    # A key head that several queries share is told several times.
    numbers = [dict.fromkeys(part.flatten().long().tolist()) for part in found]
    return weight, {part: weight[list(index)] for part, index in zip("qkv", numbers, strict=True)}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bloom", {"hidden_size": H, "n_head": 4, "n_layer": 1, "vocab_size": 9}),
        (
            "persimmon",
            {
                "hidden_size": H,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                "intermediate_size": 8,
                "vocab_size": 9,
            },
        ),
        (
            "falcon",
            {
                "hidden_size": H,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                "vocab_size": 9,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
            },
        ),
        (
            "falcon",
            {"hidden_size": H, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 9, "multi_query": True},
        ),
        (
            "falcon",
            {"hidden_size": H, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 9, "multi_query": False},
        ),
    ],
)
def test_interleaved_heads_are_those_of_the_module(name: str, config: dict[str, Any]) -> None:
    fused, parts = heads_of(name, config)
    tensors = {"h.0.self_attention.query_key_value.weight": fused}
    for part, expected in parts.items():
        check(tensors, f"h.0.self_attention.{part}_proj.weight", expected, {"model_type": name, **config})
        # Without the config nobody can say how the heads lie.
        assert read(tensors, f"h.0.self_attention.{part}_proj.weight", tuple(expected.shape)) is None  # type: ignore[arg-type]


def test_gpt_neox_heads() -> None:
    # [heads, (q, k, v), head size], as GPTNeoXAttention.forward views and chunks it.
    fused = random(3 * H, H)
    config = {"model_type": "gpt_neox", "num_attention_heads": 4}
    for index, part in enumerate(("query", "key", "value")):
        expected = fused.reshape(4, 3, 6, H)[:, index].reshape(H, H)
        check(
            {"layers.0.attention.query_key_value.weight": fused}, f"layers.0.attention.{part}.weight", expected, config
        )


def test_codegen_shards() -> None:
    # [4 shards, (q, v, k), rows], as CodeGenAttention.forward splits it.
    fused = random(3 * H, H)
    for index, part in enumerate("qvk"):
        expected = fused.reshape(4, 3, H // 4, H)[:, index].reshape(H, H)
        check({"h.0.attn.qkv_proj.weight": fused}, f"h.0.attn.{part}_proj.weight", expected, {"model_type": "codegen"})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "unheard of"},
        {"model_type": "gpt_neox"},
        {"model_type": "gpt_neox", "num_attention_heads": 0},
        {"model_type": "gpt_neox", "num_attention_heads": "4"},
        {"model_type": "gpt_neox", "num_attention_heads": 5},
        {"model_type": "gpt_neox", "num_attention_heads": True},
        {"model_type": ["gpt_neox"]},
        {"model_type": "falcon", "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 3},
        {"model_type": "falcon", "num_attention_heads": 4, "new_decoder_architecture": True},
    ],
)
def test_a_config_that_says_nothing_gives_no_place(config: dict[str, Any]) -> None:
    assert qkv_runs("query_key_value", 0, H, 3 * H, config) is None


def test_runs() -> None:
    runs = Runs(offset=2, run=3, stride=10)
    assert list(runs.spans(0, 7)) == [(2, 3), (12, 3), (22, 1)]
    assert list(runs.spans(4, 3)) == [(13, 2), (22, 1)]
    assert list(Runs(offset=5).spans(2, 9)) == [(7, 9)]


def test_gate_and_up() -> None:
    gate, up = random(36, H), random(36, H, seed=1)
    fused = torch.cat((gate, up))
    for tensors in ({"x.l.0.mlp.gate_up_proj.weight": fused}, {"l.0.mlp.gate_up_proj.weight": fused.T.contiguous()}):
        check(tensors, "l.0.mlp.gate_proj.weight", gate)
        check(tensors, "l.0.mlp.up_proj.weight", up)
    # The owner's is fused and the suspect's is not.
    check({"x.l.0.mlp.gate_proj.weight": gate, "x.l.0.mlp.up_proj.weight": up}, "l.0.mlp.gate_up_proj.weight", fused)
    assert read({"l.0.mlp.gate_proj.weight": gate}, "l.0.mlp.gate_up_proj.weight", (72, H)) is None


def test_the_owners_fused_attention_found_apart() -> None:
    parts = {"q": random(H, H), "k": random(12, H, seed=1), "v": random(12, H, seed=2)}
    tensors = {f"m.l.0.self_attn.{part}_proj.weight": weight for part, weight in parts.items()}
    check(tensors, "l.0.self_attn.qkv_proj.weight", torch.cat(list(parts.values())))


EXPERTS, INNER = 5, 20
GATES = random(EXPERTS, INNER, H)
UPS = random(EXPERTS, INNER, H, seed=1)
DOWNS = random(EXPERTS, H, INNER, seed=2)
STACKED = {
    "model.layers.0.mlp.experts.gate_up_proj": torch.cat((GATES, UPS), dim=1),
    "model.layers.0.mlp.experts.down_proj": DOWNS,
}


def apart(block: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    return {
        f"model.layers.0.{block}.experts.{index}.{leaf}.weight": weights[index]
        for index in range(EXPERTS)
        for leaf, weights in ((gate, GATES), (up, UPS), (down, DOWNS))
    }


GENERIC = apart("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL = apart("block_sparse_moe", "w1", "w3", "w2")


@pytest.mark.parametrize("owner", [GENERIC, MIXTRAL])
@pytest.mark.parametrize("stored", [GENERIC, MIXTRAL, STACKED])
def test_experts_by_either_name_in_either_form(
    owner: dict[str, Tensor], stored: dict[str, Tensor], tmp_path: Path
) -> None:
    for name, weight in owner.items():
        check(stored, name, weight)
    save_file(stored, tmp_path / "x.safetensors")
    name, weight = next((one, w) for one, w in owner.items() if ".3." in one)
    with open_suspect(tmp_path / "x.safetensors") as suspect:
        place = Layout(suspect).locate(name, (weight.shape[0], weight.shape[1]))
        assert place is not None
        assert torch.equal(place.read(suspect, 2, 11), weight[2:13])


@pytest.mark.parametrize("stored", [GENERIC, MIXTRAL, STACKED])
def test_the_owners_stacked_experts(stored: dict[str, Tensor]) -> None:
    for name, stack in STACKED.items():
        check(stored, name, stack.reshape(-1, stack.shape[-1]))


def test_stacked_experts_with_one_missing() -> None:
    lacking = {name: weight for name, weight in GENERIC.items() if ".3.up" not in name}
    assert read(lacking, "model.layers.0.mlp.experts.gate_up_proj", (2 * EXPERTS * INNER, H)) is None
    few = {name: weight[:3] for name, weight in STACKED.items()}
    assert read(few, "model.layers.0.mlp.experts.3.down_proj.weight", (H, INNER)) is None
    assert read(few, "model.layers.0.mlp.experts.2.down_proj.weight", (H, INNER)) is not None


def test_experts_stored_transposed() -> None:
    stored = {name: stack.transpose(1, 2).contiguous() for name, stack in STACKED.items()}
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    check(stored, name, UPS[3], {"model_type": "llama4_text"})
    assert read(stored, name, (INNER, H)) is None


def test_rows_of_a_stack_across_experts(tmp_path: Path) -> None:
    save_file(STACKED, tmp_path / "x.safetensors")
    for name, stack in STACKED.items():
        flat = stack.reshape(-1, stack.shape[-1])
        with open_suspect(tmp_path / "x.safetensors") as suspect:
            for start, count in [(0, flat.shape[0]), (13, 60), (40, 1), (39, 2), (flat.shape[0] - 1, 1)]:
                assert torch.equal(suspect.rows(name, start, count), flat[start : start + count])


def test_v5_names_are_those_of_transformers(tmp_path: Path) -> None:
    """A real mixture of experts, as its module holds it and as it is saved."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=3,
        vocab_size=8,
    )
    model = Qwen2MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".layers.0." in name and tensor.ndim > 1}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    with open_suspect(tmp_path) as saved, open_suspect(model) as held:
        assert "model.layers.0.mlp.experts.2.gate_proj.weight" in saved.shapes()
        for name, tensor in state.items():
            flat = tensor.reshape(-1, tensor.shape[-1])
            place = Layout(saved).locate(name, (flat.shape[0], flat.shape[1]))
            assert place is not None, name
            assert torch.equal(place.read(saved, 0, flat.shape[0]), flat)
        for name, size in saved.shapes().items():
            if len(size) == 2 and ".layers.0." in name:
                place = Layout(held).locate(name, (size[0], size[1]))
                assert place is not None, name
                assert torch.equal(place.read(held, 0, size[0]), saved.rows(name, 0, size[0]))


class TestLocations:
    def places(self, shape: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[Any, ...]]:
        found = Layout(InMemory({name: torch.empty(size) for name, size in shapes.items()})).locations(shape)
        assert all(len(place.pieces) == 1 for place in found)
        pieces = [place.pieces[0] for place in found]
        return [(piece.tensor, piece.block, piece.runs.offset, piece.transposed) for piece in pieces]

    def test_names_are_counted_not_spelt(self) -> None:
        names = ["l.10.w", "l.2.w", "l.1.w", "l.1.v", "l.02.w", "b", "l.x.w"]
        found = self.places((4, 6), dict.fromkeys(names, (4, 6)))
        assert [name for name, *_ in found] == ["b", "l.1.v", "l.1.w", "l.02.w", "l.2.w", "l.10.w", "l.x.w"]

    def test_the_order_of_names_is_not_that_of_the_file(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {f"l.{index}.w": (4, 6) for index in range(12)}
        assert self.places((4, 6), shapes) == self.places((4, 6), dict(reversed(shapes.items())))

    def test_a_name_of_very_many_digits(self) -> None:
        assert len(self.places((4, 6), {"l." + "9" * 9000: (4, 6), "l." + "8" * 9000: (4, 6)})) == 2

    def test_wholes_and_transposes(self) -> None:
        assert self.places((4, 6), {"a": (4, 6), "b": (6, 4), "c": (4, 5), "d": (4,), "e": ()}) == [
            ("a", 0, 0, False),
            ("b", 0, 0, True),
        ]
        assert self.places((4, 4), {"a": (4, 4)}) == [("a", 0, 0, False), ("a", 0, 0, True)]

    def test_parts_of_fused_matrices(self) -> None:
        assert self.places((4, 5), {"a": (8, 5)}) == [("a", 0, 0, False), ("a", 0, 4, False)]
        assert self.places((4, 5), {"a": (12, 5)}) == [("a", 0, 0, False), ("a", 0, 4, False), ("a", 0, 8, False)]
        assert self.places((4, 5), {"a": (5, 12)}) == [("a", 0, 0, True), ("a", 0, 4, True), ("a", 0, 8, True)]
        # Four heads on two: q is 8 rows, k and v are 4.
        assert self.places((8, 5), {"a": (16, 5)}) == [("a", 0, 0, False), ("a", 0, 8, False)]
        assert self.places((4, 5), {"a": (16, 5)}) == [("a", 0, 8, False), ("a", 0, 12, False)]
        assert self.places((4, 5), {"a": (18, 5)}) == []

    def test_experts(self) -> None:
        assert self.places((4, 5), {"a": (2, 8, 5)}) == [
            ("a", 0, 0, False),
            ("a", 0, 4, False),
            ("a", 8, 0, False),
            ("a", 8, 4, False),
        ]

    def test_every_place_can_be_read(self) -> None:
        tensors = {
            "a": random(16, 5),
            "b": random(5, 12),
            "c": random(2, 8, 5),
            "d": random(2, 5, 4),
            "e": random(4, 5),
        }
        suspect = InMemory(tensors)
        for place in Layout(suspect).locations((4, 5)):
            tile = place.read(suspect, 1, 2)
            assert tile.shape == (2, 5)
            assert torch.equal(tile, place.read(suspect, 0, 4)[1:3])


def test_a_model_in_memory_brings_its_config() -> None:
    class Model(nn.Linear):
        config = None

    with open_suspect(Model(3, 4)) as suspect:
        assert suspect.shapes()["weight"] == (4, 3)
