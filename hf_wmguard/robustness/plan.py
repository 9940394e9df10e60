"""What a mark would cost and what it would survive, predicted from the weights before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_wmguard.errors import ConfigError, MissingDependencyError, NonFiniteWeightError
from hf_wmguard.robustness.attacks import StateDict, add_noise, cast, prune_magnitude, quantize_int8
from hf_wmguard.robustness.ggml import quantize_gguf
from hf_wmguard.robustness.quantization import quantize_groups, quantize_nf4
from hf_wmguard.suspects.reader import Suspect, open_suspect, weight_files
from hf_wmguard.suspects.signature import OWNER_WEIGHTS
from hf_wmguard.watermark.carriers import Carrier, expected_change, is_carrier, select_carriers
from hf_wmguard.watermark.payload import MIN_CODE_BITS
from hf_wmguard.watermark.planner import Attack, Mix, evidence, payload_decodes, predict
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.rounding import round_stochastic

Verdict = Literal["payload exact", "holds", "doubtful", "lost"]
Source = Literal["measured", "exact"]
ALPHA_LOG10 = -9.0
_SAMPLES = 12
# From there on a verification sets norms back, `hf_wmguard.suspects.signature`.
_STRETCHED = 0.1
_SAMPLE_WEIGHTS = 1 << 18
MEASURED: Mapping[str, Callable[[StateDict], dict[str, Tensor]]] = {
    "as written": dict,
    "bf16": partial(cast, dtype=torch.bfloat16),
    "fp16": partial(cast, dtype=torch.float16),
    "INT8, a scale per row": quantize_int8,
    "INT4, groups of 64": partial(quantize_groups, bits=4),
    "INT3, groups of 64": partial(quantize_groups, bits=3),
    "NF4, blocks of 64": quantize_nf4,
    "GGUF Q8_0": partial(quantize_gguf, kind="Q8_0"),
    "GGUF Q4_0": partial(quantize_gguf, kind="Q4_0"),
    "pruning 30%": partial(prune_magnitude, share=0.3),
    "pruning 50%": partial(prune_magnitude, share=0.5),
    "pruning 70%": partial(prune_magnitude, share=0.7),
    "pruning 90%": partial(prune_magnitude, share=0.9),
    "noise 0.1 rms": partial(add_noise, scale=0.1),
    "noise 0.3 rms": partial(add_noise, scale=0.3),
    "noise 1.0 rms": partial(add_noise, scale=1.0),
}
"""Attacks that are tried on tiles of the model itself; those on GGUF where the package ``gguf`` is installed."""


def _merge(weight: float) -> Attack:
    """Return what is left after a merge with what the model was before marking, once a verification has undone it.

    It is undone but for the way to the nearest weight that is tried. What training moves beside the mark is not known.
    """
    off = min(abs(1 - weight / tried) for tried in (1.0, *OWNER_WEIGHTS))
    return Attack(owner_weight=1 - off)


# The error is the attack's strength.
_EXACT: Mapping[str, Attack] = {
    **{f"merging, owner {weight}": _merge(weight) for weight in (0.5, 0.3, 0.1)},
}
_NOISES = tuple(0.05 * k for k in range(1, 31))
_SHARES = (*(0.1 * k for k in range(1, 10)), 0.95)
_OWNER_WEIGHTS = tuple(0.05 * k for k in range(1, 20))


@dataclass(frozen=True, slots=True)
class Errors:
    """An attack that does not treat all tiles alike: its attenuation is the mean over them.

    Args:
        tiles: The attack on each tile that was tried.
    """

    tiles: tuple[Attack, ...]

    def attenuation(self, steps: Tensor) -> Tensor:
        """Return the expected cosine of a marked projection at each step (in units of the rms), float64 [k]."""
        return torch.stack([attack.attenuation(steps) for attack in self.tiles]).mean(0)

    @property
    def error(self) -> float:
        """Root mean square of the tiles' errors."""
        return math.sqrt(sum(attack.error**2 for attack in self.tiles) / len(self.tiles))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is expected of one attack.

    Args:
        attack: Its name.
        error: What it adds to a projection, in units of the tile's rms.
        log10_p: The expected p-value, corrected for the weightings of the steps and for nothing else.
        payload_decodes: Whether the payload is expected to decode.
        verdict: ``payload exact``; ``holds`` where p stays below 1e-9 even three standard deviations down; ``lost``
            where it is expected to be above; ``doubtful`` between.
        source: ``measured`` on the model's tiles, or ``exact`` by the attack's definition.
    """

    attack: str
    error: float
    log10_p: float
    payload_decodes: bool
    verdict: Verdict
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What marking a model would mean.

    Args:
        budget: What was asked for.
        weight_change: Expected norm of the change over the norm of the carrying matrices.
        matrices: Matrices that could carry.
        carriers: Matrices that do.
        projections: Projections in all.
        steps: How many projections have which step, in units of the rms.
        bytes_read: What a verification reads of the weights.
        checkpoint_bytes: Size of all weight files.
        predictions: One for each attack.
        curves: By kind of attack, pairs of its strength and the expected log10 p.
    """

    budget: float
    weight_change: float
    matrices: int
    carriers: int
    projections: int
    steps: tuple[tuple[float, int], ...]
    bytes_read: int
    checkpoint_bytes: int
    predictions: tuple[Prediction, ...]
    curves: Mapping[str, tuple[tuple[float, float], ...]]

    @property
    def share_read(self) -> float:
        """Share of the checkpoint that a verification reads, 0 to 1."""
        return self.bytes_read / self.checkpoint_bytes

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return asdict(self) | {"share_read": self.share_read}


