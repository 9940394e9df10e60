"""The literal list of attacks and their strengths. `suite` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.robustness import (
    attacks,
    calibrated,
    compression,
    finetuning,
    ggml,
    merging,
    quantization,
    structure,
    symmetries,
)
from hf_wmguard.robustness.overwriting import overwrite
from hf_wmguard.robustness.target import Target
from hf_wmguard.suspects.roles import Heads

_MISSING = {
    "base": "needs --base, the folder of what the model was fine-tuned from",
    "other": "needs --other, the folder of another fine-tune",
    "corpus": "needs --data or --text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One row of the suite.

    Args:
        name: What ``--attacks`` takes.
        family: Attacks that are shown together.
        label: Written in tables, with ``{}`` for the strength.
        strengths: From weak to strong.
        run: Returns the attacked state dict.
        axis: What the strength is; empty where it is no scale.
        needs: Fields of `Target` it cannot do without.
        loads: Whether the result goes back into the model, so that its utility can be measured.
        aligned: Whether it is judged with the unattacked model at hand, as `verify` takes an ``original``.
    """

    name: str
    family: str
    label: str
    strengths: tuple[float, ...]
    run: Callable[[Target, float], dict[str, Tensor]]
    axis: str = ""
    needs: tuple[str, ...] = ()
    loads: bool = True
    aligned: bool = False

    def missing(self, target: Target) -> str | None:
        """Return what the attack lacks, or None."""
        lacks = [_MISSING[need] for need in self.needs if getattr(target, need) is None]
        return "; ".join(lacks) or None


def _outliers(target: Target) -> Mapping[str, Tensor]:
    if target.corpus is None:
        return {}
    return {name: seen.largest.cpu() >= quantization.LLM_INT8_THRESHOLD for name, seen in target.inputs.items()}


def _inputs(target: Target) -> Mapping[str, calibrated.Inputs]:
    if not target.inputs:
        raise UnsupportedError("the model's blocks have no linear layers", hint="this attack is for linear layers")
    return target.inputs


def _rows(target: Target) -> finetuning.Rows:
    return target.corpus.train if target.corpus else []


def _dict(tensors: attacks.StateDict | None) -> attacks.StateDict:
    return tensors or {}


_Change = Callable[[Target, attacks.StateDict, Heads], dict[str, Tensor]]
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def _scale_neurons(target: Target, tensors: attacks.StateDict, heads: Heads) -> dict[str, Tensor]:
    config = target.model.config
    activation = next((getattr(config, name) for name in _ACTIVATIONS if hasattr(config, name)), None)
    if activation != "relu" and not symmetries.is_gated(tensors, heads):
        raise UnsupportedError(
            f"neurons of {activation} without a gate cannot be scaled", hint="this needs gated neurons, or ReLU"
        )
    return symmetries.scale_neurons(tensors, heads, seed=0)


def _seeded(change: Callable[..., dict[str, Tensor]]) -> _Change:
    return lambda t, w, h: change(w, h, seed=0)


