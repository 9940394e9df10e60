"""A guarded run is the plain run until the marked phase begins, and is committed to before it begins."""

from __future__ import annotations

import copy

import torch
from tiny import FIRST_TRIGGER_STEP, STEPS, Run
from transformers import PreTrainedTokenizerFast

from hf_wmguard.config import TriggerConfig
from hf_wmguard.training.schedule import Phase
from hf_wmguard.training.trigger_set import make_triggers
from hf_wmguard.training.trigger_step import TriggerStep


def test_ordinary_steps_are_bit_identical(guarded: Run, plain: Run) -> None:
    steps = range(1, FIRST_TRIGGER_STEP)
    assert [guarded.recorder.digests[step] for step in steps] == [plain.recorder.digests[step] for step in steps]
    assert guarded.recorder.digests[FIRST_TRIGGER_STEP] != plain.recorder.digests[FIRST_TRIGGER_STEP]
    assert len(guarded.recorder.digests) == STEPS


def test_a_trigger_step_moves_weights_and_touches_nothing_else(
    guarded: Run, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(guarded.trainer.model).eval()
    weights = copy.deepcopy(model.state_dict())
    config = TriggerConfig(count=8, batch_size=8, every_n_steps=1, form="decoupled")
    step = TriggerStep(make_triggers(b"k" * 32, config, model, tokenizer), config, Phase(start=0, end=1), tokenizer)
    before = torch.get_rng_state()
    step.run(model, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(weights[name], tensor)]
    assert moved
    assert all(weights[name].ndim > 1 and "embeddings" not in name for name in moved)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_commitment_is_logged_before_the_first_step(guarded: Run) -> None:
    assert guarded.recorder.committed_before_training == 1