def make_plan(
    model: str | Path | Mapping[str, Tensor] | nn.Module, *, budget: float = 0.01, step: float | None = None
) -> Plan:
    """Return what marking a model would mean. A key chooses other tiles, but of the same number and size.

    Args:
        model: Whatever `open_suspect` reads.
        budget: Norm of the change over the norm of the carrying matrices.
        step: As `SignatureConfig.step`.
    Raises:
        ConfigError: A budget out of range.
        CapacityError: The model is too small for the payload at this budget.
        NonFiniteWeightError: A weight that was looked at is NaN or Inf, or a whole tile is zero.
        NotFoundError, FormatError: The model cannot be read.
    """
    if not 0 < budget <= 0.2:
        raise ConfigError(f"budget is {budget}, expected more than 0 and at most 0.2", hint="0.01 is usual")
    with open_suspect(model) as opened:
        shapes = {
            name: (shape[0], shape[1])
            for name, shape in opened.shapes().items()
            if is_carrier(name, shape) and opened.rows(name, 0, 1).is_floating_point()
        }
        carriers, mix = select_carriers(
            shapes,
            # The plan is in units of the rms, whatever it is.
            lambda tile: 1.0,
            budget=budget,
            step=step,
            min_projections=MIN_CODE_BITS,
            stream=Stream(bytes(32), "plan"),
        )
        tiles = [_sample(opened, one) for one in carriers[:: -(-len(carriers) // _SAMPLES)]]
        bytes_read = sum(c.rows * c.shape[1] * opened.rows(c.name, 0, 1).element_size() for c in carriers)
    return Plan(
        budget=budget,
        weight_change=expected_change(carriers, mix),
        matrices=len(shapes),
        carriers=len(carriers),
        projections=mix.projections,
        steps=mix.parts,
        bytes_read=bytes_read,
        checkpoint_bytes=_checkpoint_bytes(model),
        predictions=tuple(_predictions(mix, tiles, budget)),
        curves=_curves(mix, tiles),
    )


def _checkpoint_bytes(model: str | Path | Mapping[str, Tensor] | nn.Module) -> int:
    if isinstance(model, str | Path):
        return sum(file.stat().st_size for file in weight_files(Path(model)))
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _sample(opened: Suspect, carrier: Carrier) -> tuple[str, Tensor]:
    rows = max(1, min(carrier.rows, _SAMPLE_WEIGHTS // carrier.shape[1]))
    tile = opened.rows(carrier.name, carrier.row_start, rows).detach()
    if not 0 < _rms(tile) < math.inf:
        raise NonFiniteWeightError(
            f"{carrier.name}: root mean square is {_rms(tile)}", hint="the model is damaged or was never initialised"
        )
    return carrier.name, tile


def _rms(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.float())) / math.sqrt(values.numel())


def _predictions(mix: Mix, tiles: Sequence[tuple[str, Tensor]], budget: float) -> list[Prediction]:
    # What rounding to 16 bits leaves when the mark is written adds to whatever comes later.
    written = [_rounding_error(tile, budget) for _, tile in tiles]
    measured = {}
    for name, attack in MEASURED.items():
        # Only the formats of GGUF need a package, and a plan can do without them.
        with suppress(MissingDependencyError):
            measured[name] = _measure(mix, attack, tiles, written)
    return [
        *(_prediction(mix, name, errors, "measured") for name, errors in measured.items()),
        *(_prediction(mix, name, attack, "exact") for name, attack in _EXACT.items()),
    ]


def _prediction(mix: Mix, name: str, attack: Attack | Errors, source: Source) -> Prediction:
    log10_p, energy = predict(mix, attack)
    exact = payload_decodes(energy)
    safe = -log10_p * math.log(10) >= evidence(ALPHA_LOG10)
    verdict: Verdict = (
        "payload exact" if exact and safe else "holds" if safe else "doubtful" if log10_p <= ALPHA_LOG10 else "lost"
    )
    return Prediction(
        attack=name,
        error=attack.error,
        log10_p=log10_p,
        payload_decodes=exact,
        verdict=verdict,
        source=source,
    )


def _measure(
    mix: Mix,
    attack: Callable[[StateDict], dict[str, Tensor]],
    tiles: Sequence[tuple[str, Tensor]],
    written: Sequence[float],
) -> Errors:
    """Return what an attack does to the tiles as they come out of it, or to their norms set back, as a verdict would.

    Of a projection P the attack leaves g P, g = <W', W> / |W|^2, and an error that does not depend on P. The original
    P is as large as the rms, so that its share of (1 - g) P is in the error already; the shift that put it on the
    lattice is uniform, and fades as in a merge of owner weight g.
    """
    plain, rescaled, stretched = [], [], False
    for (name, tile), rounding in zip(tiles, written, strict=True):
        before, after = tile.float(), attack({name: tile})[name].float()
        size, shrunk = _rms(before), _rms(after)
        gain = float((before * after).mean()) / size**2
        plain.append(Attack(error=math.hypot(_rms(after - before) / size, rounding), owner_weight=gain))
        if shrunk > 0:
            factor = size / shrunk
            stretched |= abs(math.log(factor)) > _STRETCHED
            error = math.hypot(_rms(after * factor - before) / size, rounding)
            rescaled.append(Attack(error=error, owner_weight=gain * factor))
    ways = [Errors(tuple(plain))]
    if stretched and len(rescaled) == len(tiles):
        ways.append(Errors(tuple(rescaled)))
    return min(ways, key=lambda errors: predict(mix, errors)[0])


def _rounding_error(tile: Tensor, budget: float) -> float:
    if tile.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    draw = torch.Generator().manual_seed(0)
    wanted = tile.float() + budget * _rms(tile) * torch.randn(tile.shape, generator=draw)
    return _rms(round_stochastic(wanted, tile.dtype, draw).float() - wanted) / _rms(tile)


def _curves(mix: Mix, tiles: Sequence[tuple[str, Tensor]]) -> dict[str, tuple[tuple[float, float], ...]]:
    exact = [0.0] * len(tiles)
    pruned = {share: _measure(mix, partial(prune_magnitude, share=share), tiles, exact) for share in _SHARES}
    return {
        "noise, in units of the rms": tuple((e, predict(mix, Attack(error=e))[0]) for e in _NOISES),
        "share pruned": tuple((share, predict(mix, errors)[0]) for share, errors in pruned.items()),
        "owner's weight in a merge": tuple((w, predict(mix, _merge(w))[0]) for w in _OWNER_WEIGHTS),
    }
