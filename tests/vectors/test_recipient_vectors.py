"""What every version must say of the same bytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from hf_wmguard import errors
from hf_wmguard.container.hybrid import HybridIdentity
from hf_wmguard.container.passphrase import Passphrase
from hf_wmguard.container.recipients import Identity, X25519Identity, open_recipients
from hf_wmguard.container.symmetric import RawKey

RECIPIENTS = json.loads(Path(__file__).with_name("recipients.json").read_text())


def identity(kind: str) -> Identity:
    text = RECIPIENTS["identities"][kind]
    if kind == "passphrase":
        return Passphrase(text)
    data = bytes.fromhex(text)
    return {"x25519": X25519Identity.from_bytes, "mlkem768-x25519": HybridIdentity, "rawkey": RawKey}[kind](data)


@pytest.mark.parametrize("vector", RECIPIENTS["vectors"], ids=lambda vector: vector["name"])
def test_recipients(vector: dict[str, Any]) -> None:
    data, one = base64.b64decode(vector["file"]), identity(vector["identity"])
    if vector["expect"] == "opens":
        assert open_recipients(data, [one]).hex() == RECIPIENTS["dek"]
        return
    with pytest.raises(errors.WmguardError) as caught:
        open_recipients(data, [one])
    assert type(caught.value) is getattr(errors, vector["expect"])
