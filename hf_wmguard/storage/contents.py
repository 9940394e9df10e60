"""Judge one file of a store by its name and a few of its bytes: plaintext weights, training state, secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from hf_wmguard.container.disguise import BEGIN_BYTES, begins_like
from hf_wmguard.container.files import is_protected
from hf_wmguard.container.source import Source
from hf_wmguard.errors import IntegrityError, ManifestError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    MANIFEST_TYPE,
    WEIGHT_SUFFIXES,
    Manifest,
    is_trainer_state,
)
from hf_wmguard.evidence.records import MAX_MANIFEST_BYTES
from hf_wmguard.evidence.signing import MAX_ENVELOPE_BYTES, open_envelope
from hf_wmguard.storage.findings import Finding
from hf_wmguard.storage.leaks import holds_no_tensors, secrets_in_pickle, secrets_in_text
from hf_wmguard.stores.store import StoredFile

MAX_TEXT_BYTES = 1 << 20
MAX_STATE_BYTES = 1 << 20
_MAX_NOTE_BYTES = 64 << 10
# A file below this is no model whatever it holds.
_MIN_WEIGHTS_BYTES = 64 << 10
# What other frameworks call weights.
_WEIGHTS = WEIGHT_SUFFIXES | {".h5", ".keras", ".msgpack", ".npz", ".onnx", ".ot", ".pkl", ".tflite"}
_TEXT = {"", ".cfg", ".conf", ".env", ".ini", ".ipynb", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
_KEYS = re.compile(r".*\.(?:pem|key|p12|pfx|jks)|id_(?:rsa|ed25519|ecdsa)|\.netrc|\.?env(?:\..+)?|.*\.env|credentials")
_PLAINTEXT = "delete it here and from the history, protect it with wmguard protect, and push that"
_REVOKE = "revoke it now, then delete the file and its history: whoever could read it may have kept it"
Opener = Callable[[str], Source]


def needs_reading(name: str, size_bytes: int) -> bool:
    """Return whether `judge_file` would read anything of a file."""
    base = PurePosixPath(name).name
    suffix = _suffix(base)
    return (
        suffix in _WEIGHTS
        or size_bytes >= _MIN_WEIGHTS_BYTES
        or bool(_KEYS.fullmatch(base))
        or (suffix in _TEXT and size_bytes <= MAX_TEXT_BYTES)
    )


def judge_file(name: str, where: str, source: Source, *, public: bool = False) -> list[Finding]:
    """Return what is wrong with a file.

    Args:
        name: Its name, with folders.
        where: What it is called in a finding, with its version.
        source: Its bytes; of weights the header alone is read.
        public: Whether everybody can read it.
    Raises:
        EnvironmentFault: It cannot be read.
    """
    base = PurePosixPath(name).name
    if is_trainer_state(base):
        return _judge_state(base, where, source, public)
    what = _weights(base, source) if _suffix(base) in _WEIGHTS else _disguised(source)
    if what is not None:
        return [_plaintext(where, what, public)]
    if _suffix(base) not in _WEIGHTS and (_KEYS.fullmatch(base) or _suffix(base) in _TEXT):
        return _judge_text(base, where, source)
    return []


def judge_manifest(where: str, files: Mapping[str, StoredFile], opened: Opener) -> list[Finding]:
    """Return what is wrong with the manifests of one version of a folder: whose signature does not hold, or whose files
    are others.

    Args:
        where: What the version is called in a finding.
        files: Its files, by name with folders.
        opened: Gives the bytes of one.
    Raises:
        EnvironmentFault: A file cannot be read.
    """
    found = []
    folders = {name.rpartition("/")[0] for name in files if PurePosixPath(name).name in (MANIFEST_NAME, ENVELOPE_NAME)}
    for folder in sorted(folders):
        path = f"{folder}/" if folder else ""
        try:
            _check_manifest(path, files, opened)
        except IntegrityError as error:
            found.append(
                Finding(
                    severity="medium",
                    what="manifest",
                    where=f"{where}: {path}{MANIFEST_NAME}",
                    detail=error.message,
                    remedy="push the folder again, whole",
                )
            )
    return found


def read_small(source: Source, limit_bytes: int) -> bytes:
    """Return the first bytes of a file, at most a limit."""
    buffer = bytearray(min(source.size_bytes, limit_bytes))
    if buffer:
        source.read_into(memoryview(buffer), 0)
    return bytes(buffer)


def _suffix(base: str) -> str:
    return PurePosixPath(base).suffix.lower()


def _weights(base: str, source: Source) -> str | None:
    suffix = _suffix(base)
    if suffix == ".safetensors":
        return None if is_protected(source) else "safetensors that are not protected"
    if source.size_bytes <= _MAX_NOTE_BYTES and holds_no_tensors(read_small(source, _MAX_NOTE_BYTES)):
        return None
    return f"weights as {suffix}, a kind that is never protected"


def _disguised(source: Source) -> str | None:
    """Return what a file of another name begins like, where that is a model."""
    if source.size_bytes < _MIN_WEIGHTS_BYTES:
        return None
    what = begins_like(read_small(source, BEGIN_BYTES))
    return None if what is None or is_protected(source) else f"begins like {what}"


def _plaintext(where: str, what: str, public: bool) -> Finding:
    severity = "critical" if public else "high"
    return Finding(severity=severity, what="plaintext", where=where, detail=what, remedy=_PLAINTEXT)


def _judge_state(base: str, where: str, source: Source, public: bool) -> list[Finding]:
    found = []
    if base != "optimizer.pt" and source.size_bytes > MAX_STATE_BYTES:
        return [_plaintext(where, f"{source.size_bytes} bytes, too many for what its name says", public)]
    if base == "training_args.bin" or source.size_bytes <= _MAX_NOTE_BYTES:
        data = read_small(source, MAX_STATE_BYTES)
        found += [_secret(where, what) for what in secrets_in_pickle(data)]
        if base == "training_args.bin" or holds_no_tensors(data):
            return found
    moments = base == "optimizer.pt"
    return [
        *found,
        Finding(
            severity="medium" if moments else "low",
            what="state",
            where=where,
            detail="moments of the optimizer, which tell about weights and data" if moments else "state of a training",
            remedy="do not push checkpoints in plaintext; delete it here and from the history",
        ),
    ]


def _judge_text(base: str, where: str, source: Source) -> list[Finding]:
    data = read_small(source, MAX_TEXT_BYTES)
    found = [_secret(where, what) for what in secrets_in_text(data)]
    if not found and data and _KEYS.fullmatch(base):
        detail = "is called like a file of secrets"
        found.append(Finding(severity="high", what="secret", where=where, detail=detail, remedy=_REVOKE))
    return found


def _secret(where: str, what: str) -> Finding:
    return Finding(severity="critical", what="secret", where=where, detail=f"holds {what}", remedy=_REVOKE)


def _check_manifest(path: str, files: Mapping[str, StoredFile], opened: Opener) -> None:
    """Raise where a manifest is not what its envelope signs, or lists other files than there are.

    Raises:
        IntegrityError: It does not hold.
    """
    for name in (MANIFEST_NAME, ENVELOPE_NAME):
        if path + name not in files:
            raise ManifestError(f"there is no {name} beside it", hint="push it again")
    data = read_small(opened(path + MANIFEST_NAME), MAX_MANIFEST_BYTES + 1)
    envelope = read_small(opened(path + ENVELOPE_NAME), MAX_ENVELOPE_BYTES + 1)
    if open_envelope(envelope, payload_type=MANIFEST_TYPE, signer=None).payload != data:
        raise ManifestError(f"it is not what {ENVELOPE_NAME} signs", hint="push it again")
    for entry in Manifest.from_bytes(data).files:
        stored = files.get(path + entry.name)
        if stored is None:
            raise ManifestError(f"lists {entry.name}, which is not there", hint="push it again")
        if stored.size_bytes != entry.size_bytes or stored.sha256 not in (None, entry.sha256):
            raise ManifestError(f"lists another {entry.name} than there is", hint="push it again")
