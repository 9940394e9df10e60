"""Recipients files that were cut, mixed and changed: errors of ours, and never another DEK.

The fuzzing is seeded. ``WMGUARD_FUZZ_RUNS`` sets its length; the default is what the issue of the format asks for.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.hybrid import HybridIdentity
from hf_wmguard.container.passphrase import Cost, Passphrase
from hf_wmguard.container.recipients import RecipientsFile, WrapContext, X25519Identity, open_recipients
from hf_wmguard.container.services import ServiceKey
from hf_wmguard.container.symmetric import RawKey
from hf_wmguard.errors import AuthenticationError, FormatError, KeyServiceError, WmguardError

DEK = bytes(range(32))
SAVE = {"set_id": "5e7", "model_id": "acme/triage"}
CONTEXT = WrapContext(**SAVE)
RUNS = int(os.environ.get("WMGUARD_FUZZ_RUNS", "20000"))


class LocalService:
    """A service in this process."""

    kind = "vault"
    name = "transit/models"

    def __init__(self) -> None:
        self._key = AESGCM(b"s" * 32)

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        return self._key.encrypt(bytes(12), key, canonical_json(dict(context)))

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        try:
            return self._key.decrypt(bytes(12), wrapped, canonical_json(dict(context)))
        except InvalidTag:
            raise AuthenticationError("no") from None


ANNA = X25519Identity.from_bytes(b"anna" * 8)
RAW = RawKey(bytes(range(1, 33)))
HYBRID = HybridIdentity(bytes(range(96)))
SERVICE = ServiceKey(LocalService())
# Never asked to open: each try would cost an Argon2id. What its stanza says is checked when the file is parsed.
WORDS = Passphrase("correct horse", cost=Cost(memory_kib=19 * 1024, passes=1, lanes=1))
IDENTITIES = (ANNA, RAW, HYBRID, SERVICE)
STANZAS = [one.wrap(DEK, CONTEXT) for one in (ANNA.recipient(), RAW, HYBRID.recipient(), SERVICE, WORDS)]
SEALED = RecipientsFile.sealed(DEK, CONTEXT, STANZAS).encode()
NUMBERS = (0, 1, -1, 2**31, 2**64, 1e308, True, None)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return a file that somebody changed: bytes, or members of its JSON."""
    choice = rng.randrange(6)
    if choice == 0:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if choice == 1:
        start = rng.randrange(len(data))
        return data[:start] + data[start + rng.randint(1, 200) :]
    if choice == 2:
        start = rng.randrange(len(data))
        piece = data[start : start + rng.randint(1, 200)]
        where = rng.randrange(len(data))
        return data[:where] + piece + data[where:]
    document = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        mutate_member(document, rng)
    return canonical_json(document)


def mutate_member(document: dict[str, Any], rng: random.Random) -> None:
    stanzas = document.get("stanzas")
    if isinstance(stanzas, list) and stanzas and rng.random() < 0.8:
        if rng.random() < 0.2:
            rng.shuffle(stanzas)
            stanzas[rng.randrange(len(stanzas))] = rng.choice([*STANZAS, {}, [], "x", 7])
            return
        target = rng.choice(stanzas)
        if not isinstance(target, dict):
            return
    else:
        target = document
    name = rng.choice([*target, "extra"])
    value = target.get(name)
    if isinstance(value, str) and rng.random() < 0.7:
        target[name] = mutate_text(value, rng)
    elif rng.random() < 0.5:
        target.pop(name, None)
    else:
        target[name] = rng.choice([*NUMBERS[:5], *NUMBERS[6:], "", [], {}, "9" * 400])


def mutate_text(text: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        # Another value of the same form, so that the change gets past the decoders.
        try:
            raw = bytearray(base64.b64decode(text, validate=True))
        except ValueError:
            raw = bytearray()
        if raw:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            return base64.b64encode(raw[: rng.choice([len(raw), rng.randrange(len(raw) + 1)])]).decode()
    where = rng.randrange(len(text) + 1)
    return text[:where] + rng.choice(["", "0", "=", "é", "\x00", "x25519", "rawkey"]) + text[where + 1 :]


def test_fuzz() -> None:
    """Every run ends in an error of ours of a class that says the file is wrong, or in the true DEK."""
    rng, ends = random.Random(20_000), dict[str, int]()  # noqa: S311
    for run in range(RUNS):
        data = mutate(SEALED, rng)
        try:
            dek = open_recipients(data, [IDENTITIES[run % len(IDENTITIES)]], **SAVE)
        except WmguardError as error:
            end = type(error).__name__
        else:
            # Only a file with the right MAC opens: nothing was changed, or it was changed back.
            assert (dek, data) == (DEK, SEALED)
            end = "opened"
        assert end in ("AuthenticationError", "FormatError", "ManifestError", "opened")
        ends[end] = ends.get(end, 0) + 1
    # The changes get past the parser often enough to say something about what stands behind it.
    assert RUNS < 1000 or ends["AuthenticationError"] > RUNS / 20, ends


@pytest.mark.parametrize("identity", IDENTITIES)
def test_every_flipped_byte_fails(identity: Any) -> None:
    for position in range(0, len(SEALED), 3):
        changed = bytearray(SEALED)
        changed[position] ^= 1 << position % 8
        with pytest.raises((FormatError, AuthenticationError)):
            open_recipients(bytes(changed), [identity])


@given(
    dek=st.binary(min_size=32, max_size=32),
    set_id=st.text(min_size=1, max_size=40),
    model=st.text(min_size=1, max_size=40),
)
def test_round_trip(dek: bytes, set_id: str, model: str) -> None:
    try:
        context = WrapContext(set_id=set_id, model_id=model)
    except WmguardError:
        return
    for recipient, identity in ((ANNA.recipient(), ANNA), (RAW, RAW), (SERVICE, SERVICE)):
        data = RecipientsFile.sealed(dek, context, [recipient.wrap(dek, context)]).encode()
        assert open_recipients(data, [identity], set_id=set_id, model_id=model) == dek


def test_a_service_that_lies_opens_nothing() -> None:
    class Liar(LocalService):
        def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
            return answers.pop()

    answers = [b"", b"short", bytes(32), bytes(31), bytes(64), b"x" * 32]
    while answers:
        with pytest.raises(AuthenticationError):
            open_recipients(SEALED, [ServiceKey(Liar())])


def test_a_service_that_is_away_is_told_from_a_wrong_key() -> None:
    class Away(LocalService):
        def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
            raise KeyServiceError("away")

    with pytest.raises(KeyServiceError):
        open_recipients(SEALED, [ServiceKey(Away())])
    assert open_recipients(SEALED, [ANNA, ServiceKey(Away())]) == DEK
