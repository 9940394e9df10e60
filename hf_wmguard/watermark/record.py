"""The private record of one marking: all that the owner, with the owner key, needs to judge a suspect later.

It is made before the first step, hashed into the commitment, and kept encrypted in the registry. It holds no key:
carriers and triggers are derived from the owner key and the record's salt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from hf_wmguard.canonical import require_object
from hf_wmguard.errors import AuthenticationError, FormatError
from hf_wmguard.keys import OwnerKey
from hf_wmguard.watermark import payload as code
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.planner import Mix
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.signature import CarrierKey
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses

SCHEME = "stdm-rank1/2"
SALT_BYTES = 32
NO_STEPS = Mix(())
_HEX = re.compile(r"[0-9a-f]{64}")
_RESTORE = "a record like this was never written: restore the registry from a backup"
_FIELDS: dict[str, tuple[type, ...]] = {
    "model_id": (str,),
    "iteration": (str,),
    "salt": (str,),
    "key_commitment": (str,),
    "payload": (str,),
    "carriers": (list,),
    "steps": (list,),
    "baselines": (list,),
    "triggers": (dict, type(None)),
    "slot": (int,),
    "scheme": (str,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WatermarkRecord:
    """What was committed to before training.

    Args:
        model_id: Name of the model.
        iteration: Which training of it.
        salt: Hex of 32 random bytes: two markings of one model share no direction and no dither.
        key_commitment: Hex digest that ties the record to one owner key without showing it.
        payload: Hex of the 32 bytes that the carriers spell; empty without a signature.
        carriers: The carriers, in the order of the code bits.
        steps: How many projections have which step, in units of their tile's rms; the key says which.
        baselines: What each carrier's tile was like before it was marked, in the same order.
        triggers: The trigger set, or None.
        slot: Which independent sub-mark.
        scheme: Name and version of the scheme.
    Raises:
        FormatError: Another scheme, or fields that do not fit together.
    """

    model_id: str
    iteration: str
    salt: str
    key_commitment: str
    payload: str = field(default="", repr=False)
    carriers: tuple[Carrier, ...] = field(default=(), repr=False)
    steps: Mix = NO_STEPS
    baselines: tuple[Baseline, ...] = field(default=(), repr=False)
    triggers: TriggerSet | None = None
    slot: int = 0
    scheme: str = SCHEME

    def __post_init__(self) -> None:
        if self.scheme != SCHEME:
            raise FormatError(
                f"record has scheme {self.scheme!r}, expected {SCHEME!r}",
                hint="read it with the version of hf-wmguard that wrote it",
            )
        digests = (self.salt, self.key_commitment, self.payload) if self.carriers else (self.salt, self.key_commitment)
        if not all(_HEX.fullmatch(digest) for digest in digests) or (self.payload and not self.carriers):
            raise FormatError("record is incomplete: salt, payload and carriers do not fit together", hint=_RESTORE)
        # A matrix that counted twice would make one lucky projection many: the p-value assumes independent terms.
        if len({carrier.name for carrier in self.carriers}) != len(self.carriers):
            raise FormatError("record names a carrier twice", hint=_RESTORE)
        projections = sum(carrier.projections for carrier in self.carriers)
        if self.carriers and projections < code.MIN_CODE_BITS:
            raise FormatError(
                f"record has {projections} projections, expected at least {code.MIN_CODE_BITS}", hint=_RESTORE
            )
        fits = len(self.baselines) == len(self.carriers) and all(
            baseline.fits(carrier) for baseline, carrier in zip(self.baselines, self.carriers, strict=True)
        )
        if not fits or self.steps.projections != projections:
            raise FormatError("record is incomplete: carriers, steps and baselines do not fit together", hint=_RESTORE)

    @classmethod
    def create(
        cls,
        owner: OwnerKey,
        *,
        model_id: str,
        iteration: str,
        salt: bytes,
        triggers: TriggerSet | None = None,
        carriers: tuple[Carrier, ...] = (),
        steps: Mix = NO_STEPS,
        tile_of: Callable[[Carrier], Tensor] | None = None,
    ) -> Self:
        """Return the record of a new marking; the payload is derived, so that it too cannot be chosen afterwards.

        Args:
            owner: The owner's key.
            model_id, iteration: As for the class.
            salt: 32 random bytes.
            triggers: The trigger set, if any.
            carriers, steps: What `select_carriers` chose with `carrier_stream`.
            tile_of: Gives a carrier's tile before it is marked, any float dtype [rows, columns].
        Raises:
            NonFiniteWeightError: A weight is NaN or Inf.
        """
        subkey = _Subkeys(owner, model_id, iteration, 0, salt)
        payload = subkey("payload") if carriers else b""
        keys = _carrier_keys(subkey, payload, carriers, steps)
        return cls(
            model_id=model_id,
            iteration=iteration,
            salt=salt.hex(),
            key_commitment=subkey("key-commitment").hex(),
            payload=payload.hex(),
            carriers=carriers,
            steps=steps,
            baselines=tuple(Baseline.measure(tile_of(key.carrier), key) for key in keys) if tile_of else (),
            triggers=triggers,
        )

    def carrier_keys(self, owner: OwnerKey) -> tuple[CarrierKey, ...]:
        """Return the secret half of every carrier.

        Raises:
            AuthenticationError: The record was made with another owner key.
        """
        return _carrier_keys(self._subkeys(owner), bytes.fromhex(self.payload), self.carriers, self.steps)

    def check(self, owner: OwnerKey) -> None:
        """Check that payload and responses are what the owner key derives, not what somebody read off a victim.

        Raises:
            AuthenticationError: The record was made with another owner key.
            FormatError: The payload or a response was chosen.
        """
        subkey = self._subkeys(owner)
        triggers = self.triggers
        if triggers is not None:
            derived = derive_responses(subkey("triggers"), triggers.texts, triggers.candidates)
            if derived != triggers.responses:
                raise FormatError(
                    f"the record of {self.model_id} {self.iteration} holds responses that its key does not derive",
                    hint="this commitment proves nothing: responses are derived, never chosen",
                )

    def decode_payload(self, owner: OwnerKey, soft: Any) -> str:
        """Return the hex of the payload that soft bits (float [n], 0 where erased) decode to."""
        return code.decode(soft, Stream(self._subkeys(owner)("code"), "code")).hex()

    def same_scheme(self, other: WatermarkRecord) -> bool:
        """Return whether two records mark the same model in the same way; salts and measured norms may differ."""
        return self._outline() == other._outline()

    def _outline(self) -> list[Any]:
        # The salt chooses tiles, and the rms changes while the model trains: neither is the config's.
        carriers = [(c.shape, c.rows, c.rank) for c in self.carriers]
        triggers = self.triggers and (
            self.triggers.task,
            self.triggers.style,
            [len(c) for c in self.triggers.candidates],
        )
        return [self.model_id, self.iteration, self.slot, sorted(carriers), self.steps.parts, triggers]

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        value = {one.name: getattr(self, one.name) for one in fields(self)}
        return value | {
            "carriers": [carrier.to_json() for carrier in self.carriers],
            "steps": [[step, count] for step, count in self.steps.parts],
            "baselines": [baseline.to_json() for baseline in self.baselines],
            "triggers": self.triggers.to_json() if self.triggers else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the record in a plain dictionary.

        Raises:
            FormatError: A field is missing, unknown or impossible.
        """
        checked = require_object(value, _FIELDS, "watermark record")
        triggers = checked["triggers"]
        return cls(
            **{
                **checked,
                "carriers": tuple(Carrier.from_json(item) for item in checked["carriers"]),
                "steps": Mix.from_json(checked["steps"]),
                "baselines": tuple(Baseline.from_json(item) for item in checked["baselines"]),
                "triggers": TriggerSet.from_json(triggers) if triggers is not None else None,
            }
        )

    def _subkeys(self, owner: OwnerKey) -> _Subkeys:
        subkeys = _Subkeys(owner, self.model_id, self.iteration, self.slot, bytes.fromhex(self.salt))
        if subkeys("key-commitment").hex() != self.key_commitment:
            raise AuthenticationError(
                f"the record of {self.model_id} {self.iteration} was made with another owner key",
                hint="check --owner-key",
            )
        # A payload that its key does not derive could have been read off a model that was never marked.
        if self.payload and subkeys("payload").hex() != self.payload:
            raise FormatError(
                f"the record of {self.model_id} {self.iteration} holds a payload that its key does not derive",
                hint="this commitment proves nothing: the payload is derived, never chosen",
            )
        return subkeys


