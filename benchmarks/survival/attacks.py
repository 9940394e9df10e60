"""Every row of the table: an attack, what makes it, and what must hold after it.

The attacks on tensors alone are here; those of other tools are made by the adapters beside this file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tasks
import torch
from safetensors.torch import save_file
from tasks import Task
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
PAYLOAD = "payload"
NOTHING = "not detected"
UNMARKED_TWIN = "unmarked_twin"
GROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is attacked.

    Args:
        task: Its task.
        folder: The cell's folder.
        shared: Folder with data and models.
        weights: Plain weights by parameter name.
        base: The public base's, by the same names; where it has none (a classifier's head) the target's own.
    """

    task: Task
    folder: Path
    shared: Path
    weights: Weights
    base: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack.

    Args:
        name: Its name, also of its results.
        must: ``payload``, a bound of log10 p, ``not detected``, or None: measured only.
        tool: Environment of the adapter that makes it, or ``torch``.
        apply: Makes the suspect, for ``torch``: weights, or the path of a folder. None for tools.
        heavy: Takes tens of seconds; only on some seeds unless asked for.
        form: Only for cells of this form.
    """

    name: str
    must: str | float | None
    tool: str = "torch"
    apply: Callable[[Target, Path], Weights | Path] | None = None
    heavy: bool = False
    form: Literal["full", "lora"] | None = None


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """Return whether a parameter is a matrix of the repeated blocks."""
    return tensor.ndim == 2 and (".layer." in name or ".layers." in name)


def _each(change: Callable[[Tensor], Tensor], target: Target, scratch: Path) -> Weights:
    return {name: change(t) if is_block_matrix(name, t) else t for name, t in target.weights.items()}


def _each_delta(change: Callable[[Tensor], Tensor], target: Target, scratch: Path) -> Weights:
    return {
        name: target.base[name] + change(t - target.base[name]) if is_block_matrix(name, t) else t
        for name, t in target.weights.items()
    }


def _untouched(target: Target, scratch: Path) -> Weights:
    return target.weights


def _cast(dtype: torch.dtype, target: Target, scratch: Path) -> Weights:
    return {name: tensor.to(dtype) for name, tensor in target.weights.items()}


def _round_groups(weight: Tensor, *, bits: int, group: int | None) -> Tensor:
    """Return symmetric integers times one scale per group of a row (None: per row)."""
    parts = weight.reshape(-1, group or weight.shape[1])
    top = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return ((parts / scale).round().clamp(-top - 1, top) * scale).view(weight.shape)


def _prune(weight: Tensor, *, share: float) -> Tensor:
    threshold = weight.abs().flatten().kthvalue(max(1, round(share * weight.numel()))).values
    return weight * (weight.abs() > threshold)


def _noise(weight: Tensor, *, level: float) -> Tensor:
    draw = torch.Generator().manual_seed(weight.numel())
    return weight + level * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=draw)


def _truncate(delta: Tensor, *, rank: int) -> Tensor:
    """Return the best approximation of this rank, what a truncated SVD gives; the Gram matrix is far faster."""
    if delta.shape[0] > delta.shape[1]:
        return _truncate(delta.T, rank=rank).T
    wide = delta.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    top = vectors[:, -rank:]
    return (top @ (top.T @ wide)).to(delta.dtype)


def _one_bit(delta: Tensor) -> Tensor:
    return delta.sign() * delta.abs().mean()


def _drop_layers(target: Target, scratch: Path) -> Weights:
    """Drop every fourth block, the others keep their numbers."""
    return {
        name: tensor
        for name, tensor in target.weights.items()
        if not (is_block(name) and int(next(part for part in name.split(".") if part.isdigit())) % 4 == 3)
    }


def is_block(name: str) -> bool:
    """Return whether a parameter belongs to a repeated block."""
    return ".layer." in name or ".layers." in name


FINE_TUNE_BATCHES = 48
FINE_TUNE_EPOCHS = 3


def fine_tuned_elsewhere(task: Task, shared: Path) -> Any:
    """Return the public base after a fine-tuning on another corpus, with the owner's number of labels."""
    model = _for_other_corpus(task, shared, None)
    _train(model, task, shared, task.learning_rate["full"])
    if task.name == "minilm":
        whole = tasks.load_base(task, shared)
        body = {name: t for name, t in model.state_dict().items() if "classifier" not in name}
        whole.load_state_dict(body, strict=False)
        return whole
    return model


