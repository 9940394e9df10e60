"""Read LoRA adapters of PEFT: what is read is the change of weights, scaling * B A, without the base it belongs to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hf_wmguard.errors import FormatError, NotFoundError, UnsupportedError
from hf_wmguard.suspects.sources import Suspect, read_bounded

_Value = TypeVar("_Value", int, float)

CONFIG_NAME = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 1 << 16
_MERGE = "merge it into its base model first, and judge the merged model"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# Whatever makes the change of weights more than scaling * B A, or puts it on a base that was changed first.
_VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA on replicated layers",
    "target_parameters": "LoRA on bare parameters",
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    a: str
    b: str
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaling:
    """Rank and scaling of every module, from the adapter's config."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    by_root: bool
    transposed: bool

    def of(self, path: str) -> tuple[int, float]:
        rank = _matching(self.ranks, path, self.rank)
        alpha = _matching(self.alphas, path, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.by_root else rank)


class Adapter(Suspect):
    """A LoRA adapter: its matrices are the changes it makes, in float32.

    Args:
        stored: The tensors of the adapter.
        folder: Where its config lies.
    Raises:
        NotFoundError: The config is missing.
        FormatError: The config or the tensors cannot be right.
        UnsupportedError: An adapter whose change of weights the adapter alone does not give.
    """

    is_delta = True

    def __init__(self, stored: Suspect, folder: Path) -> None:
        self._stored = stored
        self.config = {}
        self._scaling = _read_config(folder / CONFIG_NAME)
        self._pairs = self._find_pairs()
        if not self._pairs:
            raise FormatError(f"{folder} holds no pairs of lora_A and lora_B", hint="the adapter is damaged")

    def _find_pairs(self) -> dict[str, _Pair]:
        shapes = self._stored.shapes()
        factors: dict[str, dict[str, str]] = {}
        adapters = set()
        for name in shapes:
            if ".lora_magnitude_vector" in name or name.endswith("lora_B.bias"):
                raise UnsupportedError(f"{name}: not a plain LoRA adapter", hint=_MERGE)
            match = _FACTOR.fullmatch(name)
            if match is not None and len(shapes[name]) == 2:
                factors.setdefault(match["path"], {})[match["side"]] = name
                adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise UnsupportedError("several adapters in one file", hint="save the adapters one by one")
        pairs = {}
        for path, sides in factors.items():
            rank, scaling = self._scaling.of(path)
            a, b = (shapes.get(sides.get(side, ""), ()) for side in "AB")
            if a[:1] != (rank,) or b[1:] != (rank,):
                raise FormatError(
                    f"{path}: lora_A is {a}, lora_B {b}, rank {rank} in the config", hint="the adapter is damaged"
                )
            pairs[f"{path}.weight"] = _Pair(a=sides["A"], b=sides["B"], scaling=scaling)
        return pairs

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self._stored.shapes()
        sides = {name: (stored[pair.b][0], stored[pair.a][1]) for name, pair in self._pairs.items()}
        return {name: size[::-1] for name, size in sides.items()} if self._scaling.transposed else sides

    def rows(self, name: str, start: int, count: int) -> Tensor:
        pair = self._pairs[name]
        stored = self._stored.shapes()
        rank = stored[pair.a][0]
        a = self._stored.rows(pair.a, 0, rank).float()
        if self._scaling.transposed:
            b = self._stored.rows(pair.b, 0, stored[pair.b][0]).float()
            return pair.scaling * (a[:, start : start + count].T @ b.T)
        return pair.scaling * (self._stored.rows(pair.b, start, count).float() @ a)


def is_adapter(stored: Suspect, names: Sequence[str], folder: Path) -> bool:
    """Return whether some tensors are those of an adapter: by their names, or by the name of their file.

    Args:
        stored: The tensors.
        names: Of their files.
        folder: Where the adapter's config would lie.

    Raises:
        NotFoundError: They are, and the config that gives them a meaning is missing.
    """
    present = (folder / CONFIG_NAME).is_file()
    factors = any(_FACTOR.fullmatch(name) for name in stored.shapes())
    if factors and not present:
        raise NotFoundError(f"{folder} lacks {CONFIG_NAME}", hint="fetch it: it holds the scaling of the adapter")
    return factors or (present and names[0].startswith("adapter_model."))


def _read_config(path: Path) -> _Scaling:
    try:
        config: Any = json.loads(read_bounded(path, _MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}", hint="the file is damaged; fetch it again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object", hint="the file is damaged; fetch it again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: an adapter of kind {kind!r}, expected LORA", hint=_MERGE)
    for key, what in _VARIANTS.items():
        if config.get(key):
            raise UnsupportedError(f"{path}: {what} cannot be judged from the adapter alone", hint=_MERGE)
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{path}: LoRA that trains biases cannot be judged alone", hint=_MERGE)
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UnsupportedError(f"{path}: {start!r} changes the base model first", hint=_MERGE)
    return _Scaling(
        rank=_rank(path, config.get("r")),
        alpha=_alpha(path, config.get("lora_alpha")),
        ranks={key: _rank(path, value) for key, value in _patterns(path, config, "rank_pattern").items()},
        alphas={key: _alpha(path, value) for key, value in _patterns(path, config, "alpha_pattern").items()},
        by_root=bool(config.get("use_rslora")),
        transposed=bool(config.get("fan_in_fan_out")),
    )


def _rank(path: Path, value: object) -> int:
    if type(value) is not int or not 0 < value <= _MAX_RANK:
        raise FormatError(f"{path}: a rank of {value!r}", hint="the adapter is damaged")
    return value


def _alpha(path: Path, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise FormatError(f"{path}: a lora_alpha of {value!r}", hint="the adapter is damaged")
    return float(value)


def _patterns(path: Path, config: Mapping[str, Any], key: str) -> Mapping[str, object]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{path}: {key} is not an object", hint="the adapter is damaged")
    plain = {pattern.replace("\\.", "."): value for pattern, value in patterns.items()}
    # PEFT takes these for regular expressions; a stranger's is not run, for it may never end.
    odd = [pattern for pattern in plain if not re.fullmatch(r"\^?[\w.\-]+\$?", pattern)]
    if odd:
        raise UnsupportedError(f"{path}: {key} is a regular expression: {odd[0][:80]!r}", hint=_MERGE)
    return plain


def _matching(patterns: Mapping[str, _Value], path: str, default: _Value) -> _Value:
    """Return the value of the first pattern that a module's name ends in, or is where the pattern is anchored."""
    for pattern, value in patterns.items():
        name = pattern.strip("^$")
        if path == name or (not pattern.startswith("^") and path.endswith("." + name)):
            return value
    return default
