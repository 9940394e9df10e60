"""The third verb: mark a finished model without training it, in memory or, shard by shard, on the disk."""

from __future__ import annotations

import errno
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.owner import load_owner
from hf_wmguard.errors import ConfigError, UnsupportedError, UsageError
from hf_wmguard.evidence.manifest import WEIGHT_SUFFIXES, is_trainer_state
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.folders import check_new_folder, new_folder
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import Committed, commit, new_record, new_salt
from hf_wmguard.suspects.files import hash_files
from hf_wmguard.suspects.reader import open_suspect, tile_reader
from hf_wmguard.suspects.shards import Shards, find_shards
from hf_wmguard.watermark.carriers import Carrier, is_carrier
from hf_wmguard.watermark.rounding import CARRYING_DTYPES, add_rounded_
from hf_wmguard.watermark.signature import CarrierKey, Reading, read_projections, read_signature, residual

Progress = Callable[[str, int], None]
STAGING_PREFIX = ".wmguard-embed-"
"""A folder of this name holds the copy that is not finished, or was killed; the next run clears it away."""
_OTHER_WEIGHTS = WEIGHT_SUFFIXES | {".h5", ".msgpack", ".onnx"}
_KEYS = {".key", ".pem"}
_COPY_BYTES = 16 << 20
# The kernel, or the file system, has no copying of its own, or none between these two places.
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What was embedded, as it reads back.

    Args:
        commitment: Hash of the registry entry that was made before anything was changed.
        weight_change: Norm of the change, rounding included, over the norm of the carrying matrices.
        bit_error_rate: Share of wrong code bits; always 0, or there would have been an error.
        log10_p: Upper bound of the p-value of the marked model.
        projections: Number of projections.
        carriers: Number of matrices that carry.
    """

    commitment: str
    weight_change: float
    bit_error_rate: float
    log10_p: float
    projections: int
    carriers: int

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return asdict(self)


class _Weights(Protocol):
    """Matrices whose rows can be read and replaced."""

    def read(self, name: str, row_start: int, rows: int) -> Tensor: ...

    def write(self, name: str, row_start: int, tile: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class _InMemory:
    parameters: Mapping[str, nn.Parameter]

    def read(self, name: str, row_start: int, rows: int) -> Tensor:
        return self._rows(name, row_start, rows).cpu()

    def write(self, name: str, row_start: int, tile: Tensor) -> None:
        self._rows(name, row_start, len(tile)).copy_(tile)

    def _rows(self, name: str, row_start: int, rows: int) -> Tensor:
        return self.parameters[name].data[row_start : row_start + rows]


def embed(model: nn.Module, config: WatermarkConfig) -> Embedded:
    """Mark a model in place, without training: commit first, then move its carriers onto their lattices.

    Only ``config.signature`` is used: triggers have to be trained, and are left out of the commitment.

    Args:
        model: Any module with float32, bfloat16 or float16 matrices in numbered blocks, frozen or not.
        config: Names, owner key, registry and budget.
    Raises:
        ConfigError: The config switches the signature off.
        CapacityError: The model is too small for the payload at this budget.
        UnsupportedError: The model is quantized, sharded over processes, offloaded, or has adapters; or its weights
            are too coarse for the mark to read back, and then it has been changed.
        NonFiniteWeightError: A weight that would carry is NaN or Inf.
    """
    owner = _owner(config)
    weights = _InMemory(_carrying_parameters(model))
    shapes = {name: (one.shape[0], one.shape[1]) for name, one in weights.parameters.items()}
    committed = _commit(owner, config, shapes, weights)
    keys = committed.record.carrier_keys(owner)
    change = _mark(keys, weights)
    reading = read_signature(keys, lambda c: weights.read(c.name, c.row_start, c.rows))
    return _judge(committed, reading, change)


def embed_folder(
    model_dir: str | Path, out_dir: str | Path, config: WatermarkConfig, *, progress: Progress | None = None
) -> Embedded:
    """Write a marked copy of a model folder: its files are copied, then only the carrying rows are changed.

    The weights are never in memory, a few megabytes of one matrix apart. Everything is written into a hidden folder
    beside ``out_dir``, read back from there, and moved at the end: ``out_dir`` is whole or does not exist.

    Args:
        model_dir: A folder with float32, bfloat16 or float16 safetensors, one file or shards with an index.
        out_dir: A folder that does not exist yet, or is empty.
        config: As for `embed`.
        progress: Called with a file's name and the bytes just copied or hashed; every byte is counted twice.
    Raises:
        UsageError: The output folder holds something, or lies inside the input.
        NotFoundError, FormatError: The input cannot be read.
        UnsupportedError: Another format, a quantized model, an adapter, or other weights in the same folder, which
            would be handed on unmarked.
        EnvironmentFault: The copy cannot be written.
    """
    source, out = Path(model_dir), Path(out_dir)
    owner = _owner(config)
    shards = find_shards(source)
    others = _other_files(source, shards)
    _check_registry(Path(config.registry), out)
    check_new_folder(source, out)
    committed = _commit(owner, config, shards.carrying_shapes(), shards)
    keys = committed.record.carrier_keys(owner)
    report = progress or (lambda name, count: None)
    with new_folder(out, STAGING_PREFIX) as staging:
        for file in (*others, *shards.files):
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            _copy(source / file, staging / file, report)
        change = _mark(keys, shards.at(staging))
        with open_suspect(staging) as written:
            reading = read_signature(keys, tile_reader(written))
        result = _judge(committed, reading, change)
        for file in (*others, *shards.files):
            _sync_file(staging / file)
        digests = _digests(staging, shards.files, report)
    Registry(Path(config.registry), owner).append("save", _registry_body(config, committed, out, digests))
    return result


def _owner(config: WatermarkConfig) -> OwnerKey:
    if config.signature is None:
        raise ConfigError(
            "the config switches the signature off", hint="without training there is nothing else to embed"
        )
    return load_owner(config.owner_key)


def _carrying_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may carry, tied ones once.

    Raises:
        UnsupportedError: As `embed`.
    """
    if getattr(model, "peft_config", None):
        raise UnsupportedError("the model has adapters", hint="merge them first, or mark the adapter in training")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError("the model is quantized", hint="mark it before it is quantized")
    found = {name: one for name, one in model.named_parameters() if is_carrier(name, tuple(one.shape))}
    for name, parameter in found.items():
        # A tensor type of its own: distributed, or quantized.
        if type(parameter.data) is not Tensor or parameter.dtype not in CARRYING_DTYPES or parameter.is_meta:
            raise UnsupportedError(
                f"{name} is {type(parameter.data).__name__} of {parameter.dtype} on {parameter.device}, "
                "expected a whole float32, bfloat16 or float16 tensor in memory",
                hint="load the model whole and unquantized, or mark its folder with wmguard embed",
            )
    return found


