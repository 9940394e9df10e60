"""Make the golden artefacts: what this release writes, and every later release must read.

Run once for each version of a format, from the root of the repository: ``python tests/golden/make.py``. It never
overwrites: an artefact that no longer reads is a bug in the reader. A new version of a format gets new names here.

The keys are for these tests only. They are published with the repository and protect nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_wmguard.canonical import encode_base64
from hf_wmguard.config import ProtectionConfig, WatermarkConfig
from hf_wmguard.container.recipients import X25519Identity
from hf_wmguard.evidence.manifest import SignatureSummary, TriggerSummary
from hf_wmguard.keys import OwnerKey, write_key_pair
from hf_wmguard.protect import ProtectedWriter, commit
from hf_wmguard.watermark.candidates import label_candidates
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.planner import Mix
from hf_wmguard.watermark.record import WatermarkRecord, trigger_key
from hf_wmguard.watermark.signature import CarrierKey, move_, read_projections, residual
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses, derive_texts

HERE = Path(__file__).parent
KEYS = HERE / "keys"
PROTECTED, REGISTRY, WATERMARK = HERE / "protected-v1", HERE / "registry-v1", HERE / "watermark-v1.json"
OWNER_KEY, RECIPIENT_KEY = "TEST-ONLY-owner.key", "TEST-ONLY-recipient.key"

OWNER_SECRET = bytes(range(32))
RECIPIENT_SECRET = bytes(range(64, 96))
SALT = bytes(range(128, 160))
MODEL_ID, ITERATION = "golden/model", "1"
STATE_LABEL, STATE = "training-state", b"golden state"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
METADATA = {"format": "pt"}
CARRIERS = tuple(
    # Far more projections than a tile of this size should carry, so that few bytes hold a whole payload.
    Carrier(name=f"layers.{i}.weight", shape=(24 + i, 24), row_start=i, rows=24, sides=(17, 17), rms=0.15)
    for i in range(4)
)
STEPS = Mix(((0.75, 500), (1.5, 500), (5.0, 156)))


def numbers(*shape: int) -> Tensor:
    """Return the same numbers on every machine, exact in every float dtype: float32, -0.25 to 0.242."""
    count = torch.Size(shape).numel()
    values = [((index * 2654435761 >> 7) % 64 - 32) / 128 for index in range(count)]
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def plain_tensors() -> dict[str, Tensor]:
    """Return one tensor of every dtype that a file can hold, and the shapes at the edge."""
    dtypes = {
        "f64": torch.float64,
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "f8_e4m3": torch.float8_e4m3fn,
        "f8_e5m2": torch.float8_e5m2,
    }
    tensors = {f"plain.{name}": (numbers(3, 5) * 16).to(dtype) for name, dtype in dtypes.items()}
    for name in ("int64", "int32", "int16", "int8", "uint8"):
        tensors[f"plain.{name}"] = (numbers(7) * 128 + 32).to(getattr(torch, name))
    return tensors | {
        "plain.bool": torch.tensor([True, False, True]),
        "plain.scalar": torch.tensor(0.5),
        "plain.empty": torch.zeros(0, 4),
        "plain.größe": torch.ones(2, 2),
    }


def make_record(owner: OwnerKey) -> WatermarkRecord:
    """Return the golden record; everything in it follows from the constants above."""
    key = trigger_key(owner, MODEL_ID, ITERATION, SALT)
    texts = derive_texts(key, count=4, style="natural", task="classification")
    candidates = label_candidates(4, num_labels=5)
    triggers = TriggerSet(
        task="classification",
        style="natural",
        texts=texts,
        candidates=candidates,
        responses=derive_responses(key, texts, candidates),
    )
    return WatermarkRecord.create(
        owner,
        model_id=MODEL_ID,
        iteration=ITERATION,
        salt=SALT,
        carriers=CARRIERS,
        steps=STEPS,
        tile_of=lambda c: numbers(*c.shape)[c.row_start : c.row_start + c.rows],
        triggers=triggers,
    )


def key_digest(key: CarrierKey) -> str:
    """Return the SHA-256 over the signs of A and B, the steps, the dithers and the code bits of one carrier.

    Signs and not the scaled columns: these are the same bytes whatever a processor makes of 1 / sqrt(24).
    """
    parts = [
        (key.left > 0).to(torch.uint8),
        (key.right > 0).to(torch.uint8),
        key.step.contiguous().view(torch.uint8),
        key.dither.contiguous().view(torch.uint8),
        key.bits.to(torch.uint8),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def marked_tensors(keys: tuple[CarrierKey, ...]) -> dict[str, Tensor]:
    """Return the carriers with the whole mark, bfloat16."""
    tensors = {}
    for key in keys:
        carrier = key.carrier
        whole = numbers(*carrier.shape)
        tile = whole[carrier.row_start : carrier.row_start + carrier.rows]
        move_(tile, key, residual(read_projections(tile, key), key))
        tensors[carrier.name] = whole.bfloat16()
    return tensors


def write_watermark(record: WatermarkRecord, keys: tuple[CarrierKey, ...], marked: dict[str, Tensor]) -> None:
    """Write the golden watermark: the owner key, the record, and digests of all that is derived from the two."""
    value: dict[str, Any] = {
        "owner_key": OWNER_SECRET.hex(),
        "record": record.to_json(),
        "carrier_keys": {key.carrier.name: key_digest(key) for key in keys},
        "marked": {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in marked.items()
        },
    }
    WATERMARK.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_protected(record: WatermarkRecord, keys: tuple[CarrierKey, ...], marked: dict[str, Tensor]) -> None:
    """Write the golden registry and the golden protected folder, two shards and an index."""
    owner = OwnerKey(OWNER_SECRET)
    committed = commit(record, REGISTRY, owner)
    config = WatermarkConfig(
        model_id=MODEL_ID,
        iteration=ITERATION,
        owner_key=f"file:{KEYS / OWNER_KEY}",
        registry=str(REGISTRY),
        protection=ProtectionConfig(recipients=(f"file:{KEYS / RECIPIENT_KEY}.pub",)),
    )
    shards = dict(zip(SHARDS, (plain_tensors(), marked), strict=True))
    with ProtectedWriter(PROTECTED, config=config, owner=owner) as writer:
        for name, tensors in shards.items():
            writer.add(tensors, writer.staging / name, METADATA)
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (writer.staging / "model.safetensors.index.json").write_text(json.dumps(index))
        (writer.staging / "config.json").write_text(json.dumps({"model_type": "golden"}))
        reading = writer.read_back(keys)
        writer.finish(
            state="complete",
            step=12,
            committed=committed,
            signature=SignatureSummary(
                bit_error_rate=reading.bit_error_rate,
                log10_p=reading.log10_p,
                projections=reading.projections,
                payload_decoded=record.decode_payload(owner, reading.soft) == record.payload,
                weight_change=0.5,
            ),
            triggers=TriggerSummary(count=4, candidates=5, match_rate=0.75),
            sealed_state=encode_base64(owner.seal(STATE_LABEL, STATE, aad=writer.set_id.encode())),
        )


def main() -> None:
    """Make everything, or nothing where something is there already."""
    existing = [path.name for path in (PROTECTED, REGISTRY, WATERMARK, KEYS) if path.exists()]
    if existing:
        sys.exit(f"error: {', '.join(existing)}: golden artefacts are never made again; give a new version a new name")
    KEYS.mkdir()
    owner, recipient = OwnerKey(OWNER_SECRET), X25519Identity.from_bytes(RECIPIENT_SECRET)
    owner.write(KEYS / OWNER_KEY)
    write_key_pair(KEYS / RECIPIENT_KEY, recipient.to_text().encode(), recipient.recipient().to_text().encode())
    record = make_record(owner)
    keys = record.carrier_keys(owner)
    marked = marked_tensors(keys)
    write_watermark(record, keys, marked)
    write_protected(record, keys, marked)
    (REGISTRY / "log.lock").unlink()
    print(f"made {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__}")


if __name__ == "__main__":
    main()