def _fine_tune(rate: float, target: Target, scratch: Path) -> Weights:
    """Fine-tune everything on another corpus; a classifier learns other labels with another head."""
    model = _for_other_corpus(target.task, target.shared, target.weights)
    _train(model, target.task, target.shared, rate)
    return _own_head(target, dict(model.named_parameters()))


def _fine_tune_lora(rate: float, target: Target, scratch: Path) -> Weights:
    """Train a LoRA of rank 16 on another corpus and merge it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=target.task.lora_targets)
    model = get_peft_model(_for_other_corpus(target.task, target.shared, target.weights), config)
    _train(model, target.task, target.shared, rate)
    return _own_head(target, dict(model.merge_and_unload().named_parameters()))


def _for_other_corpus(task: Task, shared: Path, weights: Weights | None) -> Any:
    torch.manual_seed(7)
    model = tasks.load_base(task, shared, labels=tasks.OTHER_LABELS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights is not None and not any(part in name for part in tasks.HEAD):
                parameter.copy_(weights[name])
    return model


def _own_head(target: Target, weights: Weights) -> Weights:
    head = {name: tensor for name, tensor in target.weights.items() if any(part in name for part in tasks.HEAD)}
    return {name: tensor.detach() for name, tensor in weights.items()} | head


def _train(model: Any, task: Task, shared: Path, rate: float) -> None:
    rows = tasks.other_rows(task, shared, FINE_TUNE_BATCHES * task.batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
    model.train()
    for epoch in range(FINE_TUNE_EPOCHS):
        for batch in tasks.batches(rows, task.batch, seed=epoch):
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


DISTILL_EPOCHS = 1


def _distill(target: Target, scratch: Path) -> Weights:
    """Teach the model's outputs to the public base, on rows that the owner did not train on."""
    task = target.task
    teacher = tasks.with_weights(task, target.folder / "model", target.weights)
    torch.manual_seed(11)
    student = tasks.load_base(task, target.shared).train()
    optimizer = tasks.optimizer(task, student, "full")
    rows = tasks.training_rows(task, target.shared, seed=9_999)
    for epoch in range(DISTILL_EPOCHS):
        for batch in tasks.batches(rows, task.batch, seed=epoch):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with torch.no_grad():
                wanted = teacher(**inputs).logits.log_softmax(-1)
            got = student(**inputs).logits.log_softmax(-1)
            loss = nn.functional.kl_div(
                got.flatten(0, -2), wanted.flatten(0, -2), reduction="batchmean", log_target=True
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in student.named_parameters()}


def _adapter(target: Target, scratch: Path) -> Path:
    return target.folder / "adapter"


def _adapter_bf16(target: Target, scratch: Path) -> Path:
    return _rewrite_adapter(
        target, scratch / "adapter_bf16", lambda tensors: {k: t.bfloat16() for k, t in tensors.items()}
    )


