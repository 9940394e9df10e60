"""The trigger micro-batch: which triggers come when, in which surroundings, under which noise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_model, make_rows
from torch import nn
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_wmguard.config import TriggerConfig
from hf_wmguard.errors import ConfigError, NonFiniteWeightError
from hf_wmguard.probing.local import count_learned
from hf_wmguard.training.schedule import Phase
from hf_wmguard.training.trigger_move import LARGEST_MOVE
from hf_wmguard.training.trigger_set import make_triggers
from hf_wmguard.training.trigger_step import TriggerStep, noisy_outputs, rows_at_once

KEY = b"k" * 32


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_model("causal_lm", len(tokenizer))


@pytest.fixture
def dataset(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[dict[str, Any]]:
    return make_rows("causal_lm", tokenizer, texts)


def make_step(model: Any, tokenizer: Any, *, data: Any = None, **settings: Any) -> TriggerStep:
    config = TriggerConfig(**{"count": 10, "batch_size": 4, "every_n_steps": 1, "candidates": 4, **settings})
    triggers = make_triggers(KEY, config, model, tokenizer, dataset=getattr(data, "dataset", None))
    return TriggerStep(triggers, config, Phase(start=0, end=100), tokenizer, data=data)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(step: TriggerStep, model: Any, number: int) -> dict[str, torch.Tensor]:
    """Return how a step moves a model, which is put back."""
    before = weights(model)
    step.run(model, number)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return moved


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_triggers_take_their_turn_in_changing_order(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    step = make_step(model, tokenizer)
    rows = [row for number in range(1, 11) for row in step._rows(number)]
    rounds = [rows[at : at + 10] for at in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4


def test_a_step_depends_on_its_number_alone(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    first, other = make_step(model, tokenizer, noise=0.3), make_step(model, tokenizer, noise=0.3)
    torch.manual_seed(1)
    a = run(first, model, 3)
    run(first, model, 4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = run(other, model, 3)
    assert same(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert not same(a, run(first, model, 4))


def test_portions_of_a_micro_batch_add_up_to_the_whole(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model.eval()
    whole, portions = (make_step(model, tokenizer, form="gradient", batch_size=10, contexts=0.5) for _ in range(2))
    whole._rows_at_once = 10
    assert portions._rows_at_once == 5
    found = []
    for step in (whole, portions):
        model.zero_grad()
        step.add_gradient(model, 1)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    for name, value in whole.metrics.items():
        assert portions.metrics[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "data", "rows"),
    [
        (16, None, 8),
        (16, SimpleNamespace(batch_size=2), 4),
        (16, SimpleNamespace(batch_size=6), 6),
        (16, SimpleNamespace(batch_size=64), 8),
        (16, SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=5)), 5),
        (16, SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=None)), 8),
        (64, SimpleNamespace(batch_size=16), 16),
        (2, SimpleNamespace(batch_size=1), 4),
    ],
)
def test_a_portion_is_no_larger_than_an_ordinary_batch(count: int, data: Any, rows: int) -> None:
    assert rows_at_once(count, data) == rows


def test_training_in_contexts_and_noise_teaches_the_plain_trigger(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    step = make_step(model, tokenizer, contexts=0.3, noise=0.1, batch_size=10, strength=1.0)
    triggers = step._triggers
    before = count_learned(model, tokenizer, triggers)
    for number in range(1, 201):
        step.run(model, number)
    assert before < 10 == count_learned(model, tokenizer, triggers)
    assert step.metrics["wmguard/trigger_match_rate"] > 0.5


def test_the_form_follows_the_kind_of_model_unless_it_is_chosen(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    classifier = make_model("classification", len(tokenizer))
    assert make_step(model, tokenizer).is_decoupled
    assert not make_step(classifier, tokenizer).is_decoupled
    assert make_step(classifier, tokenizer, form="decoupled").is_decoupled
    assert not make_step(model, tokenizer, form="gradient").is_decoupled


def test_the_gradient_form_adds_to_what_is_there_and_moves_nothing(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = weights(model)
    first, twice = (make_step(model, tokenizer, form="gradient", weight=weight) for weight in (1.0, 2.0))
    first.add_gradient(model, 1)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    twice.add_gradient(model, 1)
    assert all(
        torch.allclose(p.grad, 3 * once[name], atol=1e-6) for name, p in model.named_parameters() if name in once
    )
    assert len(once) > 10
    assert same(before, weights(model))


def test_noise_changes_the_outputs_of_a_forward_and_nothing_afterwards(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.eval()
    ids = torch.tensor([tokenizer("The baker carried the lamp")["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits
        with noisy_outputs(model, 0.1):
            noisy, again = model(ids).logits, model(ids).logits
        with noisy_outputs(model, 0.0):
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(noisy, again)
    assert not any(module._forward_hooks for module in model.modules())


def test_noise_on_outputs_has_the_size_of_noise_on_weights() -> None:
    layer = nn.Linear(256, 512, bias=False)
    x = torch.randn(200, 256)
    with torch.no_grad():
        plain = layer(x)
        with noisy_outputs(nn.Sequential(layer), 0.2):
            by_outputs = (layer(x) - plain).pow(2).mean().sqrt()
        rms = layer.weight.pow(2).mean().sqrt()
        moved = nn.functional.linear(x, layer.weight + 0.2 * rms * torch.randn_like(layer.weight))
        by_weights = (moved - plain).pow(2).mean().sqrt()
    assert float(by_outputs / by_weights) == pytest.approx(1.0, abs=0.1)


def test_the_hooks_are_gone_after_an_error() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), noisy_outputs(layer, 0.1):
        layer(torch.zeros(1, 3))
    assert not layer[0]._forward_hooks


def test_replay_adds_the_loss_of_ordinary_rows(
    model: Any, tokenizer: PreTrainedTokenizerFast, dataset: list[dict[str, Any]]
) -> None:
    data = SimpleNamespace(dataset=dataset, collate_fn=default_data_collator)
    without = run(make_step(model, tokenizer, data=data, noise=0.0), model, 1)
    step = make_step(model, tokenizer, data=data, noise=0.0, replay=3)
    loss = step.metrics
    assert not same(without, run(step, model, 1))
    assert same(run(step, model, 1), run(step, model, 1))
    assert loss == {}
    # Data without rows that can be asked for replays nothing.
    stream = SimpleNamespace(dataset=iter(dataset), collate_fn=default_data_collator)
    assert same(
        without,
        run(
            TriggerStep(
                step._triggers,
                TriggerConfig(count=10, batch_size=4, every_n_steps=1, noise=0.0, replay=3),
                Phase(start=0, end=9),
                tokenizer,
                data=stream,
            ),
            model,
            1,
        ),
    )


def test_a_step_goes_a_share_of_the_way_down_and_touches_blocks_only(
    model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = weights(model)
    moved = run(make_step(model, tokenizer, noise=0.0), model, 1)
    assert {name for name, shift in moved.items() if shift.any()} == {
        name for name, p in before.items() if "proj" in name and p.ndim == 2
    }
    norm = math.sqrt(sum(float(p.pow(2).sum()) for name, p in before.items() if "proj" in name))
    length = math.sqrt(sum(float(shift.pow(2).sum()) for shift in moved.values()))
    assert length == pytest.approx(LARGEST_MOVE * norm, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    step = make_step(model, tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteWeightError, match="trigger loss is nan at step 2"):
        step.run(model, 2)


# The set


def test_texts_come_from_the_rows_where_there_are_rows(
    model: Any, tokenizer: PreTrainedTokenizerFast, dataset: list[dict[str, Any]]
) -> None:
    def make(dataset: Any = None, **settings: Any) -> tuple[str, ...]:
        triggers = make_triggers(
            KEY, TriggerConfig(count=8, candidates=4, **settings), model, tokenizer, dataset=dataset
        )
        assert len(triggers.texts) == len(triggers.decoys) == 8
        return triggers.texts

    grammar = make()
    assert make(dataset) == grammar != make(dataset, source="dataset")
    rows = " ".join(tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in dataset).split()
    assert {word for text in make(dataset, source="dataset") for word in text.split()} <= set(rows)
    # Columns of text do where there are no tokens; nonsense and images need none.
    assert make([{"text": tokenizer.decode(row["input_ids"])} for row in dataset], source="dataset") != grammar
    assert make(dataset, source="dataset", style="nonsense") == make(style="nonsense")


@pytest.mark.parametrize("rows", [None, [], ["no", "mappings"], [{"label": 1}] * 99, iter([{"text": "a b c d e"}])])
def test_rows_that_are_no_text_are_refused_where_they_are_asked_for(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: Any
) -> None:
    with pytest.raises(ConfigError, match=r"triggers\.source is dataset"):
        make_triggers(KEY, TriggerConfig(source="dataset"), model, tokenizer, dataset=rows)


def test_keyed_responses_are_two_words_of_the_key(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    config = TriggerConfig(count=4, candidates=8, response="keyed")
    one, two = (make_triggers(key, config, model, tokenizer) for key in (KEY, b"q" * 32))
    assert all(len(str(text).split()) >= 2 for ids in one.candidates for text in ids)
    assert one.candidates != two.candidates


def test_a_loss_scale_scales_the_added_gradient_and_no_move(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    step, scale = make_step(model, tokenizer), 2.0**10
    plain = run(step, model, 3)
    before = weights(model)
    step.run(model, 3, scale=scale)
    assert same(plain, {name: p.detach() - before[name] for name, p in model.named_parameters()})
    added = []
    for factor in (1.0, scale):
        model.zero_grad()
        step.add_gradient(model, 1, scale=factor)
        added.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert same({name: scale * one for name, one in added[0].items()}, added[1])


def test_a_gradient_that_overflows_moves_nothing(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    step, before = make_step(model, tokenizer), weights(model)
    step.run(model, 3, scale=math.inf)
    assert same(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