def _carrier_keys(
    subkey: Callable[[str], bytes], payload: bytes, carriers: tuple[Carrier, ...], steps: Mix
) -> tuple[CarrierKey, ...]:
    if not carriers:
        return ()
    total = sum(carrier.projections for carrier in carriers)
    bits = code.encode(payload, total, Stream(subkey("code"), "code"))
    key, position, keys = subkey("carriers"), 0, []
    # Which projection has which step is secret too: an attacker cannot aim at the few large ones.
    order = Stream(key, "steps").uniform(total).argsort(stable=True)
    levels = torch.tensor([step for step, count in steps.parts for _ in range(count)], dtype=torch.float64)[order]
    for carrier in carriers:
        part = slice(position, position + carrier.projections)
        keys.append(CarrierKey.derive(key, carrier, bits[part], levels[part]))
        position = part.stop
    return tuple(keys)


@dataclass(frozen=True, slots=True)
class _Subkeys:
    owner: OwnerKey
    model_id: str
    iteration: str
    slot: int
    salt: bytes

    def __call__(self, label: str) -> bytes:
        return self.owner.derive(
            label,
            model_id=self.model_id,
            iteration=self.iteration,
            slot=self.slot,
            salt=self.salt,
        )


def carrier_stream(owner: OwnerKey, model_id: str, iteration: str, salt: bytes) -> Stream:
    """Return the stream that chooses which matrices carry, and which of their rows."""
    return Stream(_Subkeys(owner, model_id, iteration, 0, salt)("tiles"), "tiles")


def trigger_key(owner: OwnerKey, model_id: str, iteration: str, salt: bytes) -> bytes:
    """Return the subkey that trigger texts and responses are derived from."""
    return _Subkeys(owner, model_id, iteration, 0, salt)("triggers")
