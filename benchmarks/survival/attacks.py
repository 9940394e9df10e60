"""Every row of the table: an attack, what makes it, and what must hold after it.

Attacks on tensors alone come from `hf_wmguard.robustness`; those of other tools are made by the adapters beside this
file.
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
from safetensors.torch import load_file, save_file
from tasks import Task
from torch import Tensor, nn
from transformers import AutoConfig

from hf_wmguard.robustness import attacks, compression, finetuning, quantization, structure, symmetries
from hf_wmguard.robustness.overwriting import overwrite
from hf_wmguard.suspects.roles import Heads

Weights = Mapping[str, Tensor]
Form = Literal["full", "lora"]
PAYLOAD = "payload"
NOTHING = "not detected"
GROUP = 64
STRANGERS = 5
STRANGERS_BUDGET = 0.036
"""Three times the owner's."""


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

    @property
    def model(self) -> Path:
        """The plain model folder: the owner's original."""
        return self.folder / "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack.

    Args:
        name: Its name, also of its results.
        must: ``payload``, a bound of log10 p, ``not detected``, or None: measured only.
        tool: Environment of the adapter that makes it, or ``torch``.
        apply: Makes the suspect, for ``torch``: weights, or the path of a file or folder. None for tools.
        heavy: Takes tens of seconds; only on some seeds unless asked for.
        form: Only for cells of this form.
        model: Only for this model.
        original: The suspect is judged with the marked model as the original.
        innocent: No copy of the marked model: its utility is no loss of an attack.
        sibling: Form of the unmarked model of the same seed that is judged; only where that was trained.
    """

    name: str
    must: str | float | None
    tool: str = "torch"
    apply: Callable[[Target, Path], Weights | Path] | None = None
    heavy: bool = False
    form: Form | None = None
    model: str | None = None
    original: bool = False
    innocent: bool = False
    sibling: Form | None = None


def _untouched(target: Target, scratch: Path) -> Weights:
    return target.weights


def _to(change: Callable[..., Weights], *arguments: Any, **options: Any) -> Callable[[Target, Path], Weights]:
    """Return an attack that changes the weights alone."""
    return lambda target, scratch: change(target.weights, *arguments, **options)


def _to_delta(change: Callable[..., Weights], *arguments: Any) -> Callable[[Target, Path], Weights]:
    """Return an attack that knows the public base."""
    return lambda target, scratch: change(target.weights, target.base, *arguments)


def _reshard(target: Target, scratch: Path) -> Path:
    folder = scratch / "reshard"
    tasks.with_weights(target.task, target.model, target.weights).save_pretrained(folder, max_shard_size="8MB")
    return folder


def _stored_as(change: Callable[[Weights], Weights], target: Target, scratch: Path) -> Path:
    path = scratch / f"{change.__name__}.safetensors"
    save_file(dict(change(target.weights)), path)
    return path


def _bin(target: Target, scratch: Path) -> Path:
    path = scratch / "pytorch_model.bin"
    torch.save({name: tensor.clone() for name, tensor in target.weights.items()}, path)
    return path


def _heads(target: Target) -> Heads:
    return Heads.from_config(AutoConfig.from_pretrained(target.model).to_dict())


def _symmetry(change: Callable[..., Weights], target: Target, scratch: Path, **options: Any) -> Weights:
    return change(target.weights, _heads(target), **options)


def _all_symmetries(target: Target, scratch: Path) -> Weights:
    """Apply every symmetry that the model has, one after the other."""
    weights, heads = target.weights, _heads(target)
    for seed, (change, model, options) in enumerate(SYMMETRIES.values()):
        if model in (None, target.task.name) and change not in (symmetries.fold_norms, symmetries.permute_residual):
            weights = change(weights, heads, **options | {"seed": seed})
    if target.task.name == "minilm":
        weights = symmetries.permute_residual(weights, heads, seed=99)
    return weights


def _moved_layers(target: Target, scratch: Path) -> Weights:
    """Swap two blocks in the middle and double the last."""
    count = len(next(iter(structure.layers_of(target.weights).values())))
    order = list(range(count))
    order[count // 2 - 1 : count // 2 + 1] = [count // 2, count // 2 - 1]
    return symmetries.keep_layers(target.weights, _heads(target), [*order, count - 1])


FINE_TUNE_BATCHES = 24
FINE_TUNE_EPOCHS = 3


def fine_tuned_elsewhere(task: Task, shared: Path) -> Any:
    """Return the public base after a fine-tuning on another corpus, with the owner's number of labels."""
    weights = finetuning.finetune(
        _for_other_corpus(task, shared, None),
        _other_rows(task, shared),
        learning_rate=task.learning_rate["full"],
        epochs=FINE_TUNE_EPOCHS,
    )
    whole = tasks.load_base(task, shared)
    whole.load_state_dict({name: t for name, t in weights.items() if not _is_head(name)}, strict=False)
    return whole


