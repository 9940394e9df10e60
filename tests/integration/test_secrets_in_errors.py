"""Whatever goes wrong while saving and loading: no key is in a message, a traceback or a log."""

from __future__ import annotations

import base64
import logging
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Run, everything_printed
from transformers import AutoModelForSequenceClassification

from hf_wmguard import load_protected
from hf_wmguard.container.recipients import load_identity
from hf_wmguard.errors import WmguardError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading.models import Access
from hf_wmguard.suspects.protected import open_dek
from hf_wmguard.training.optimizer import OptimizerGuard


def forms(secret: bytes) -> Iterator[str]:
    yield secret.hex()
    yield secret.hex().upper()
    yield base64.b64encode(secret).decode().rstrip("=")
    yield base64.urlsafe_b64encode(secret).decode().rstrip("=")
    # As repr shows bytes and bytearrays.
    yield repr(secret)[2:-1]
    yield secret.decode("latin-1")


def _load(folder: Path, run: Run, **kwargs: Any) -> None:
    load_protected(folder, identity=run.identity, auto_class=AutoModelForSequenceClassification, **kwargs)


def _flipped(folder: Path, run: Run) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    _load(folder, run)


def _recipients(folder: Path, run: Run) -> None:
    path = folder / "wmguard_recipients.json"
    path.write_bytes(path.read_bytes()[:-9])
    _load(folder, run)


def _cut(folder: Path, run: Run) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    _load(folder, run)


def _offload(folder: Path, run: Run) -> None:
    _load(folder, run, offload_folder="x")


def _nan(folder: Path, run: Run) -> None:
    bias = run.trainer.model.classifier.bias
    with torch.no_grad():
        kept = float(bias[0])
        bias[0] = float("nan")
    try:
        run.trainer.model.save_pretrained(folder)
    finally:
        with torch.no_grad():
            bias[0] = kept


def _not_a_folder(folder: Path, run: Run) -> None:
    run.trainer.model.save_pretrained(folder / "config.json" / "below")


def _plain_state(folder: Path, run: Run) -> None:
    guard = OptimizerGuard(OwnerKey.load(run.where["owner_key"]))
    guard.guard(optimizer := torch.optim.SGD(run.trainer.model.parameters()))
    with guard.reading(folder):
        optimizer.load_state_dict(optimizer.state_dict())


FAULTS: list[Callable[[Path, Run], None]] = [_flipped, _recipients, _cut, _offload, _nan, _not_a_folder, _plain_state]


def test_no_key_is_printed_when_something_fails(guarded: Run, tmp_path: Path) -> None:
    manifest, _ = read_manifest(guarded.final)
    identity = load_identity(guarded.identity)
    keys = {
        "owner": (guarded.root / "keys" / "owner.key").read_bytes(),
        "data": open_dek(guarded.final, manifest, (identity,)),
    }
    text = (guarded.root / "keys" / "inference.key").read_text().split()[-1]
    with everything_printed() as printed:
        for fault in FAULTS:
            folder = tmp_path / fault.__name__
            shutil.copytree(guarded.final, folder)
            with pytest.raises((WmguardError, OSError)) as caught:
                fault(folder, guarded)
            logging.getLogger("hf_wmguard").error("failed", exc_info=caught.value)
            print("".join(traceback.format_exception(caught.value)), repr(caught.value))
        print(repr(identity), repr(Access.of(guarded.identity, None)), repr(guarded.config))
    output = printed.getvalue()
    assert output.count("Traceback") >= len(FAULTS)
    assert "is not authentic" in output
    assert text not in output
    for secret in keys.values():
        assert [form for form in forms(secret) if form in output] == []
