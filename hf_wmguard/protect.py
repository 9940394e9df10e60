"""The first verb: commit to a watermark, and write a model as ciphertext with a signed manifest."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from hf_wmguard.atomic import clear_temporary, write_atomic
from hf_wmguard.canonical import canonical_time
from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.files import FileContext, FileRecord, ProtectedFile, is_protected, write_protected
from hf_wmguard.container.format import DEK_BYTES
from hf_wmguard.container.recipients import X25519Identity, dek_commitment, load_recipient, seal_recipients
from hf_wmguard.container.shards import INDEX_NAME, shard_number
from hf_wmguard.errors import FormatError, NonFiniteWeightError
from hf_wmguard.evidence.manifest import (
    RECIPIENTS_NAME,
    STAGING_PREFIX,
    FileEntry,
    Manifest,
    SignatureSummary,
    TriggerSummary,
    check_free_for,
    digest_file,
    write_manifest,
)
from hf_wmguard.evidence.registry import Entry, Registry, commitment_digest
from hf_wmguard.folders import locked, staging_folder
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.protected import divert_unaware
from hf_wmguard.suspects.reader import Encrypted, tile_reader
from hf_wmguard.suspects.tensors import Encoded
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.carriers import Tile, select_carriers
from hf_wmguard.watermark.lowrank import adapter_projections
from hf_wmguard.watermark.magnitude import Rescaled
from hf_wmguard.watermark.payload import MIN_CODE_BITS
from hf_wmguard.watermark.record import SALT_BYTES, WatermarkRecord, carrier_stream
from hf_wmguard.watermark.signature import CarrierKey, Reading, project, read_signature
from hf_wmguard.watermark.triggers import TriggerSet

State = Literal["pending", "ramping", "complete"]
# PyTorch has no isfinite for the 8-bit floats.
_CHECKED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_COVERED = ("config.json", "adapter_config.json", "generation_config.json", INDEX_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A watermark record together with the registry entry that fixed it before training.

    Args:
        record: The private record.
        entry: The entry; its hash and time go into every manifest.
    """

    record: WatermarkRecord
    entry: Entry

    @classmethod
    def from_entry(cls, entry: Entry) -> Self:
        """Return what a registry entry of kind ``commitment`` holds.

        Raises:
            FormatError: The entry is malformed, or its record is not the one it commits to.
        """
        record, digest = entry.body.get("record"), entry.body.get("commitment")
        if not isinstance(record, dict) or commitment_digest(record) != digest:
            raise FormatError(
                f"registry entry {entry.hash} does not hold the record it commits to",
                hint="an entry like this was never written: restore the registry from a backup",
            )
        return cls(record=WatermarkRecord.from_json(record), entry=entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAdapter:
    """Where a save holds the low-rank adapter of one matrix.

    Args:
        down: Name of A [rank, columns].
        up: Name of B [rows, rank].
        scaling: Factor s of s B A.
        magnitude: With DoRA, name of m [rows].
        base: With DoRA, returns rows of the matrix without its adapter: first row, number of rows. A save of the
            adapter does not hold them, and they do not change in training.
    """

    down: str
    up: str
    scaling: float
    magnitude: str | None = None
    base: Callable[[int, int], Tensor] | None = None


def new_record(
    owner: OwnerKey,
    config: WatermarkConfig,
    *,
    salt: bytes,
    shapes: Mapping[str, tuple[int, int]],
    read: Callable[[str, int, int], Tensor] | None = None,
    triggers: TriggerSet | None = None,
    bases: Mapping[str, tuple[int, bytes]] | None = None,
) -> WatermarkRecord:
    """Return the record of a new marking, nothing of it embedded yet.

    Args:
        owner: The owner's key.
        config: Names, budget and step.
        salt: From `new_salt`.
        shapes: Rows and columns of every matrix that may carry; none where the config asks for no signature.
        read: Returns rows of a matrix: name, first row, number of rows; any float dtype. None where the config asks
            for no signature.
        triggers: The trigger set, if any.
        bases: Of low-rank adapters: rank and row space of each matrix.
    Raises:
        CapacityError: The model is too small for the payload at this budget.
        NonFiniteWeightError: A weight is NaN or Inf, or a whole tile is zero.
    """
    create = partial(
        WatermarkRecord.create,
        owner,
        model_id=config.model_id,
        iteration=config.iteration,
        salt=salt,
        triggers=triggers,
    )
    if config.signature is None or read is None:
        return create()

    def rms_of(tile: Tile) -> float:
        weights = read(tile.name, tile.row_start, tile.rows)
        value = float(torch.linalg.vector_norm(weights.detach().float())) / math.sqrt(weights.numel())
        if not 0 < value < float("inf"):
            raise NonFiniteWeightError(
                f"{tile.name}: root mean square is {value}", hint="the model is damaged or was never initialised"
            )
        return value

    carriers, steps = select_carriers(
        shapes,
        rms_of,
        budget=config.signature.budget,
        step=config.signature.step,
        min_projections=MIN_CODE_BITS,
        stream=carrier_stream(owner, config.model_id, config.iteration, salt),
        bases=bases,
    )
    return create(
        carriers=carriers,
        steps=steps,
        tile_of=lambda carrier: read(carrier.name, carrier.row_start, carrier.rows),
    )


def new_salt() -> bytes:
    """Return the salt of a new marking."""
    return secrets.token_bytes(SALT_BYTES)


def commit(record: WatermarkRecord, registry: Path, owner: OwnerKey) -> Committed:
    """Sign and log what is about to be embedded, before it is: a claim without this is worth nothing.

    Raises:
        RegistryError, AuthenticationError, EnvironmentFault: As `Registry.append`.
    """
    private = record.to_json()
    body = {
        "model_id": record.model_id,
        "iteration": record.iteration,
        "commitment": commitment_digest(private),
        "record": private,
    }
    return Committed(record=record, entry=Registry(registry, owner).append("commitment", body))


class ProtectedWriter:
    """Write one save of a model into a folder: ciphertext first, the signed manifest last.

    Everything is staged in a hidden folder beside its final place and moved at the end, so that a save that fails
    leaves the old one as it was. What is staged is ciphertext; plaintext is never written.

    Raises:
        OwnershipError: The folder holds a protected model of another owner or another name.
        KeyFormatError, NotFoundError: A recipient cannot be read.
    """

    def __init__(self, folder: Path, *, config: WatermarkConfig, owner: OwnerKey) -> None:
        check_free_for(folder, key_id=owner.key_id(), model_id=config.model_id)
        self._folder = folder
        self._config = config
        self._owner = owner
        self._recipients = [load_recipient(ref) for ref in config.protection.recipients]
        self._dek = secrets.token_bytes(DEK_BYTES)
        self.set_id = secrets.token_hex(16)
        self._records: list[FileRecord] = []
        folder.mkdir(parents=True, exist_ok=True)
        # What a killed save left behind is ciphertext without a manifest, of no use to anyone: it is cleared away.
        self._stack = ExitStack()
        self.staging = self._stack.enter_context(staging_folder(folder, STAGING_PREFIX))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Encrypt the tensors of one file.

        Args:
            tensors: By name, as they would go into a safetensors file.
            path: Path in the staging folder; its name says which shard of how many it is.
            metadata: The safetensors metadata, encrypted too.
        Raises:
            NonFiniteWeightError: A floating-point tensor holds NaN or Inf; nothing has been replaced.
            FormatError: The path lies in another folder.
        """
        if path.parent.resolve() != self.staging.resolve():
            raise FormatError(f"{path} lies outside {self.staging}", hint="save into one folder at a time")
        for name, tensor in tensors.items():
            if tensor.dtype in _CHECKED and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteWeightError(
                    f"{name} holds NaN or Inf and is not saved",
                    hint="training has diverged: resume from the last checkpoint with a lower learning rate",
                )
        self._records.append(
            write_protected(
                self.staging / path.name,
                Encoded(tensors),
                dek=self._dek,
                context=self._context(path.name),
                metadata=metadata,
                hide_names=self._config.protection.hide_names,
            )
        )

    def read_back(
        self,
        keys: tuple[CarrierKey, ...],
        *,
        adapters: Mapping[str, SavedAdapter] | None = None,
        baselines: tuple[Baseline, ...] = (),
    ) -> Reading:
        """Return what the signature says in the files as they were written, decrypted again.

        Args:
            keys: All carriers of the scheme, in order.
            adapters: By carrier, where the save holds an adapter instead of the matrix.
            baselines: What the matrices without their adapters say along the keys, in the same order.
        """
        with ExitStack() as stack:
            files = [
                stack.enter_context(
                    ProtectedFile(self.staging / record.name, dek=self._dek, context=self._context(record.name))
                )
                for record in self._records
            ]
            written = Encrypted({name: file for file in files for name in file.names()})
            if not adapters:
                return read_signature(keys, tile_reader(written))
            pairs = zip(keys, baselines, strict=True)
            return Reading.of(keys, [_read_adapter(written, adapters[k.carrier.name], k, base) for k, base in pairs])

    def finish(
        self,
        *,
        state: State,
        step: int | None = None,
        committed: Committed | None = None,
        signature: SignatureSummary | None = None,
        triggers: TriggerSummary | None = None,
        sealed_state: str | None = None,
    ) -> Manifest:
        """Move the staged files to their places, then write recipients, envelope and, last, the manifest."""
        if not self._records:
            raise FormatError("no weights were saved", hint="this model's save_pretrained writes no safetensors file")
        divert_unaware(self.staging / "config.json")
        if self._config.protection.hide_names:
            # It lists what is hidden.
            (self.staging / INDEX_NAME).unlink(missing_ok=True)
        # Before anything is replaced: a key service may refuse.
        recipients = [X25519Identity.from_owner(self._owner).recipient(), *self._recipients]
        sealed = seal_recipients(self._dek, recipients, set_id=self.set_id, model_id=self._config.model_id)
        # Whoever changes the recipients meanwhile would put those of the old save over the new ones.
        with locked(self._folder):
            clear_temporary(self._folder)
            self._publish()
            entries = [
                FileEntry(name=record.name, size_bytes=record.size_bytes, sha256=record.sha256)
                for record in self._records
            ]
            entries += [digest_file(self._folder / name) for name in _COVERED if (self._folder / name).is_file()]
            write_atomic(self._folder / RECIPIENTS_NAME, sealed)
            manifest = Manifest(
                model_id=self._config.model_id,
                iteration=self._config.iteration,
                set_id=self.set_id,
                created=canonical_time(),
                step=step,
                state=state,
                files=tuple(sorted(entries, key=lambda entry: entry.name)),
                dek_commitment=dek_commitment(self._dek, self.set_id),
                commitment=committed.entry.hash if committed else None,
                commitment_time=committed.entry.time if committed else None,
                signature=signature,
                triggers=triggers,
                sealed_state=sealed_state,
            )
            write_manifest(self._folder, manifest, self._owner)
        return manifest

    def _publish(self) -> None:
        """Move all files to their places, and clear away what another number of shards left there before."""
        names = {record.name for record in self._records}
        for path in sorted(self.staging.iterdir(), key=lambda path: path.name not in names):
            path.replace(self._folder / path.name)
        for stale in self._folder.glob("*.safetensors"):
            # Ciphertext of the save that is being replaced; anything else is not ours to delete.
            if stale.name not in names and stale.is_file() and is_protected(stale):
                stale.unlink()
        if self._config.protection.hide_names or not any(shard_number(name)[1] > 1 for name in names):
            (self._folder / INDEX_NAME).unlink(missing_ok=True)

    def _context(self, name: str) -> FileContext:
        index, total = shard_number(name)
        return FileContext(
            model_id=self._config.model_id,
            iteration=self._config.iteration,
            set_id=self.set_id,
            index=index,
            total=total,
        )

    def __repr__(self) -> str:
        return f"ProtectedWriter({str(self._folder)!r})"


def _read_adapter(written: Encrypted, adapter: SavedAdapter, key: CarrierKey, baseline: Baseline) -> Tensor | None:
    shapes, carrier = written.shapes(), key.carrier
    if shapes.get(adapter.up, ())[:1] != carrier.shape[:1] or adapter.down not in shapes:
        return None
    down = written.rows(adapter.down, 0, shapes[adapter.down][0])
    up = written.rows(adapter.up, carrier.row_start, carrier.rows)
    if adapter.magnitude is not None and adapter.base is not None:
        base = adapter.base(carrier.row_start, carrier.rows)
        lengths = written.rows(adapter.magnitude, carrier.row_start, carrier.rows)
        return project(Rescaled.of(base, down, up, adapter.scaling, lengths).weights, key)
    return baseline.projections_of(key) + adapter_projections(down, up, adapter.scaling, key)


def registry_body(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return what the registry notes about a finished save."""
    return {
        "model_id": manifest.model_id,
        "iteration": manifest.iteration,
        "commitment": manifest.commitment,
        "set_id": manifest.set_id,
        "step": manifest.step,
        "folder": str(folder),
        "files": {entry.name: entry.sha256 for entry in manifest.files},
    }