def _fine_tune(train: Callable[..., Weights], rate: float, target: Target, scratch: Path) -> Weights:
    """Train on another corpus; a classifier learns other labels with another head."""
    model = _for_other_corpus(target.task, target.shared, target.weights)
    rows = _other_rows(target.task, target.shared)
    trained = train(model, rows, learning_rate=rate, epochs=FINE_TUNE_EPOCHS)
    # With the owner's head put back utility can be measured.
    return {name: tensor if _is_head(name) else trained[name] for name, tensor in target.weights.items()}


def _other_rows(task: Task, shared: Path) -> tasks.Rows:
    return tasks.other_rows(task, shared, FINE_TUNE_BATCHES * task.batch)


def _is_head(name: str) -> bool:
    return any(part in name for part in tasks.HEAD)


def _for_other_corpus(task: Task, shared: Path, weights: Weights | None) -> Any:
    torch.manual_seed(7)
    model = tasks.load_base(task, shared, labels=tasks.OTHER_LABELS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights is not None and not _is_head(name):
                parameter.copy_(weights[name])
    return model


DISTILL_EPOCHS = 1


def _distill(target: Target, scratch: Path) -> Weights:
    """Teach the model's outputs to the public base, on rows that the owner did not train on."""
    task = target.task
    teacher = tasks.with_weights(task, target.model, target.weights)
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
    source = target.folder / "adapter"
    folder.mkdir(parents=True)
    shutil.copy2(source / "adapter_config.json", folder)
    save_file(dict(change(load_file(source / "adapter_model.safetensors"))), folder / "adapter_model.safetensors")
    return folder


def sibling_folder(folder: Path, form: Form) -> Path:
    """Return where the unmarked model of a marked cell's data, order and seed lies, trained in this form."""
    model, _, seed, _ = folder.name.split("-")
    return folder.with_name(f"{model}-{form}-{seed}-plain")


def _sibling(form: Form, target: Target, scratch: Path) -> Path:
    return sibling_folder(target.folder, form) / "model"


def _base(target: Target, scratch: Path) -> Weights:
    return target.base


def _innocent() -> list[Attack]:
    """What is no copy of the model and must not be taken for one, with the original at hand or without."""
    return [
        Attack(
            name=f"{name}{'_original' * original}",
            must=NOTHING,
            apply=apply,
            original=original,
            innocent=True,
            sibling=form,
        )
        for original in (False, True)
        for name, apply, form in (
            ("unmarked_full", partial(_sibling, "full"), "full"),
            ("unmarked_lora", partial(_sibling, "lora"), "lora"),
            ("public_base", _base, None),
        )
    ]


def _storage_attacks() -> list[Attack]:
    named = {
        "untouched": _untouched,
        "bf16": _to(attacks.cast, torch.bfloat16),
        "fp16": _to(attacks.cast, torch.float16),
        "reshard": _reshard,
        "prefix": partial(_stored_as, structure.add_prefix),
        "rename": partial(_stored_as, structure.rename),
        "bin": _bin,
        "transpose": partial(_stored_as, structure.transpose),
    }
    return [Attack(name=name, must=PAYLOAD, apply=apply) for name, apply in named.items()]


def _torch_attacks() -> list[Attack]:
    rows: list[tuple[str, str | float | None, Callable[[Target, Path], Weights]]] = [
        ("int8_row", PAYLOAD, _to(attacks.quantize_int8)),
        ("int4_g64", PAYLOAD, _to(quantization.quantize_groups, 4, group=GROUP)),
        ("int3_g64", -30.0, _to(quantization.quantize_groups, 3, group=GROUP)),
    ]
    prunes: dict[int, str | float] = {30: PAYLOAD, 50: PAYLOAD, 70: -60.0, 90: -9.0}
    rows += [(f"prune_{n}", must, _to(attacks.prune_magnitude, n / 100)) for n, must in prunes.items()]
    noises: dict[float, str | float] = {0.1: PAYLOAD, 0.3: PAYLOAD, 1.0: -9.0}
    rows += [(f"noise_{x}", must, _to(attacks.add_noise, x)) for x, must in noises.items()]
    ranks: dict[int, float | None] = {64: -9.0, 32: -9.0, 16: None, 8: None, 4: None}
    rows += [(f"delta_svd_{r}", must, _to_delta(compression.svd_delta, r)) for r, must in ranks.items()]
    rows += [
        ("delta_one_bit", -9.0, _to_delta(compression.one_bit_delta)),
        ("overwrite_5", PAYLOAD, _to(overwrite, STRANGERS, budget=STRANGERS_BUDGET)),
        ("drop_layers_25", None, _to(structure.drop_layers, 0.25)),
    ]
    return [Attack(name=name, must=must, apply=apply) for name, must, apply in rows]


SYMMETRIES: dict[str, tuple[Callable[..., Weights], str | None, dict[str, int]]] = {
    "permute_heads": (symmetries.permute_heads, None, {"seed": 1}),
    "scale_queries": (symmetries.scale_queries, None, {"seed": 2}),
    "rotate_queries": (symmetries.rotate_queries, None, {"seed": 3}),
    "map_values": (symmetries.map_values, None, {"seed": 4}),
    "permute_neurons": (symmetries.permute_neurons, None, {"seed": 5}),
    "scale_neurons": (symmetries.scale_neurons, "llama", {"seed": 6}),
    "split_neurons": (symmetries.split_neurons, None, {"count": 40, "seed": 7}),
    "add_neurons": (symmetries.add_neurons, None, {"count": 40, "seed": 8}),
    "permute_residual": (symmetries.permute_residual, None, {"seed": 9}),
    "fold_norms": (symmetries.fold_norms, "llama", {}),
    "rotate_residual": (symmetries.rotate_residual, "llama", {"seed": 10}),
    "resize_vocabulary": (symmetries.resize_vocabulary, None, {"rows": 6_000, "seed": 11}),
}
"""By name: the function, the only model that has the symmetry, its options."""


def _aligned_attacks() -> list[Attack]:
    """What needs the original: everything that moves weights without changing the function, and lost layers."""
    rows: list[tuple[str, str | None, Callable[[Target, Path], Weights]]] = [
        (f"sym_{name}", model, partial(_symmetry, change, **options))
        for name, (change, model, options) in SYMMETRIES.items()
    ]
    rows += [
        ("sym_all", None, _all_symmetries),
        ("drop_layers_25_original", None, _to(structure.drop_layers, 0.25)),
        ("move_layers", None, _moved_layers),
    ]
    return [Attack(name=name, must=PAYLOAD, apply=apply, model=model, original=True) for name, model, apply in rows]


def _heavy_attacks() -> list[Attack]:
    heavy: list[tuple[str, str, Callable[[Target, Path], Weights | Path]]] = [
        ("fine_tune_2e-5", PAYLOAD, partial(_fine_tune, finetuning.finetune, 2e-5)),
        ("fine_tune_1e-4", PAYLOAD, partial(_fine_tune, finetuning.finetune, 1e-4)),
        ("fine_tune_lora", PAYLOAD, partial(_fine_tune, finetuning.finetune_lora, 2e-4)),
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
            for method in ("linear", "slerp", "ties", "dare_ties")
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
    for attack in [
        *_storage_attacks(),
        *_adapter_attacks(),
        *_torch_attacks(),
        *_tool_attacks(),
        *_aligned_attacks(),
        *_heavy_attacks(),
        *_innocent(),
    ]
}


def calibration_texts(task: Task, shared: Path, path: Path, count: int = 64) -> Path:
    """Write a JSON list of training texts for GPTQ, once; return its path."""
    if not path.is_file():
        rows = tasks.training_rows(task, shared, seed=4_242)[:count]
        tokenizer = tasks.load_tokenizer(task, shared)
        texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
        path.write_text(json.dumps(texts))
    return path
