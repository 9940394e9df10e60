"""A suspect judged with and without the owner's original, and innocents that must not be drawn to the mark."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import make_marked, make_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_wmguard import WatermarkConfig, verify
from hf_wmguard.errors import ConfigError, FormatError
from hf_wmguard.robustness import symmetries
from hf_wmguard.suspects.roles import Heads
from hf_wmguard.verification import Report

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A post hoc marked model and what it was before."""

    config: WatermarkConfig
    model: PreTrainedModel
    before: State

    @property
    def heads(self) -> Heads:
        return Heads.from_config(self.model.config.to_dict())

    @property
    def state(self) -> State:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def judge(self, suspect: State, **kwargs: object) -> Report:
        return verify(suspect, owner_key=self.config.owner_key, registry=self.config.registry, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    before = make_model("causal", 400).state_dict()
    config, model = make_marked(tmp_path_factory.mktemp("original"))
    return Marked(config=config, model=model, before=before)


def _everything(state: State, heads: Heads) -> State:
    for change in (
        symmetries.permute_residual,
        symmetries.permute_neurons,
        symmetries.scale_neurons,
        symmetries.permute_heads,
        symmetries.scale_queries,
        symmetries.map_values,
    ):
        state = change(state, heads, seed=3)
    return state


@pytest.mark.parametrize(
    "change",
    [
        lambda state, heads: symmetries.permute_residual(state, heads, seed=1),
        lambda state, heads: symmetries.rotate_residual(state, heads, seed=1),
        lambda state, heads: symmetries.split_neurons(state, heads, count=8, seed=1),
        _everything,
        lambda state, heads: {name: tensor.bfloat16() for name, tensor in _everything(state, heads).items()},
    ],
    ids=["permuted", "rotated", "split", "everything", "everything in bf16"],
)
def test_a_symmetry_is_undone(marked: Marked, change: Callable[[State, Heads], State]) -> None:
    suspect = change(marked.state, marked.heads)
    report = marked.judge(suspect, original=marked.model)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.payload_decoded
    assert report.signature.alignment not in ("none", "norms", "contents")
    # Plain, with norms set back and aligned, each with every weighting of the steps.
    assert report.tests_corrected_for >= 8


def test_without_the_original_a_permuted_stream_is_not_found(marked: Marked) -> None:
    report = marked.judge(symmetries.permute_residual(marked.state, marked.heads, seed=1))
    assert report.verdict == "not_detected"


def test_layers_in_another_order_and_other_names_are_found_by_contents(marked: Marked) -> None:
    swapped = {re.sub(r"layers\.(\d)", lambda m: f"layers.{1 - int(m[1])}", n): t for n, t in marked.state.items()}
    renamed = {f"tensor_{index}": tensor for index, tensor in enumerate(marked.state.values())}
    for suspect in (swapped, renamed):
        report = marked.judge(suspect)
        assert report.verdict == "detected"
        assert report.signature is not None
        assert report.signature.alignment == "contents"
        assert report.signature.payload_decoded


def test_scaled_rows_and_columns_are_set_back_without_the_original(marked: Marked) -> None:
    draw = torch.Generator().manual_seed(3)

    def factors(count: int) -> Tensor:
        return torch.exp(torch.randn(count, generator=draw))

    scaled = {
        name: factors(t.shape[0])[:, None] * t * factors(t.shape[1]) if t.dim() == 2 else t
        for name, t in marked.state.items()
    }
    report = marked.judge(scaled)
    assert report.verdict == "detected"
    assert report.signature is not None
    assert report.signature.alignment == "norms"
    assert report.signature.payload_decoded


def _innocents(marked: Marked) -> dict[str, State]:
    torch.manual_seed(11)
    stranger = type(marked.model)(marked.model.config).state_dict()
    return {
        "stranger": dict(stranger),
        "base": marked.before,
        "base, permuted": symmetries.permute_residual(marked.before, marked.heads, seed=1),
        "base, everything": _everything(marked.before, marked.heads),
    }


def test_alignment_does_not_draw_an_innocent_model_to_the_mark(marked: Marked) -> None:
    for name, suspect in _innocents(marked).items():
        report = marked.judge(suspect, original=marked.model)
        assert report.verdict == "not_detected", name
        assert report.log10_p > -3, name


def test_an_original_of_another_architecture_is_refused(marked: Marked, tmp_path: Path) -> None:
    other = make_model("classification", 400)
    with pytest.raises(FormatError, match="does not hold"):
        marked.judge(marked.state, original=other)
    with pytest.raises(ConfigError):
        # A state dict has no config that says how attention is divided.
        marked.judge(marked.state, original=marked.state)


def test_a_decoy_does_not_hide_a_mark_that_lies_where_it_should(marked: Marked) -> None:
    """Whoever has the base can add its tiles under other names, where a search by contents finds them."""
    decoy = {f"junk.{index}.weight": tensor for index, tensor in enumerate(marked.before.values()) if tensor.dim() == 2}
    plain, suspect = marked.judge(marked.state), marked.judge({**marked.state, **decoy})
    assert suspect.verdict == "detected"
    assert suspect.signature is not None
    assert suspect.signature.payload_decoded
    assert suspect.log10_p == pytest.approx(plain.log10_p, rel=0.01)


def test_a_whole_model_scaled_out_of_all_proportion_is_read_by_its_norms(marked: Marked) -> None:
    for factor in (1e-30, 1e30):
        report = marked.judge({name: factor * tensor for name, tensor in marked.state.items()})
        assert report.verdict == "detected"
        assert report.signature is not None
        assert (report.signature.alignment, report.signature.payload_decoded) == ("norms", True)
