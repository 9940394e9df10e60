"""A suspect whose weights were moved by symmetries comes back to its original's coordinates, and nothing crashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from families import FAMILIES, make_family
from tiny import make_model
from torch import Tensor

from hf_wmguard.errors import ConfigError
from hf_wmguard.robustness import symmetries
from hf_wmguard.robustness.attacks import cast, quantize_int8
from hf_wmguard.suspects.aligned import Aligned, align
from hf_wmguard.suspects.reader import open_suspect
from hf_wmguard.suspects.roles import Heads, find_blocks
from hf_wmguard.watermark.align import fit_basis, fit_neurons, match_rows
from hf_wmguard.watermark.align_heads import assign, fit_heads

Weights = dict[str, Tensor]
Change = Callable[[Weights, Heads], Weights]
VOCABULARY = 600

KEEPING: dict[str, tuple[Change, str]] = {
    "nothing": (lambda w, h: w, "none"),
    "permute_neurons": (lambda w, h: symmetries.permute_neurons(w, h, seed=1), "neurons"),
    "permute_heads": (lambda w, h: symmetries.permute_heads(w, h, seed=1), "heads"),
    "permute_residual": (lambda w, h: symmetries.permute_residual(w, h, seed=1), "residual permutation"),
    "scale_queries": (lambda w, h: symmetries.scale_queries(w, h, seed=1), "heads"),
    "rotate_queries": (lambda w, h: symmetries.rotate_queries(w, h, seed=1), "heads"),
    "map_values": (lambda w, h: symmetries.map_values(w, h, seed=1), "heads"),
    "add_neurons": (lambda w, h: symmetries.add_neurons(w, h, count=40, seed=1), "neurons"),
    "split_neurons": (lambda w, h: symmetries.split_neurons(w, h, count=40, seed=1), "neurons"),
    "longer vocabulary": (lambda w, h: symmetries.resize_vocabulary(w, h, rows=VOCABULARY + 10, seed=1), "none"),
    "swapped layers": (lambda w, h: symmetries.keep_layers(w, h, [1, 0]), "layers moved"),
    "doubled layer": (lambda w, h: symmetries.keep_layers(w, h, [0, 0, 1]), "layers moved"),
}
LLAMA_ONLY: dict[str, tuple[Change, str]] = {
    "scale_neurons": (lambda w, h: symmetries.scale_neurons(w, h, seed=1), "neurons"),
    "fold_norms": (symmetries.fold_norms, "norms"),
    "rotate_residual": (lambda w, h: symmetries.rotate_residual(w, h, seed=1), "residual rotation, norms"),
}


def with_noise(weights: Weights, heads: Heads) -> Weights:
    draw = torch.Generator().manual_seed(3)
    return {
        n: t + 0.1 * t.square().mean().sqrt() * torch.randn(t.shape, generator=draw) if t.dim() == 2 else t
        for n, t in weights.items()
    }


# What is added to the suspect, and how far the aligned matrices may then be from the original's. Noise in the size of
# the whole matrix grows on neurons and heads that the thief had made small.
PERTURBED: dict[str, tuple[Change, float]] = {
    "exact": (lambda w, h: w, 0.003),
    "bf16": (lambda w, h: cast(w, torch.bfloat16), 0.005),
    "int8": (lambda w, h: quantize_int8(w), 0.04),
    "noise": (with_noise, 0.4),
}


def composed(weights: Weights, heads: Heads, *, rotated: bool = False, gated: bool = False) -> Weights:
    if rotated:
        weights = symmetries.rotate_residual(weights, heads, seed=4)
    weights = symmetries.permute_residual(weights, heads, seed=5)
    weights = symmetries.split_neurons(weights, heads, count=20, seed=6)
    weights = symmetries.add_neurons(weights, heads, count=20, seed=7)
    weights = symmetries.permute_neurons(weights, heads, seed=8)
    weights = symmetries.permute_heads(weights, heads, seed=9)
    if gated:
        weights = symmetries.scale_neurons(weights, heads, seed=10)
    weights = symmetries.map_values(weights, heads, seed=11)
    weights = symmetries.scale_queries(weights, heads, seed=12)
    weights = symmetries.rotate_queries(weights, heads, seed=13)
    return symmetries.keep_layers(weights, heads, [1])


def tiny(task: str) -> tuple[Weights, Heads]:
    model = make_model(task, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return dict(model.state_dict()), Heads.from_config(model.config.to_dict())


def aligned(reference: Mapping[str, Tensor], suspect: Mapping[str, Tensor], heads: Heads) -> Aligned:
    with open_suspect(reference) as ours, open_suspect(suspect) as theirs:
        return align(ours, theirs, heads=heads)


def worst_error(result: Aligned, original: Weights) -> float:
    return max(
        float((result.rows(name, 0, count) - original[name]).norm() / original[name].norm())
        for name, (count, *_) in result.shapes().items()
    )


def carrying(weights: Weights, heads: Heads) -> set[str]:
    blocks = find_blocks({name: tuple(tensor.shape) for name, tensor in weights.items()}, heads)
    return {part.name for block in blocks.values() for part in block.parts.values()}


@pytest.mark.parametrize(
    ("task", "name"),
    [("causal", name) for name in KEEPING | LLAMA_ONLY] + [("classification", name) for name in KEEPING],
)
def test_each_symmetry_is_undone(task: str, name: str) -> None:
    weights, heads = tiny(task)
    change, said = (KEEPING | LLAMA_ONLY)[name]
    result = aligned(weights, change(weights, heads), heads)
    assert set(result.shapes()) == carrying(weights, heads)
    assert result.aligned
    assert result.description == said
    assert worst_error(result, weights) < 0.02


@pytest.mark.parametrize("perturbation", PERTURBED)
@pytest.mark.parametrize(("task", "rotated"), [("causal", False), ("causal", True), ("classification", False)])
def test_all_together_are_undone(task: str, rotated: bool, perturbation: str) -> None:
    weights, heads = tiny(task)
    suspect = composed(weights, heads, rotated=rotated, gated=task == "causal")
    change, tolerance = PERTURBED[perturbation]
    result = aligned(weights, change(suspect, heads), heads)
    assert set(result.shapes()) == {name for name in carrying(weights, heads) if ".1." in name}
    residual = "residual rotation, norms" if rotated else "residual permutation"
    assert result.description == f"{residual}, neurons, heads, layers 1"
    assert worst_error(result, weights) < tolerance


def test_a_suspect_that_trained_on_is_found() -> None:
    weights, heads = tiny("causal")
    moved = symmetries.permute_heads(symmetries.permute_residual(weights, heads, seed=1), heads, seed=2)
    moved = symmetries.map_values(moved, heads, seed=3)
    model = make_model("causal", VOCABULARY)
    model.load_state_dict(moved)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(10):
        ids = torch.randint(4, VOCABULARY, (4, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = dict(model.state_dict())
    change = max(float((trained[n] - moved[n]).norm() / moved[n].norm()) for n in carrying(weights, heads))
    assert change > 0.03
    result = aligned(weights, trained, heads)
    assert result.description == "residual permutation, heads"
    assert worst_error(result, weights) < 2 * change


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_come_back(family: str) -> None:
    model = make_family(family)
    weights, heads = dict(model.state_dict()), Heads.from_config(model.config.to_dict())
    suspect = symmetries.permute_residual(weights, heads, seed=1)
    suspect = symmetries.permute_neurons(suspect, heads, seed=2)
    suspect = symmetries.permute_heads(suspect, heads, seed=3)
    suspect = symmetries.map_values(suspect, heads, seed=4)
    if family != "qwen3":
        suspect = symmetries.rotate_queries(suspect, heads, seed=5)
    result = aligned(weights, symmetries.keep_layers(suspect, heads, [1, 0]), heads)
    assert set(result.shapes()) == carrying(weights, heads)
    assert result.description == "residual permutation, neurons, heads, layers moved"
    assert worst_error(result, weights) < 0.01


def test_normalised_queries_may_have_a_scale_of_their_own() -> None:
    model = make_family("qwen3")
    weights, heads = dict(model.state_dict()), Heads.from_config(model.config.to_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    suspect = weights | {name: weights[name] * torch.tensor([3.0, 0.5, 1.0, 7.0]).repeat_interleave(16)[:, None]}
    assert worst_error(aligned(weights, suspect, heads), weights) < 1e-3


def test_the_mark_survives_the_fit() -> None:
    """The reference lacks the mark, and a fit of few numbers cannot take it out of the suspect."""
    weights, heads = tiny("causal")
    draw = torch.Generator().manual_seed(5)
    keys, marked = {}, dict(weights)
    for name in carrying(weights, heads):
        rows, columns = weights[name].shape
        left, right = torch.randn(rows, 3, generator=draw), torch.randn(columns, 3, generator=draw)
        keys[name] = left, right
        marked[name] = weights[name] + 1e-5 * left @ right.T
    result = aligned(weights, composed(marked, heads, rotated=True, gated=True), heads)
    for name, (count, *_) in result.shapes().items():
        left, right = keys[name]
        read = ((result.rows(name, 0, count) - weights[name]) * (left @ right.T)).sum()
        made = ((marked[name] - weights[name]) * (left @ right.T)).sum()
        assert 0.8 < float(read / made) < 1.2, name


def test_what_lies_in_place_is_read_bit_by_bit() -> None:
    weights, heads = tiny("causal")
    renamed = {f"wrapper.{name}": tensor for name, tensor in weights.items()}
    result = aligned(weights, with_noise(renamed, heads), heads)
    assert (result.description, result.tries) == ("none", 1)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(result.rows(name, 7, 5), with_noise(renamed, heads)[f"wrapper.{name}"][7:12])


@pytest.mark.parametrize("turned", [False, True])
def test_fused_matrices_are_taken_apart(turned: bool) -> None:
    weights, heads = tiny("causal")
    suspect = composed_in_place(weights, heads) if turned else dict(weights)
    for index in range(2):
        prefix = f"model.layers.{index}."
        for fused, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            suspect[f"{prefix}{fused}.weight"] = torch.cat([suspect.pop(f"{prefix}{part}.weight") for part in parts])
    result = aligned(weights, suspect, heads)
    assert set(result.shapes()) == carrying(weights, heads)
    assert worst_error(result, weights) < 1e-5


def test_rows_are_a_part_of_the_matrix() -> None:
    weights, heads = tiny("causal")
    result = aligned(weights, composed(weights, heads), heads)
    for name, (count, *_) in result.shapes().items():
        assert torch.equal(result.rows(name, 5, 3), result.rows(name, 0, count)[5:8])


def test_every_alternative_is_counted() -> None:
    weights, heads = tiny("causal")
    assert aligned(weights, symmetries.permute_neurons(weights, heads, seed=1), heads).tries == 1
    assert aligned(weights, symmetries.permute_residual(weights, heads, seed=1), heads).tries == 2
    assert aligned(weights, symmetries.rotate_residual(weights, heads, seed=1), heads).tries == 3
    assert aligned(weights, symmetries.keep_layers(weights, heads, [1, 0]), heads).tries == 1 + 2 * 2


@pytest.mark.parametrize("task", ["causal", "classification"])
def test_a_stranger_is_read_as_it_is(task: str) -> None:
    weights, heads = tiny(task)
    draw = torch.Generator().manual_seed(9)
    stranger = {name: 0.02 * torch.randn(tensor.shape, generator=draw) for name, tensor in weights.items()}
    result = aligned(weights, stranger, heads)
    assert not result.aligned
    assert "not aligned" in result.description
    assert result.tries > 1
    for name, (count, *_) in result.shapes().items():
        assert torch.equal(result.rows(name, 0, count), stranger[name])


def narrower(weights: Weights, heads: Heads) -> Weights:
    return {name: tensor[..., :96] if tensor.dim() == 2 else tensor for name, tensor in weights.items()}


def without_a_head(weights: Weights, heads: Heads) -> Weights:
    cut = {name: tensor[: -heads.size] for name, tensor in weights.items() if ".query." in name or "q_proj" in name}
    return weights | cut


def with_nan(weights: Weights, heads: Heads) -> Weights:
    return {name: tensor.clone().index_fill_(0, torch.tensor([1]), torch.nan) for name, tensor in weights.items()}


# What is left of 14 matrices where the suspect lies in place, and where its residual stream and heads are permuted.
BROKEN: dict[str, tuple[Change, int, int]] = {
    "another width": (narrower, 0, 0),
    "without a head": (without_a_head, 12, 6),
    "fewer neurons": (lambda w, h: dict(keep_neurons(w, h, 200)), 14, 14),
    "a row of NaN": (with_nan, 14, 14),
    "huge": (lambda w, h: {n: t * 1e30 for n, t in w.items()}, 14, 14),
    "zeros": (lambda w, h: {n: torch.zeros_like(t) for n, t in w.items()}, 14, 14),
    "integers": (lambda w, h: {n: (t * 1000).to(torch.int8) for n, t in w.items()}, 0, 0),
    "no embedding": (lambda w, h: {n: t for n, t in w.items() if "embed" not in n}, 14, 14),
    "a short embedding": (lambda w, h: symmetries.resize_vocabulary(w, h, rows=2, seed=1), 14, 14),
    "no gates": (lambda w, h: {n: t for n, t in w.items() if "gate_proj" not in n}, 12, 12),
    "no names": (lambda w, h: {f"w{i}": t for i, t in enumerate(w.values())}, 0, 0),
    "vectors": (lambda w, h: {n: t for n, t in w.items() if t.dim() == 1}, 0, 0),
    "nothing": (lambda w, h: {}, 0, 0),
}


def keep_neurons(weights: Weights, heads: Heads, count: int) -> Weights:
    return {
        name: tensor[:count]
        if "gate_proj" in name or "up_proj" in name
        else tensor[:, :count]
        if "down" in name
        else tensor
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_no_suspect_is_too_odd(name: str, turned: bool) -> None:
    """What cannot be mapped is left out, and what is given can be read."""
    weights, heads = tiny("causal")
    change, *matrices = BROKEN[name]
    suspect = composed_in_place(weights, heads) if turned else weights
    result = aligned(weights, change(suspect, heads), heads)
    for one, (count, *_) in result.shapes().items():
        assert result.rows(one, 0, count).shape == weights[one].shape
    assert len(result.shapes()) == matrices[turned]


def composed_in_place(weights: Weights, heads: Heads) -> Weights:
    return symmetries.permute_heads(symmetries.permute_residual(weights, heads, seed=1), heads, seed=2)


def test_of_a_doubled_layer_the_better_copy_is_read() -> None:
    weights, heads = tiny("causal")
    doubled = symmetries.keep_layers(weights, heads, [0, 1, 0, 1])
    for place in (1, 2):
        noisy = {n: t for n, t in doubled.items() if f"layers.{place}." in n}
        doubled |= with_noise(noisy, heads)
    assert worst_error(aligned(weights, doubled, heads), weights) < 1e-5


def test_a_scaled_residual_stream_is_scaled_back() -> None:
    weights, heads = tiny("causal")
    written = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    suspect = {name: 3 * tensor if name.endswith(written) else tensor for name, tensor in weights.items()}
    result = aligned(weights, suspect, heads)
    assert result.description == "residual scale"
    assert worst_error(result, weights) < 1e-4


def test_what_is_not_finite_spoils_no_fit() -> None:
    weights, heads = tiny("causal")
    name = "model.layers.0.mlp.gate_proj.weight"
    suspect = composed_in_place(weights, heads)
    suspect[name][3, 5] = torch.nan
    suspect["model.layers.0.self_attn.v_proj.weight"][0, 0] = torch.inf
    result = aligned(weights, suspect, heads)
    assert result.description == "residual permutation, heads"
    assert worst_error(result, weights) < 0.05


def test_an_unmapped_matrix_cannot_be_read() -> None:
    weights, heads = tiny("causal")
    result = aligned(weights, symmetries.keep_layers(weights, heads, [1]), heads)
    name = "model.layers.0.mlp.up_proj.weight"
    assert name not in result.shapes()
    with pytest.raises(KeyError):
        result.rows(name, 0, 1)


def test_neurons_that_are_gone_are_zeros() -> None:
    weights, heads = tiny("causal")
    result = aligned(weights, keep_neurons(weights, heads, 200), heads)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(result.rows(name, 0, 200), weights[name][:200])
    assert not result.rows(name, 200, 56).any()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "rope_theta": 1e4},
            Heads(count=8, kv_count=2, size=8, rotary=8),
        ),
        ({"n_head": 4, "n_embd": 64}, Heads(count=4, kv_count=4, size=16)),
        (
            {
                "num_attention_heads": 4,
                "hidden_size": 64,
                "head_dim": 32,
                "model_type": "gemma2",
                "rope_parameters": {},
            },
            Heads(count=4, kv_count=4, size=32, rotary=32, gain_offset=1.0),
        ),
        (
            {"num_attention_heads": 4, "hidden_size": 64, "rope_parameters": {"partial_rotary_factor": 0.25}},
            Heads(count=4, kv_count=4, size=16, rotary=4),
        ),
        ({"text_config": {"n_heads": 2, "dim": 8}}, Heads(count=2, kv_count=2, size=4)),
    ],
)
def test_heads_are_read_from_a_config(config: dict[str, object], expected: Heads) -> None:
    assert Heads.from_config(config) == expected


@pytest.mark.parametrize(
    "config",
    [{}, {"num_attention_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 64}],
)
def test_a_config_without_heads_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Heads.from_config(config)


def test_rows_are_matched_through_a_sketch() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1100, 1200, generator=draw)
    order = torch.randperm(1100, generator=draw)
    index, cosine = match_rows(rows, rows[order])
    assert torch.equal(order[index], torch.arange(1100))
    assert cosine.min() > 0.99


def test_signs_are_matched_where_asked() -> None:
    rows = torch.randn(40, 60)
    assert (match_rows(rows, -rows, either_sign=True)[0] == torch.arange(40)).all()
    assert (match_rows(rows, -rows)[0] != torch.arange(40)).all()


def test_each_column_is_assigned_once() -> None:
    scores = torch.tensor([[0.9, 0.8], [0.95, 0.1]])
    assert assign(scores).tolist() == [1, 0]


def test_a_basis_is_undone_and_applied() -> None:
    rows = torch.randn(200, 32)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    order = torch.randperm(32)
    signs = torch.where(torch.rand(32) < 0.5, -1.0, 1.0)
    for moved, kind in (
        (3 * rows @ turn, "rotation"),
        (3 * rows[:, order] * signs, "permutation"),
        (3 * rows, "identity"),
    ):
        basis = fit_basis(rows, moved)
        assert basis.kind == kind
        assert basis.scale == pytest.approx(3, rel=1e-4)
        torch.testing.assert_close(basis.undo(moved), 3 * rows, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(3 * basis.apply(rows), moved, atol=1e-3, rtol=1e-3)


def test_a_decoy_that_shares_a_gate_does_not_stand_for_a_neuron() -> None:
    gate, up = torch.randn(20, 40), torch.randn(20, 40)
    decoys = {"gate": torch.cat([gate, gate]), "up": torch.cat([torch.randn(20, 40), up])}
    neurons = fit_neurons({"gate": gate, "up": up}, decoys)
    assert neurons.index.tolist() == list(range(20, 40))
    assert len(neurons.extra) == 0


@pytest.mark.parametrize("shift", [0, 1])
def test_half_a_neuron_does_not_stand_for_one_that_is_gone(shift: int) -> None:
    gate, up = torch.randn(20, 40), torch.randn(20, 40)
    parts = torch.tensor([*range(19), 0]).roll(shift)
    neurons = fit_neurons({"gate": gate, "up": up}, {"gate": gate[parts], "up": up[parts]})
    assert neurons.index[19] == -1
    halves = [int(neurons.index[0]), *neurons.extra.tolist()]
    assert sorted(parts[halves].tolist()) == [0, 0]
    assert neurons.extra_of.tolist() == [0]


def test_rotary_pairs_are_fitted_as_pairs() -> None:
    """A general map would do as well, and take more of the mark."""
    ours = {"q": torch.randn(32, 40), "k": torch.randn(16, 40), "v": torch.randn(16, 40), "o": torch.randn(40, 32)}
    angle, scale = torch.rand(3) * 6, 0.5 + torch.rand(3)
    pairs = torch.zeros(8, 8)
    one, two = torch.arange(3), torch.arange(3) + 3
    pairs[one, one] = pairs[two, two] = scale * angle.cos()
    pairs[one, two], pairs[two, one] = scale * angle.sin(), -scale * angle.sin()
    pairs[6, 6], pairs[7, 7] = 2.0, 0.5
    back = torch.linalg.inv(pairs).T
    theirs = ours | {
        "k": (pairs @ ours["k"].view(2, 8, 40)).view(16, 40),
        "q": (back @ ours["q"].view(4, 8, 40)).view(32, 40),
    }
    fitted = fit_heads(ours, theirs, kv_count=2, size=8, rotary=6)
    assert not fitted.maps["k"][:, pairs == 0].any()
    for role in ours:
        torch.testing.assert_close(fitted.undo(role, theirs[role]), ours[role], atol=1e-4, rtol=1e-4)
