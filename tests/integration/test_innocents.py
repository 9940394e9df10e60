"""Models that do not bear the mark are not detected, and what cannot be read is said to be so, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Run
from torch import Tensor, nn

from hf_wmguard import WatermarkConfig, verify
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import commit, new_record, new_salt
from hf_wmguard.suspects.signature import OWNER_WEIGHTS
from hf_wmguard.training.backends import WholeParameters
from hf_wmguard.watermark.planner import ERROR_LEVELS
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import move_, read_projections, residual

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def commit_to(config: WatermarkConfig, model: nn.Module, iteration: str) -> WatermarkRecord:
    """Commit an owner to a model, as a training of it does before its first step."""
    weights = WholeParameters(model)
    owner = OwnerKey.load(config.owner_key)
    record = new_record(
        owner,
        replace(config, iteration=iteration),
        salt=new_salt(),
        shapes=weights.shapes(),
        read=weights.read,
    )
    commit(record, Path(config.registry), owner)
    return record


def mark(weights: Weights, record: WatermarkRecord, owner: OwnerKey) -> Weights:
    """Return the weights with the whole mark of a record."""
    marked = {name: tensor.clone() for name, tensor in weights.items()}
    for key in record.carrier_keys(owner):
        tile = marked[key.carrier.name][key.carrier.row_start : key.carrier.row_start + key.carrier.rows]
        move_(tile, key, residual(read_projections(tile, key), key))
    return marked


def where(config: WatermarkConfig) -> dict[str, str]:
    return {"owner_key": config.owner_key, "registry": config.registry}


def test_an_unmarked_sibling_of_the_same_start_and_data(guarded: Run, plain: Run) -> None:
    assert verify(guarded.trainer.model, **guarded.where).verdict == "detected"
    report = verify(plain.trainer.model, **guarded.where)
    assert (report.verdict, report.reason) == ("not_detected", None)
    assert report.log10_p > -3
    assert report.signature.carriers_missing == 0
    assert not report.signature.payload_decoded


def test_a_model_that_another_owner_marked(
    guarded: Run, plain: Run, make_config: Callable[..., WatermarkConfig]
) -> None:
    """The other owner committed to the very model that this one was trained from."""
    config = make_config(model_id="other/tiny")
    commit_to(config, plain.trainer.model, "1")
    report = verify(guarded.trainer.model, **where(config))
    assert (report.verdict, report.reason) == ("not_detected", None)
    assert report.log10_p > -3


def test_every_commitment_and_weighting_is_corrected_for(
    plain: Run, make_config: Callable[..., WatermarkConfig]
) -> None:
    config = make_config()
    records = [commit_to(config, plain.trainer.model, str(number)) for number in range(1, 6)]
    report = verify(plain.trainer.model, **where(config))
    # As it is, and with a merge undone at each of the weights.
    weightings = sum(len(ERROR_LEVELS) if len(r.steps.parts) > 1 else 1 for r in records)
    assert report.tests_corrected_for == weightings * (1 + len(OWNER_WEIGHTS))
    assert report.verdict == "not_detected"
    assert report.log10_p == pytest.approx(min(0.0, report.signature.log10_p + math.log10(report.tests_corrected_for)))
    marked = mark(weights_of(plain.trainer.model), records[2], OwnerKey.load(config.owner_key))
    found = verify(marked, **where(config))
    assert (found.verdict, found.iteration) == ("detected", "3")
    assert found.log10_p == pytest.approx(found.signature.log10_p + math.log10(found.tests_corrected_for))
    # A scaled suspect is read once more, and that is counted too.
    scaled = {name: 3 * tensor for name, tensor in marked.items()}
    again = verify(scaled, **where(config))
    assert (again.verdict, again.signature.alignment) == ("detected", "norms")
    assert again.tests_corrected_for == found.tests_corrected_for + weightings


def test_a_second_marking_leaves_the_first_and_claims_nothing_of_others(
    plain: Run, make_config: Callable[..., WatermarkConfig]
) -> None:
    """The baseline of the second iteration holds the first mark, and still finds nothing in an unmarked sibling."""
    config = make_config()
    owner, model = OwnerKey.load(config.owner_key), plain.trainer.model
    before = weights_of(model)
    once = mark(before, commit_to(config, model, "1"), owner)
    try:
        model.load_state_dict(once)
        twice = mark(once, commit_to(config, model, "2"), owner)
    finally:
        model.load_state_dict(before)
    found = verify(twice, **where(config))
    assert (found.verdict, found.iteration) == ("detected", "2")
    only_first = verify(once, **where(config))
    assert (only_first.verdict, only_first.iteration) == ("detected", "1")
    # Scaled, so that norms measured after the first mark are put on weights without any.
    draw = torch.Generator().manual_seed(4)
    sibling = {
        name: tensor * torch.exp(0.5 * torch.randn(tensor.shape[-1], generator=draw)) if tensor.ndim == 2 else tensor
        for name, tensor in before.items()
    }
    report = verify(sibling, **where(config))
    assert report.verdict == "not_detected"
    assert report.log10_p > -3
    assert report.tests_corrected_for > found.tests_corrected_for


def _without(weights: Weights, names: list[str]) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def _with_nan(weights: Weights, names: list[str]) -> Weights:
    return {name: tensor * math.nan if name in names else tensor for name, tensor in weights.items()}


def _as_integers(weights: Weights, names: list[str]) -> Weights:
    return {name: (100 * tensor).to(torch.int32) if name in names else tensor for name, tensor in weights.items()}


def _of_another_shape(weights: Weights, names: list[str]) -> Weights:
    return {name: tensor[:, 1:] if name in names else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("damage", [_without, _with_nan, _as_integers, _of_another_shape])
def test_what_cannot_be_read_is_said(plain: Run, guarded: Run, damage: Callable[..., Weights]) -> None:
    weights = weights_of(plain.trainer.model)
    names = [name for name in weights if "encoder.layer" in name and weights[name].ndim == 2]
    report = verify(damage(weights, names[1:]), **guarded.where)
    assert report.verdict == "inconclusive"
    assert report.log10_p > -3
    assert report.reason is not None
    assert report.reason.startswith(f"1 of {len(names)} carriers could be read")
    assert report.to_json()["reason"] == report.reason
    assert (report.signature.carriers_read, report.signature.carriers_missing) == (1, len(names) - 1)
    # Where enough is left, a mark that is not there is a finding.
    assert verify(damage(weights, names[:2]), **guarded.where).verdict == "not_detected"


def test_a_mark_in_what_is_left_is_found_all_the_same(guarded: Run) -> None:
    weights = weights_of(guarded.trainer.model)
    names = [name for name in weights if "encoder.layer" in name and weights[name].ndim == 2]
    report = verify(_without(weights, names[2:]), **guarded.where)
    assert (report.verdict, report.reason) == ("detected", None)
