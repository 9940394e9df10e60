"""Transcripts: what a suspect was asked and what it said, as it happened, chained and signed.

A transcript is a file of lines of canonical JSON. The first, the header, holds the plan of the probe, fixed before the
first question; then comes one line per question, written through to the disk as soon as it is answered; the last one
holds the report. Each line names the one before it by its hash. The last is signed (ECDSA P-256): the signature covers
the report and, through the hash, every line before it.

A transcript without its last line is unfinished: it can be gone on with and proves nothing. What a chain and a
signature show is that nothing was changed since the owner signed; that the suspect really said this is the owner's
word. The lines do not say which questions are triggers.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from hf_wmguard.canonical import canonical_json, decode_base64, is_canonical_time, parse_canonical, require_object
from hf_wmguard.errors import NotFoundError, TranscriptError
from hf_wmguard.evidence.signing import signature_is_valid
from hf_wmguard.keys import public_key_id

VERSION: Final = 1
VERDICT_TYPE: Final = "application/vnd.hf-wmguard.transcript.v1+json"
GENESIS: Final = "sha256:" + "0" * 64
SEED_BYTES: Final = 32
MAX_LINE_BYTES: Final = 256 * 1024
MAX_LINES: Final = 100_000
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
MAX_TEXT_CHARACTERS: Final = 16_384
MAX_RANKED: Final = 20
MAX_TOKEN_CHARACTERS: Final = 200

_HEADER = {"kind": (str,), "version": (int,), "prev": (str,), "plan": (dict,), "seed": (str,), "time": (str,)}
_ANSWER: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "prev": (str,),
    "prompt": (str,),
    "text": (str,),
    "label": (int, type(None)),
    "ranked": (list,),
    "refused": (bool,),
    "time": (str,),
}
_VERDICT = {"kind": (str,), "prev": (str,), "report": (dict,), "key_id": (str,), "time": (str,), "signature": (str,)}
_FIELDS: dict[str, Mapping[str, tuple[type, ...]]] = {"header": _HEADER, "answer": _ANSWER, "verdict": _VERDICT}
AGAIN = "the transcript was cut, edited or damaged: get it again from where it was made, or probe into a new file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question and its answer.

    Args:
        prompt: The question, at most `MAX_TEXT_CHARACTERS`.
        text: What a generative model said.
        label: What a classifier said, or None.
        ranked: The likeliest first tokens, at most `MAX_RANKED`.
        refused: There was no answer.
        time: UTC to the second, the owner's clock.
    """

    prompt: str
    text: str = ""
    label: int | None = None
    ranked: tuple[str, ...] = ()
    refused: bool = False
    time: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a transcript holds, after every line was checked.

    Args:
        plan: What was fixed before the first question.
        seed: Hex of the bytes that the order of the questions is drawn from.
        time: When it was begun.
        asked: The questions in their order.
        head: Hash of the last line.
        report: The report in the last line, None in an unfinished transcript.
        key_id: Who signed it.
    """

    plan: Mapping[str, Any]
    seed: str
    time: str
    asked: tuple[Asked, ...]
    head: str
    report: Mapping[str, Any] | None = None
    key_id: str | None = None
    signature: bytes = field(default=b"", repr=False)
    signed: bytes = field(default=b"", repr=False)


def read_transcript(path: Path) -> Contents:
    """Return what a transcript holds, finished or not; the chain is checked, the signature is not.

    Raises:
        NotFoundError: There is no such file.
        TranscriptError: A line was changed, dropped, swapped or cut off in its middle.
    """
    return parse_lines(*split_lines(_read(path)), path=path)


def check_transcript(path: Path, signer: ec.EllipticCurvePublicKey) -> Contents:
    """Return what a finished transcript holds, if this key signed it.

    Args:
        path: The file.
        signer: The owner's public key.
    Raises:
        NotFoundError: There is no such file.
        TranscriptError: Unfinished, changed, or signed by another.
    """
    contents = read_transcript(path)
    if contents.report is None:
        raise TranscriptError(f"{path} has no verdict: it is unfinished, or its end was cut off", hint=AGAIN)
    if contents.key_id != public_key_id(signer):
        raise TranscriptError(
            f"{path} is signed by {contents.key_id}, expected {public_key_id(signer)}",
            hint="check the owner key; if it is right, somebody else made this transcript",
        )
    if not signature_is_valid(contents.signature, contents.signed, VERDICT_TYPE, signer):
        raise TranscriptError(f"{path}: the signature does not match", hint=AGAIN)
    return contents


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", hint="check the path of the transcript") from None
    try:
        return read_descriptor(descriptor, path)
    finally:
        os.close(descriptor)


def read_descriptor(descriptor: int, path: Path) -> bytes:
    """Return the bytes of an open file, if it is one that can be a transcript."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
        raise TranscriptError(f"{path} is no file of at most {MAX_FILE_BYTES} bytes", hint="this is not a transcript")
    return os.pread(descriptor, status.st_size, 0)


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete lines without their ends, and what stands behind the last of them."""
    *lines, torn = data.split(b"\n")
    return lines, torn


def parse_lines(lines: list[bytes], torn: bytes, *, path: Path) -> Contents:
    """Return what lines hold; see `read_transcript`."""
    if torn or not lines:
        raise TranscriptError(f"{path} is empty or its last line is cut off", hint=AGAIN)
    if len(lines) > MAX_LINES:
        raise TranscriptError(f"{path} has more than {MAX_LINES} lines", hint="this is not a transcript")
    head, header, verdict = GENESIS, {}, None
    asked: list[Asked] = []
    for number, line in enumerate(lines):
        fields = _parse_line(line, head, f"{path} line {number + 1}")
        if (fields["kind"] == "header") != (number == 0) or verdict is not None:
            raise TranscriptError(f"{path} line {number + 1} stands in the wrong place", hint=AGAIN)
        if fields["kind"] == "header":
            header = fields
        elif fields["kind"] == "verdict":
            verdict = fields
        else:
            asked.append(_asked(fields, f"{path} line {number + 1}"))
        head = hash_line(line)
    return _contents(header, asked, head, verdict)


def _contents(header: Mapping[str, Any], asked: list[Asked], head: str, verdict: Mapping[str, Any] | None) -> Contents:
    parts: dict[str, Any] = {}
    if verdict is not None:
        parts = {
            "report": verdict["report"],
            "key_id": verdict["key_id"],
            "signature": decode_base64(verdict["signature"], "transcript signature", error=TranscriptError),
            "signed": canonical_json({name: value for name, value in verdict.items() if name != "signature"}),
        }
    return Contents(
        plan=header["plan"], seed=header["seed"], time=header["time"], asked=tuple(asked), head=head, **parts
    )


def _parse_line(line: bytes, head: str, what: str) -> dict[str, Any]:
    value = parse_canonical(line, what, MAX_LINE_BYTES, error=TranscriptError)
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise TranscriptError(f"{what} is no line of a transcript", hint=AGAIN)
    fields = require_object(value, _FIELDS[kind], what, error=TranscriptError)
    if fields["prev"] != head:
        raise TranscriptError(f"{what} does not follow the line before it", hint=AGAIN)
    if not is_canonical_time(fields["time"]):
        raise TranscriptError(f"{what}: the time is malformed", hint=AGAIN)
    if kind == "header" and (fields["version"] != VERSION or len(fields["seed"]) != 2 * SEED_BYTES):
        raise TranscriptError(
            f"{what}: version {fields['version']}, expected {VERSION}",
            hint="read it with the version of hf-wmguard that wrote it",
        )
    return fields


def _asked(fields: Mapping[str, Any], what: str) -> Asked:
    ranked = fields["ranked"]
    texts_fit = max(len(fields["prompt"]), len(fields["text"])) <= MAX_TEXT_CHARACTERS
    tokens_fit = all(type(one) is str and len(one) <= MAX_TOKEN_CHARACTERS for one in ranked)
    if not texts_fit or not tokens_fit or len(ranked) > MAX_RANKED:
        raise TranscriptError(f"{what}: a text or a list is longer than any that is written", hint=AGAIN)
    return Asked(
        prompt=fields["prompt"],
        text=fields["text"],
        label=fields["label"],
        ranked=tuple(ranked),
        refused=fields["refused"],
        time=fields["time"],
    )


def hash_line(data: bytes) -> str:
    """Return the name of a line: ``sha256:`` and the hex digest of it without its end."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
