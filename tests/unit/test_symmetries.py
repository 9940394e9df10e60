"""The thief's side: every change that claims to keep the function does so on real tiny models, and moves weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, make_family, make_lively
from tiny import make_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.robustness import symmetries
from hf_wmguard.suspects.roles import Heads

Weights = dict[str, Tensor]
VOCABULARY = 400

KEEPING: dict[str, Callable[[Weights, Heads], Weights]] = {
    "permute_neurons": lambda w, h: symmetries.permute_neurons(w, h, seed=1),
    "permute_heads": lambda w, h: symmetries.permute_heads(w, h, seed=1),
    "permute_residual": lambda w, h: symmetries.permute_residual(w, h, seed=1),
    "scale_queries": lambda w, h: symmetries.scale_queries(w, h, seed=1),
    "rotate_queries": lambda w, h: symmetries.rotate_queries(w, h, seed=1),
    "map_values": lambda w, h: symmetries.map_values(w, h, seed=1),
    "add_neurons": lambda w, h: symmetries.add_neurons(w, h, count=40, seed=1),
    "split_neurons": lambda w, h: symmetries.split_neurons(w, h, count=40, seed=1),
    "longer vocabulary": lambda w, h: symmetries.resize_vocabulary(w, h, rows=VOCABULARY + 10, seed=1),
    "shorter vocabulary": lambda w, h: symmetries.resize_vocabulary(w, h, rows=VOCABULARY // 2, seed=1),
    "all layers": lambda w, h: symmetries.keep_layers(w, h, [0, 1]),
}
LLAMA_ONLY: dict[str, Callable[[Weights, Heads], Weights]] = {
    "scale_neurons": lambda w, h: symmetries.scale_neurons(w, h, seed=1),
    "fold_norms": symmetries.fold_norms,
    "rotate_residual": lambda w, h: symmetries.rotate_residual(w, h, seed=1),
}


def rebuilt(model: PreTrainedModel, weights: Weights, **changes: Any) -> PreTrainedModel:
    """Return a model of the sizes that the weights have."""
    config = model.config.__class__(**{**model.config.to_dict(), **changes})
    names = [n for n in weights if n.endswith(("gate_proj.weight", "intermediate.dense.weight"))]
    config.intermediate_size = len(weights[names[0]]) if names else config.intermediate_size
    config.vocab_size = len(
        next(t for n, t in weights.items() if n.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    )
    causal = "lm_head.weight" in weights
    if causal:
        config.tie_word_embeddings = False
    result = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_config(config)
    result.load_state_dict(weights)
    return result.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(4, VOCABULARY // 2, (3, 12), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids).logits[..., : VOCABULARY // 2]


def moved(model: PreTrainedModel, weights: Weights) -> bool:
    """Return whether any matrix or any set of layers changed."""
    before = model.state_dict()
    return any(name not in before or not torch.equal(before[name], tensor) for name, tensor in weights.items())


def check(model: PreTrainedModel, name: str, change: Callable[[Weights, Heads], Weights]) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    heads = Heads.from_config(model.config.to_dict())
    weights = change(model.state_dict(), heads)
    assert moved(model, weights) == (name != "all layers")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), "the input was changed"
    expected = logits(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(rebuilt(model, weights)), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", KEEPING | LLAMA_ONLY)
def test_llama_computes_the_same(name: str) -> None:
    check(make_lively(make_model("causal", VOCABULARY)), name, (KEEPING | LLAMA_ONLY)[name])


@pytest.mark.parametrize("name", KEEPING)
def test_bert_computes_the_same(name: str) -> None:
    check(make_lively(make_model("classification", VOCABULARY)), name, KEEPING[name])


FAMILY_CHANGES = ("permute_neurons", "permute_heads", "permute_residual", "map_values")


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_compute_the_same(family: str) -> None:
    model = make_family(family)
    before = logits(model)
    heads = Heads.from_config(model.config.to_dict())
    names = (*FAMILY_CHANGES, *(["scale_neurons"] if family in ("opt", "phi3", "qwen3", "gemma2") else []))
    # Normalised keys and queries have no map between them.
    names += ("rotate_queries",) if family != "qwen3" else ()
    names += ("rotate_residual",) if family in ("phi3", "qwen3") else ()
    names += ("fold_norms",) if family == "gemma2" else ()
    for name in names:
        weights = (KEEPING | LLAMA_ONLY)[name](model.state_dict(), heads)
        assert moved(model, weights), name
        other = make_family(family)
        if name in ("rotate_residual", "fold_norms"):
            other = rebuilt(model, weights)
        other.load_state_dict(weights)
        torch.testing.assert_close(logits(other), before, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: name + text)


_TINY = {"vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0}
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSIFIERS = {
    "distilbert": (DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, **_TINY), ["permute_residual"]),
    "llama": (LlamaConfig(**_WIDE, **_TINY), ["permute_residual", "rotate_residual", "fold_norms"]),
    "roberta": (RobertaConfig(**_WIDE, **_TINY), ["permute_residual"]),
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_heads_of_classifiers_move_with_the_residual_stream(family: str) -> None:
    config: PreTrainedConfig
    config, names = CLASSIFIERS[family]
    model = make_lively(AutoModelForSequenceClassification.from_config(config))
    before = logits(model)
    for name in names:
        weights = (KEEPING | LLAMA_ONLY)[name](model.state_dict(), Heads.from_config(config.to_dict()))
        assert moved(model, weights), name
        other = AutoModelForSequenceClassification.from_config(config).eval()
        other.load_state_dict(weights)
        torch.testing.assert_close(logits(other), before, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", ["scale_queries", "rotate_queries"])
def test_normalised_queries_have_no_map(name: str) -> None:
    model = make_family("qwen3")
    with pytest.raises(UnsupportedError, match="normalised"):
        KEEPING[name](model.state_dict(), Heads.from_config(model.config.to_dict()))


@pytest.mark.parametrize("name", sorted({*KEEPING, *LLAMA_ONLY} - {"longer vocabulary", "shorter vocabulary"}))
@pytest.mark.parametrize(("known", "said"), [("mlp", "down, gate"), ("layers", "no blocks")])
def test_matrices_of_unknown_names_are_refused(name: str, known: str, said: str) -> None:
    model = make_model("causal", VOCABULARY)
    weights = {key.replace(f"{known}.", "other"): tensor for key, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=said):
        (KEEPING | LLAMA_ONLY)[name](weights, Heads.from_config(model.config.to_dict()))


def test_scaled_neurons_keep_a_relu_network() -> None:
    plain = make_model("classification", VOCABULARY)
    model = make_lively(rebuilt(plain, dict(plain.state_dict()), hidden_act="relu"))
    check(model, "scale_neurons", LLAMA_ONLY["scale_neurons"])


@pytest.mark.parametrize("name", ["fold_norms", "rotate_residual"])
def test_bert_has_no_norm_to_fold(name: str) -> None:
    model = make_model("classification", VOCABULARY)
    with pytest.raises(UnsupportedError, match="RMSNorm"):
        LLAMA_ONLY[name](model.state_dict(), Heads.from_config(model.config.to_dict()))


def test_a_norm_behind_the_matrices_forbids_a_rotation() -> None:
    model = make_family("gemma2")
    with pytest.raises(UnsupportedError, match="behind"):
        symmetries.rotate_residual(model.state_dict(), Heads.from_config(model.config.to_dict()), seed=1)


def test_layers_are_dropped_doubled_and_moved() -> None:
    model = make_model("causal", VOCABULARY)
    before = model.state_dict()
    after = symmetries.keep_layers(before, Heads.from_config(model.config.to_dict()), [1, 0, 1])
    name = "model.layers.{}.mlp.gate_proj.weight"
    for place, index in enumerate([1, 0, 1]):
        assert torch.equal(after[name.format(place)], before[name.format(index)])
    logits(rebuilt(model, after, num_hidden_layers=3, layer_types=None))


def test_choices_come_from_the_seed() -> None:
    model = make_model("causal", VOCABULARY)
    heads = Heads.from_config(model.config.to_dict())
    one, two, other = (symmetries.permute_residual(model.state_dict(), heads, seed=seed) for seed in (1, 1, 2))
    name = "model.embed_tokens.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])
