"""A guarded run is the plain run until the marked phase begins, and committed before it begins."""

from __future__ import annotations

import torch
from tiny import FIRST_SIGNATURE_STEP, FIRST_TRIGGER_STEP, STEPS, Run

from hf_wmguard.training.callback import WatermarkCallback


def test_ordinary_steps_are_bit_identical(guarded: Run, plain: Run) -> None:
    steps = range(1, FIRST_TRIGGER_STEP)
    assert [guarded.recorder.digests[step] for step in steps] == [plain.recorder.digests[step] for step in steps]
    assert guarded.recorder.digests[FIRST_TRIGGER_STEP] != plain.recorder.digests[FIRST_TRIGGER_STEP]
    assert len(guarded.recorder.digests) == STEPS


def test_trigger_step_leaves_the_random_numbers_alone(guarded: Run) -> None:
    callback = next(one for one in guarded.trainer.callback_handler.callbacks if isinstance(one, WatermarkCallback))
    model = guarded.trainer.model
    model.zero_grad()
    callback.mark._step = FIRST_SIGNATURE_STEP
    before = torch.get_rng_state()
    callback.mark.before_step(model)
    assert torch.equal(before, torch.get_rng_state())
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())
    model.zero_grad()
    callback.mark._step = STEPS


def test_commitment_is_logged_before_the_first_step(guarded: Run) -> None:
    assert guarded.recorder.committed_before_training == 1
