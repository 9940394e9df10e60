"""The manifest as a value: its fields, their bounds and its one spelling. No file is touched here.

See `hf_wmguard.evidence.manifest` for the verbs: write, read, check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_wmguard.canonical import (
    canonical_json,
    decode_base64,
    is_canonical_time,
    parse_canonical,
    require_object,
)
from hf_wmguard.errors import ManifestError

MANIFEST_NAME = "wmguard_manifest.json"
ENVELOPE_NAME = "wmguard_manifest.sig.json"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
MAX_FILES = 10_000
MAX_FILE_BYTES = 1 << 53
STATES = ("pending", "ramping", "complete")

_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 1024
_MAX_TEXT_CHARACTERS = 256
_HEX = re.compile(r"(?:[0-9a-f]{2}){8,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY_HASH = re.compile(r"sha256:[0-9a-f]{64}")

_FIELDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "model_id": (str,),
    "iteration": (str,),
    "set_id": (str,),
    "created": (str,),
    "step": (int, type(None)),
    "state": (str,),
    "files": (list,),
    "dek_commitment": (str,),
    "commitment": (str, type(None)),
    "commitment_time": (str, type(None)),
    "commitment_timestamp": (str, type(None)),
    "signature": (dict, type(None)),
    "triggers": (dict, type(None)),
    "sealed_state": (str, type(None)),
}
_FILE_FIELDS = {"name": (str,), "size_bytes": (int,), "sha256": (str,)}
_SIGNATURE_FIELDS = {
    "bit_error_rate": (float,),
    "log10_p": (float,),
    "projections": (int,),
    "payload_decoded": (bool,),
    "weight_change": (float,),
}
_TRIGGER_FIELDS = {"count": (int,), "candidates": (int,), "match_rate": (float, type(None))}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ManifestError(f"manifest: {message}", hint="save again with this release, or get the folder again")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file that the manifest covers.

    Attributes:
        name: A file in the folder, or in a subfolder (``1_Pooling/config.json``): no way out of the folder, no control
            or format character, at most 255 bytes between slashes and 1024 in all.
        size_bytes: 0 to 2^53.
        sha256: 64 hex digits, of the file as it lies on the disk.
    Raises:
        ManifestError: A value outside these bounds.
    """

    name: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        # A name is joined to a folder and opened: one that leaves the folder must not get so far. Backslash
        # and colon are separators elsewhere, and isprintable() also shuts out surrogates and bidi marks.
        plain = self.name.isprintable() and not any(mark in self.name for mark in "\\:")
        _require(
            plain
            and all(part not in ("", ".", "..") for part in self.name.split("/"))
            and all(len(part.encode()) <= _MAX_NAME_BYTES for part in self.name.split("/"))
            and len(self.name.encode()) <= _MAX_PATH_BYTES,
            f"{self.name[:100]!a} does not name a file in the folder",
        )
        _require(self.name not in (MANIFEST_NAME, ENVELOPE_NAME), f"{self.name} cannot cover itself")
        _require(0 <= self.size_bytes <= MAX_FILE_BYTES, f"{self.name} has {self.size_bytes} bytes")
        _require(bool(_SHA256.fullmatch(self.sha256)), f"the SHA-256 of {self.name} is not 64 hex digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureSummary:
    """What was read back from the encrypted files after the save.

    Attributes:
        bit_error_rate: 0 to 1, before error correction.
        log10_p: Decimal logarithm of the p-value, at most 0.
        projections: How many were read, at least 1.
        payload_decoded: Whether error correction gave the payload back.
        weight_change: Norm of the change over the norm of the carrying matrices, at least 0.
    Raises:
        ManifestError: A value outside these bounds, or an int where a float stands.
    """

    bit_error_rate: float
    log10_p: float
    projections: int
    payload_decoded: bool
    weight_change: float

    def __post_init__(self) -> None:
        for name in ("bit_error_rate", "log10_p", "weight_change"):
            value = getattr(self, name)
            _require(isinstance(value, float) and math.isfinite(value), f"signature {name} is not a finite float")
        _require(
            0 <= self.bit_error_rate <= 1,
            f"signature bit_error_rate is {self.bit_error_rate}, expected 0 to 1",
        )
        _require(self.log10_p <= 0, f"signature log10_p is {self.log10_p}, expected at most 0")
        _require(self.weight_change >= 0, f"signature weight_change is {self.weight_change}, expected at least 0")
        _require(self.projections >= 1, f"signature has {self.projections} projections, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerSummary:
    """The trigger set, in numbers that give no trigger away.

    Attributes:
        count: Triggers, at least 1.
        candidates: Responses each could have had, at least 2.
        match_rate: 0 to 1, or None where it was not measured.
    Raises:
        ManifestError: A value outside these bounds.
    """

    count: int
    candidates: int
    match_rate: float | None

    def __post_init__(self) -> None:
        _require(self.count >= 1, f"triggers: count is {self.count}, expected at least 1")
        _require(self.candidates >= 2, f"triggers: candidates is {self.candidates}, expected at least 2")
        rate = self.match_rate
        _require(
            rate is None or (isinstance(rate, float) and 0 <= rate <= 1),
            "triggers: match_rate is not a float of 0 to 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the owner signs about one save.

    Attributes:
        model_id: The model's name, 1 to 256 printable characters.
        iteration: The owner's name for this version of it, likewise.
        set_id: Hex (8 to 64 bytes) that all encrypted files of this save share.
        created: UTC to the second, as `hf_wmguard.canonical.canonical_time`.
        step: Training step of the save, or None outside training.
        state: ``pending`` before the mark, ``ramping`` while it is written, ``complete``.
        files: 1 to 10,000 files, sorted by name, no name twice.
        dek_commitment: Hex (8 to 64 bytes) that binds the data encryption key.
        commitment: Hash of the registry entry that was made before training, ``sha256:...``, or None.
        commitment_time: That entry's time; None exactly where ``commitment`` is.
        signature: What was read back from the files, or None where the channel is off or not judged.
        triggers: The trigger set in numbers, or None.
        sealed_state: Base64 that only the owner can open, or None.
        commitment_timestamp: Base64 of an RFC 3161 token over the commitment; carried here, not judged here.
    Raises:
        ManifestError: A value outside these bounds.
    """

    model_id: str
    iteration: str
    set_id: str
    created: str
    step: int | None
    state: Literal["pending", "ramping", "complete"]
    files: tuple[FileEntry, ...]
    dek_commitment: str
    commitment: str | None
    commitment_time: str | None
    signature: SignatureSummary | None
    triggers: TriggerSummary | None
    sealed_state: str | None
    commitment_timestamp: str | None = None

    def __post_init__(self) -> None:
        for name in ("model_id", "iteration"):
            value = getattr(self, name)
            fits = value.isprintable() and 1 <= len(value) <= _MAX_TEXT_CHARACTERS
            _require(fits, f"{name} is not 1 to {_MAX_TEXT_CHARACTERS} printable characters")
        for name in ("set_id", "dek_commitment"):
            _require(bool(_HEX.fullmatch(getattr(self, name))), f"{name} is not 8 to 64 bytes in hex")
        _require(is_canonical_time(self.created), "created is not a UTC time to the second")
        _require(self.step is None or self.step >= 0, f"step is {self.step}, expected at least 0")
        _require(self.state in STATES, f"state is {self.state[:100]!a}, expected one of {', '.join(STATES)}")
        _require(1 <= len(self.files) <= MAX_FILES, f"{len(self.files)} files, expected 1 to {MAX_FILES}")
        names = [entry.name for entry in self.files]
        _require(names == sorted(set(names)), "files are not sorted by name, each name once")
        self._check_commitment()
        for name in ("sealed_state", "commitment_timestamp"):
            value = getattr(self, name)
            if value is not None:
                decode_base64(value, f"manifest {name}", error=ManifestError)

    def _check_commitment(self) -> None:
        known = self.commitment is not None
        _require(known == (self.commitment_time is not None), "commitment and commitment_time stand together")
        _require(known or self.commitment_timestamp is None, "commitment_timestamp without a commitment")
        if self.commitment is not None and self.commitment_time is not None:
            _require(bool(_ENTRY_HASH.fullmatch(self.commitment)), "commitment is not sha256: and 64 hex digits")
            _require(is_canonical_time(self.commitment_time), "commitment_time is not a UTC time to the second")

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON."""
        return canonical_json({"version": MANIFEST_VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the manifest that `to_bytes` wrote.

        Raises:
            ManifestError: Too large, not canonical JSON, of another version, a field unknown, missing, of
                another type or out of bounds.
        """
        raw = parse_canonical(data, "manifest", MAX_MANIFEST_BYTES, error=ManifestError)
        if isinstance(raw, dict) and raw.get("version") != MANIFEST_VERSION:
            raise ManifestError(
                f"manifest version is {ascii(raw.get('version'))[:20]}, expected {MANIFEST_VERSION}",
                hint="upgrade hf-wmguard if a later release wrote this",
            )
        fields = _object(raw, _FIELDS, "manifest")
        _require(len(fields["files"]) <= MAX_FILES, f"{len(fields['files'])} files, expected at most {MAX_FILES}")
        del fields["version"]
        files = tuple(FileEntry(**_object(entry, _FILE_FIELDS, "manifest file")) for entry in fields.pop("files"))
        signature, triggers = fields.pop("signature"), fields.pop("triggers")
        return cls(
            **fields,
            files=files,
            signature=None
            if signature is None
            else SignatureSummary(**_object(signature, _SIGNATURE_FIELDS, "manifest signature")),
            triggers=None
            if triggers is None
            else TriggerSummary(**_object(triggers, _TRIGGER_FIELDS, "manifest triggers")),
        )


def _object(value: object, fields: Mapping[str, tuple[type, ...]], what: str) -> dict[str, Any]:
    return require_object(value, fields, what, error=ManifestError)