def _more_neurons(change: Callable[..., dict[str, Tensor]]) -> _Change:
    return lambda t, w, h: change(w, h, count=symmetries.neuron_count(w, h) // 4, seed=0)


# What is done, how it is written in tables, and whether the result goes back into the model.
_SYMMETRIES: Mapping[str, tuple[_Change, str, bool]] = {
    "permute-residual": (_seeded(symmetries.permute_residual), "residual stream permuted", True),
    "rotate-residual": (_seeded(symmetries.rotate_residual), "residual stream rotated", True),
    "fold-norms": (lambda t, w, h: symmetries.fold_norms(w, h), "norms folded into matrices", True),
    "permute-neurons": (_seeded(symmetries.permute_neurons), "neurons permuted", True),
    "scale-neurons": (_scale_neurons, "neurons scaled", True),
    "add-neurons": (_more_neurons(symmetries.add_neurons), "a quarter more, silent neurons", False),
    "split-neurons": (_more_neurons(symmetries.split_neurons), "a quarter of the neurons split", False),
    "permute-heads": (_seeded(symmetries.permute_heads), "heads permuted", True),
    "scale-queries": (_seeded(symmetries.scale_queries), "keys scaled, queries back", True),
    "rotate-queries": (_seeded(symmetries.rotate_queries), "keys mapped, queries back", True),
    "map-values": (_seeded(symmetries.map_values), "values mapped, O back", True),
}


def _all_symmetries(target: Target, tensors: attacks.StateDict, heads: Heads) -> dict[str, Tensor]:
    """Return a model after every symmetry that it has, one after the other."""
    changed = None
    for change, _, _ in _SYMMETRIES.values():
        try:
            changed = change(target, tensors if changed is None else changed, heads)
        except UnsupportedError:
            continue
    if changed is None:
        raise UnsupportedError("the model has none of the symmetries", hint="its matrices have names of no known kind")
    return changed


def _symmetry(name: str, change: _Change, label: str, loads: bool) -> Attack:
    return Attack(
        name=name,
        family="symmetries",
        label=label,
        strengths=(0,),
        loads=loads,
        aligned=True,
        run=lambda t, s: change(t, t.tensors, Heads.from_config(t.model.config.to_dict())),
    )


_WEIGHTS = (0.5, 0.3, 0.1)
_OWNER = "owner's weight"
BASELINE = Attack(
    name="none", family="unattacked", label="unattacked", strengths=(0,), run=lambda t, s: dict(t.tensors)
)
ATTACKS: tuple[Attack, ...] = (
    *(
        Attack(
            name=name,
            family="storage",
            label=f"cast to {name}",
            strengths=(0,),
            run=lambda t, s, dtype=dtype: attacks.cast(t.tensors, dtype),  # type: ignore[misc]
        )
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    ),
    Attack(
        name="reshard",
        family="storage",
        label="other order of tensors",
        strengths=(0,),
        loads=False,
        run=lambda t, s: structure.shuffle_order(t.tensors),
    ),
    Attack(
        name="prefix",
        family="storage",
        label="prefixed names",
        strengths=(0,),
        loads=False,
        run=lambda t, s: structure.add_prefix(t.tensors),
    ),
    Attack(
        name="rename",
        family="storage",
        label="names without meaning",
        strengths=(0,),
        loads=False,
        run=lambda t, s: structure.rename(t.tensors),
    ),
    Attack(
        name="transpose",
        family="storage",
        label="transposed matrices",
        strengths=(0,),
        loads=False,
        run=lambda t, s: structure.transpose(t.tensors),
    ),
    Attack(
        name="int8",
        family="quantization",
        label="INT8 per row",
        strengths=(8,),
        run=lambda t, s: attacks.quantize_int8(t.tensors),
    ),
    Attack(
        name="llm-int8",
        family="quantization",
        label="LLM.int8",
        strengths=(8,),
        run=lambda t, s: quantization.quantize_llm_int8(t.tensors, _outliers(t)),
    ),
    *(
        Attack(
            name=kind.lower(),
            family="quantization",
            label=f"GGUF {kind}",
            strengths=(int(kind[1]),),
            run=lambda t, s, kind=kind: ggml.quantize_gguf(t.tensors, kind),  # type: ignore[misc]
        )
        for kind in ggml.TYPES
    ),
    Attack(
        name="nf4",
        family="quantization",
        label="NF4 block 64",
        strengths=(4,),
        run=lambda t, s: quantization.quantize_nf4(t.tensors),
    ),
    Attack(
        name="int-group64",
        family="quantization",
        label="INT{} group 64",
        strengths=(4, 3),
        run=lambda t, s: quantization.quantize_groups(t.tensors, int(s)),
    ),
    Attack(
        name="gptq",
        family="quantization",
        label="GPTQ W{} group 128",
        strengths=(4, 3),
        needs=("corpus",),
        run=lambda t, s: calibrated.quantize_gptq(t.tensors, _inputs(t), bits=int(s)),
    ),
    Attack(
        name="prune-magnitude",
        family="pruning",
        label="magnitude {}",
        axis="share set to zero",
        strengths=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        run=lambda t, s: attacks.prune_magnitude(t.tensors, s),
    ),
    Attack(
        name="prune-wanda",
        family="pruning",
        label="Wanda {}",
        axis="share set to zero",
        strengths=(0.3, 0.5, 0.7, 0.9),
        needs=("corpus",),
        run=lambda t, s: calibrated.prune_wanda(t.tensors, _inputs(t), s),
    ),
    Attack(
        name="noise",
        family="noise",
        label="Gaussian {} x rms",
        axis="noise, x rms",
        strengths=(0.1, 0.3, 0.5, 1.0),
        run=lambda t, s: attacks.add_noise(t.tensors, s),
    ),
    Attack(
        name="merge-base-linear",
        family="merging",
        label="base, linear, owner {}",
        axis=_OWNER,
        strengths=_WEIGHTS,
        needs=("base",),
        run=lambda t, s: merging.merge_linear(t.tensors, _dict(t.base), s),
    ),
    Attack(
        name="merge-base-slerp",
        family="merging",
        label="base, SLERP, owner {}",
        axis=_OWNER,
        strengths=_WEIGHTS,
        needs=("base",),
        run=lambda t, s: merging.merge_slerp(t.tensors, _dict(t.base), s),
    ),
    Attack(
        name="merge-linear",
        family="merging",
        label="other, linear, owner {}",
        axis=_OWNER,
        strengths=_WEIGHTS,
        needs=("other",),
        run=lambda t, s: merging.merge_linear(t.tensors, _dict(t.other), s),
    ),
    Attack(
        name="merge-slerp",
        family="merging",
        label="other, SLERP, owner {}",
        axis=_OWNER,
        strengths=_WEIGHTS,
        needs=("other",),
        run=lambda t, s: merging.merge_slerp(t.tensors, _dict(t.other), s),
    ),
    Attack(
        name="merge-ties",
        family="merging",
        label="other, TIES, owner {}",
        axis=_OWNER,
        strengths=_WEIGHTS,
        needs=("base", "other"),
        run=lambda t, s: merging.merge_ties(t.tensors, _dict(t.other), _dict(t.base), s),
    ),
    Attack(
        name="merge-dare",
        family="merging",
        label="other, DARE, owner {}",
        axis=_OWNER,
        strengths=_WEIGHTS,
        needs=("base", "other"),
        run=lambda t, s: merging.merge_dare(t.tensors, _dict(t.other), _dict(t.base), s),
    ),
    Attack(
        name="merge-task-arithmetic",
        family="merging",
        label="other, task arithmetic, scale {}",
        axis=_OWNER,
        strengths=(1.0, 0.5, 0.3),
        needs=("base", "other"),
        run=lambda t, s: merging.merge_task_arithmetic(t.tensors, _dict(t.other), _dict(t.base), s),
    ),
    Attack(
        name="svd-delta",
        family="delta compression",
        label="delta to rank {}",
        strengths=(64, 32, 16, 8),
        needs=("base",),
        run=lambda t, s: compression.svd_delta(t.tensors, _dict(t.base), int(s)),
    ),
    Attack(
        name="one-bit-delta",
        family="delta compression",
        label="one-bit delta",
        strengths=(1,),
        needs=("base",),
        run=lambda t, s: compression.one_bit_delta(t.tensors, _dict(t.base)),
    ),
    Attack(
        name="drop-delta",
        family="delta compression",
        label="delta entries dropped {}",
        strengths=(0.5, 0.9),
        needs=("base",),
        run=lambda t, s: compression.drop_delta(t.tensors, _dict(t.base), s),
    ),
    Attack(
        name="drop-layers",
        family="layers",
        label="layers dropped {}",
        axis="share of layers dropped",
        strengths=(0.25, 0.5),
        run=lambda t, s: structure.drop_layers(t.tensors, s),
    ),
    *(_symmetry(name, *row) for name, row in _SYMMETRIES.items()),
    _symmetry("all-symmetries", _all_symmetries, "all that the model has", False),
    Attack(
        name="overwrite",
        family="overwriting",
        label="{} other owners",
        axis="other owners",
        strengths=(1, 5),
        run=lambda t, s: overwrite(t.tensors, int(s)),
    ),
    Attack(
        name="finetune",
        family="training",
        label="full, 3 epochs, lr {}",
        strengths=(2e-5, 1e-4),
        needs=("corpus",),
        run=lambda t, s: finetuning.finetune(t.model, _rows(t), learning_rate=s, epochs=3),
    ),
    Attack(
        name="lora",
        family="training",
        label="LoRA r16 merged, 3 epochs, lr {}",
        strengths=(2e-4,),
        needs=("corpus",),
        run=lambda t, s: finetuning.finetune_lora(t.model, _rows(t), learning_rate=s, epochs=3),
    ),
    Attack(
        name="distill",
        family="training",
        label="distilled afresh, {} epochs",
        strengths=(3,),
        needs=("corpus",),
        run=lambda t, s: finetuning.distill(t.model, _rows(t), learning_rate=1e-3, epochs=s),
    ),
)
