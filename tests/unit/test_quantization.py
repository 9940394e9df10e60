"""Rounding to few bits, against definitions that share no code with it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from hf_wmguard.errors import MissingDependencyError
from hf_wmguard.robustness.ggml import TYPES, quantize_gguf
from hf_wmguard.robustness.quantization import NF4_CODEBOOK, quantize_groups, quantize_llm_int8, quantize_nf4

NAME = "layers.0.w"


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 160, generator=torch.Generator().manual_seed(0))


def test_the_nf4_code_book_is_the_quantiles_of_a_normal_distribution() -> None:
    # QLoRA, sec. 3: 8 quantiles above zero, 7 below and zero itself, the outermost at 1.
    outermost = 0.9677083
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(
        torch.tensor(NF4_CODEBOOK, dtype=torch.float64), levels / levels.max(), atol=1e-6, rtol=0
    )


def test_nf4_takes_the_nearest_level_of_each_block(weight: Tensor) -> None:
    after = quantize_nf4({NAME: weight})[NAME]
    for start in range(0, weight.numel(), 64):
        before = weight.flatten()[start : start + 64]
        levels = torch.tensor(NF4_CODEBOOK) * before.abs().max()
        nearest = levels[(before[:, None] - levels).abs().argmin(dim=1)]
        torch.testing.assert_close(after.flatten()[start : start + 64], nearest)


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_round_to_a_symmetric_grid(weight: Tensor, bits: int) -> None:
    after = quantize_groups({NAME: weight}, bits)[NAME]
    top = 2 ** (bits - 1) - 1
    # 160 columns: two whole groups and one of 32.
    for start, end in ((0, 64), (64, 128), (128, 160)):
        step = weight[:, start:end].abs().amax(dim=1, keepdim=True) / top
        levels = after[:, start:end] / step
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert float(levels.abs().max()) == pytest.approx(top)
        assert float(((after - weight)[:, start:end] / step).abs().max()) <= 0.5 + 1e-4


def test_llm_int8_keeps_outlier_columns_in_half_precision(weight: Tensor) -> None:
    weight[:, 7] *= 50
    outliers = torch.zeros(160, dtype=torch.bool)
    outliers[7] = True
    kept = quantize_llm_int8({NAME: weight}, {NAME: outliers})[NAME]
    assert torch.equal(kept[:, 7], weight[:, 7].half().float())
    plain = quantize_llm_int8({NAME: weight})[NAME]
    rest = ~outliers
    # One large column stretches every row's grid, which is why the method exists.
    assert float((kept - weight)[:, rest].norm()) < 0.2 * float((plain - weight)[:, rest].norm())
    step = weight.half().float()[:, rest].abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(kept[:, rest] / step, (kept[:, rest] / step).round(), atol=1e-3, rtol=0)


def test_gguf_q8_0_has_one_half_precision_scale_for_32_weights(weight: Tensor) -> None:
    after = quantize_gguf({NAME: weight}, "Q8_0")[NAME].reshape(-1, 32)
    blocks = weight.reshape(-1, 32)
    exact = blocks.abs().amax(dim=1, keepdim=True) / 127
    levels = after / exact.half().float()
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert float(((after - blocks) / exact).abs().max()) < 0.6


def test_gguf_types_with_fewer_bits_err_more(weight: Tensor) -> None:
    errors = {kind: float((quantize_gguf({NAME: weight}, kind)[NAME] - weight).norm()) for kind in TYPES}
    assert list(errors.values()) == sorted(errors.values())
    odd = {NAME: weight[:, :50]}
    assert torch.equal(quantize_gguf(odd, "Q4_0")[NAME], odd[NAME])


def test_gguf_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="gguf"):
        quantize_gguf({}, "Q8_0")