def _commit(
    owner: OwnerKey, config: WatermarkConfig, shapes: Mapping[str, tuple[int, int]], weights: _Weights
) -> Committed:
    record = new_record(owner, config, salt=new_salt(), shapes=shapes, read=weights.read)
    return commit(record, Path(config.registry), owner)


@torch.no_grad()
def _mark(keys: tuple[CarrierKey, ...], weights: _Weights) -> float:
    """Move every carrier onto its lattice; return the norm of the change over the norm of the carrying matrices."""
    # How 16-bit weights are rounded is no part of the scheme, and nobody has to be able to repeat it.
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    squares = 0.0
    for key in keys:
        carrier = key.carrier
        tile = weights.read(carrier.name, carrier.row_start, carrier.rows)
        marked = tile.clone()
        shift = residual(read_projections(tile, key), key)
        add_rounded_(marked, key.left @ key.spread(shift) @ key.right.T, generator)
        squares += float(torch.linalg.vector_norm(marked.float() - tile.float())) ** 2
        weights.write(carrier.name, carrier.row_start, marked)
    return math.sqrt(squares / sum(_square(key.carrier) for key in keys))


def _square(carrier: Carrier) -> float:
    # As the budget counts: a tile stands for its matrix.
    return carrier.rms**2 * math.prod(carrier.shape)


def _judge(committed: Committed, reading: Reading, change: float) -> Embedded:
    # Without a wrong code bit the payload decodes to what was encoded.
    if reading.bit_error_rate > 0 or reading.carriers_missing:
        raise UnsupportedError(
            f"the mark does not read back: bit error rate {reading.bit_error_rate:.4f}, "
            f"{reading.carriers_missing} carriers missing",
            hint="the weights are too coarse for this step: leave signature.step out, or convert the model to float32",
        )
    return Embedded(
        commitment=committed.entry.hash,
        weight_change=change,
        bit_error_rate=reading.bit_error_rate,
        log10_p=reading.log10_p,
        projections=reading.projections,
        carriers=reading.carriers_read,
    )


def _check_registry(registry: Path, out: Path) -> None:
    if registry.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"the registry {registry} lies inside {out}", hint="keep the registry apart from the models")


def _other_files(folder: Path, shards: Shards) -> list[str]:
    """Return all other files of a model folder, hidden ones apart, relative to it.

    Raises:
        UnsupportedError: One holds weights that would stay unmarked, or a key, or is no file that can be copied.
    """
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # Hidden files are a tool's own, or secrets such as .env.
        visible = (name for name in sorted(names) if not name.startswith("."))
        found += [os.path.relpath(os.path.join(root, name), folder) for name in visible]  # noqa: PTH118
    others = [name for name in found if name not in shards.files]
    for name in others:
        path = Path(name)
        if path.suffix.lower() in _OTHER_WEIGHTS and not is_trainer_state(path.name):
            raise UnsupportedError(
                f"{name} in {folder} would be handed on unmarked: only {', '.join(shards.files[:3])} is marked",
                hint="move it away, or give a folder that holds one copy of the weights",
            )
        if path.suffix.lower() in _KEYS or not (folder / path).is_file():
            raise UnsupportedError(
                f"{name} in {folder} is a key, or no ordinary file: it is not handed on", hint="move it away"
            )
    return others


def _copy(source: Path, target: Path, progress: Progress) -> None:
    """Copy a file inside the kernel where it can (on some file systems without moving a byte)."""
    with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as written:
        copy = getattr(os, "copy_file_range", None)
        while True:
            try:
                count = copy(read.fileno(), written.fileno(), _COPY_BYTES) if copy else _copy_block(read, written)
            except OSError as error:
                if copy is None or error.errno not in _NO_KERNEL_COPY:
                    raise
                copy = None
                continue
            if not count:
                return
            progress(target.name, count)


def _copy_block(read: Any, written: Any) -> int:
    block = memoryview(read.read(_COPY_BYTES))
    rest = block
    while rest:
        rest = rest[written.write(rest) :]
    return len(block)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digests(folder: Path, names: tuple[str, ...], progress: Progress) -> dict[str, str]:
    digests = {}
    for name, sha256 in zip(names, hash_files([folder / name for name in names]), strict=True):
        digests[name] = sha256
        progress(name, (folder / name).stat().st_size)
    return digests


def _registry_body(
    config: WatermarkConfig, committed: Committed, out: Path, digests: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the registry notes about a finished copy, as `registry_body` does about a protected save."""
    return {
        "model_id": config.model_id,
        "iteration": config.iteration,
        "commitment": committed.entry.hash,
        "set_id": None,
        "step": None,
        "folder": str(out),
        "files": dict(digests),
    }