def _adapter_svd(target: Target, scratch: Path) -> Path:
    """Write the adapter that an SVD of the merged delta gives at the same rank: other factors, the same product."""

    def extract(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        for key, a in tensors.items():
            if ".lora_A." in key:
                other = key.replace(".lora_A.", ".lora_B.")
                u, s, v = torch.linalg.svd(tensors[other] @ a, full_matrices=False)
                rank = a.shape[0]
                out[other] = (u[:, :rank] * s[:rank].sqrt()).contiguous()
                out[key] = (s[:rank].sqrt()[:, None] * v[:rank]).contiguous()
        return out

    return _rewrite_adapter(target, scratch / "adapter_svd", extract)


def _rewrite_adapter(target: Target, folder: Path, change: Callable[[dict[str, Tensor]], Weights]) -> Path:
    from safetensors.torch import load_file

    source = target.folder / "adapter"
    folder.mkdir(parents=True)
    shutil.copy2(source / "adapter_config.json", folder)
    save_file(dict(change(load_file(source / "adapter_model.safetensors"))), folder / "adapter_model.safetensors")
    return folder


def plain_twin(folder: Path) -> Path:
    """Return where the unmarked twin of a marked cell lies: the same data, order and seed."""
    return folder.with_name(folder.name.replace("-marked", "-plain"))


def _twin(target: Target, scratch: Path) -> Path:
    return plain_twin(target.folder) / "model"


def _base(target: Target, scratch: Path) -> Weights:
    return target.base


def _innocent() -> list[Attack]:
    """What is no copy of the model and must not be taken for one."""
    return [
        Attack(name=UNMARKED_TWIN, must=NOTHING, apply=_twin),
        Attack(name="public_base", must=NOTHING, apply=_base),
    ]


def _torch_attacks() -> list[Attack]:
    attacks: list[tuple[str, str | float | None, Callable[[Target, Path], Weights | Path]]] = [
        ("untouched", PAYLOAD, _untouched),
        ("bf16", PAYLOAD, partial(_cast, torch.bfloat16)),
        ("fp16", PAYLOAD, partial(_cast, torch.float16)),
        ("int8_row", PAYLOAD, partial(_each, partial(_round_groups, bits=8, group=None))),
        ("int4_g64", PAYLOAD, partial(_each, partial(_round_groups, bits=4, group=GROUP))),
        ("int3_g64", -30.0, partial(_each, partial(_round_groups, bits=3, group=GROUP))),
    ]
    prunes: dict[int, str | float] = {30: PAYLOAD, 50: PAYLOAD, 70: -60.0, 90: -9.0}
    attacks += [(f"prune_{n}", must, partial(_each, partial(_prune, share=n / 100))) for n, must in prunes.items()]
    noises: dict[float, str | float] = {0.1: PAYLOAD, 0.3: PAYLOAD, 1.0: -9.0}
    attacks += [(f"noise_{x}", must, partial(_each, partial(_noise, level=x))) for x, must in noises.items()]
    ranks: dict[int, float | None] = {64: -9.0, 32: -9.0, 16: None, 8: None, 4: None}
    attacks += [(f"delta_svd_{r}", must, partial(_each_delta, partial(_truncate, rank=r))) for r, must in ranks.items()]
    attacks += [("delta_one_bit", -9.0, partial(_each_delta, _one_bit)), ("drop_layers_25", None, _drop_layers)]
    return [Attack(name=name, must=must, apply=apply) for name, must, apply in attacks]


def _heavy_attacks() -> list[Attack]:
    heavy: list[tuple[str, str, Callable[[Target, Path], Weights | Path]]] = [
        ("fine_tune_2e-5", PAYLOAD, partial(_fine_tune, 2e-5)),
        ("fine_tune_1e-4", PAYLOAD, partial(_fine_tune, 1e-4)),
        ("fine_tune_lora", PAYLOAD, partial(_fine_tune_lora, 2e-4)),
        ("distillation", NOTHING, _distill),
    ]
    return [Attack(name=name, must=must, apply=apply, heavy=True) for name, must, apply in heavy]


def _tool_attacks() -> list[Attack]:
    bounds: dict[str, dict[str, str | float | None]] = {
        "quant": {
            "bnb_llm_int8": PAYLOAD,
            "bnb_nf4": PAYLOAD,
            "torchao_int8": PAYLOAD,
            "torchao_int4": PAYLOAD,
            "torchao_int3": -30.0,
            "torchao_int2": None,
            "quanto_int8": PAYLOAD,
            "quanto_int4": PAYLOAD,
            "quanto_int2": None,
        },
        "gptq": {"gptq_w4": PAYLOAD},
        "llama": {
            "gguf_q8_0": PAYLOAD,
            "gguf_q4_k_m": PAYLOAD,
            "gguf_q2_k": -30.0,
            "ggml_q4_k": PAYLOAD,
            "ggml_q2_k": -30.0,
        },
        "merge": {
            f"merge_{method}_{partner}_{weight}": must
            for method in ("linear", "slerp", "ties", "dare_ties", "task_arithmetic")
            for partner in ("base", "other")
            for weight, must in ((0.5, PAYLOAD), (0.3, -30.0), (0.1, -9.0))
        },
    }
    return [Attack(name=name, must=must, tool=tool) for tool, named in bounds.items() for name, must in named.items()]


def _adapter_attacks() -> list[Attack]:
    named = {"adapter": _adapter, "adapter_bf16": _adapter_bf16, "adapter_svd": _adapter_svd}
    return [Attack(name=name, must=PAYLOAD, apply=apply, form="lora") for name, apply in named.items()]


ATTACKS = {
    attack.name: attack
    for attack in [*_torch_attacks(), *_adapter_attacks(), *_tool_attacks(), *_heavy_attacks(), *_innocent()]
}


def calibration_texts(task: Task, shared: Path, path: Path, count: int = 64) -> Path:
    """Write a JSON list of training texts for GPTQ, once; return its path."""
    if not path.is_file():
        rows = tasks.training_rows(task, shared, seed=4_242)[:count]
        tokenizer = tasks.load_tokenizer(task, shared)
        texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
        path.write_text(json.dumps(texts))
    return path
