"""The registry: an append-only log of which key marked which model, private to its owner.

A registry is a folder with ``log.jsonl``. Each line is canonical JSON and names the line before it by hash,
so that lines cannot be changed, dropped, swapped or moved between registries. Bodies are encrypted for the
owner; sequence number, time and kind are readable by anyone. Each line is signed (ECDSA P-256).

What the log alone cannot show is the loss of its *newest* lines, or its replacement by an older copy: what is
left is a valid chain. Whoever knows the hash of an entry (every manifest of a marked model holds one) passes
it as ``expected_head``, and a log without that entry is refused.

Later evidence about an entry (a timestamp) is an entry of its own that names the first by hash: lines are
never changed, and entries of a kind this release does not know are checked and kept like any other.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from hf_wmguard.atomic import sync_folder
from hf_wmguard.canonical import (
    canonical_json,
    canonical_time,
    decode_base64,
    encode_base64,
    is_canonical_time,
    parse_canonical,
    require_object,
)
from hf_wmguard.errors import AuthenticationError, EnvironmentFault, NotFoundError, RegistryError, UsageError
from hf_wmguard.evidence.signing import make_signature, signature_is_valid
from hf_wmguard.keys import OwnerKey, public_key_id, write_new_file

LOG_NAME = "log.jsonl"
LOCK_NAME = "log.lock"
ENTRY_TYPE = "application/vnd.hf-wmguard.registry-entry.v1+json"
KINDS = ("commitment", "save")
GENESIS = "sha256:" + "0" * 64
MAX_LINE_BYTES = 64 * 1024 * 1024
MAX_ENTRIES = 100_000

_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LINE_FIELDS = {
    "seq": (int,),
    "prev": (str,),
    "time": (str,),
    "kind": (str,),
    "key_id": (str,),
    "body": (str,),
    "signature": (str,),
}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One checked and decrypted line of a registry.

    Attributes:
        seq: Place in the log, from 0.
        hash: ``sha256:`` and the hex digest of the whole line without its line end; the entry's name.
        prev: The hash of the line before; `GENESIS` for the first.
        time: UTC to the second, the owner's clock: no proof towards others.
        kind: One of `KINDS`, or what a later release added.
        body: The decrypted record; not shown by ``repr``.
    """

    seq: int
    hash: str
    prev: str
    time: str
    kind: str
    body: Mapping[str, Any] = field(repr=False)


def commitment_digest(private: Mapping[str, Any]) -> str:
    """Return ``sha256:`` and the hex digest of a private record in canonical JSON.

    It hides the record only as far as the record cannot be guessed: it must hold key-derived bytes.
    """
    return _hash(canonical_json(dict(private)))


class Registry:
    """A registry folder, seen with the key of its owner. Nothing is read or made before the first call.

    Args:
        directory: The folder; `append` makes it (mode 0700).
        owner: The one key that this registry belongs to.
    """

    def __init__(self, directory: Path, owner: OwnerKey) -> None:
        self._directory = directory
        self._log = directory / LOG_NAME
        self._owner = owner
        self._signing_key = owner.signing_key()
        self._public_key = self._signing_key.public_key()
        self._key_id = public_key_id(self._public_key)

    def append(self, kind: str, body: Mapping[str, Any], *, now: datetime | None = None) -> Entry:
        """Return the entry that was added at the end of the log, safe on disk.

        One writer at a time (a file lock). The last line is checked, not the whole chain. What an append that
        was killed left behind the last line was never reported as written: it goes to ``log.jsonl.torn-N``.

        Args:
            kind: One of `KINDS`.
            body: JSON values; encrypted before it is written.
            now: The entry's time, with a zone; the clock's by default.
        Raises:
            UsageError: An unknown kind, or a body that is too large.
            FormatError: The body is not JSON.
            AuthenticationError: The registry belongs to another key.
            RegistryError: The last line was changed.
            EnvironmentFault: The log cannot be written (disk full, permissions).
        """
        if kind not in KINDS:
            raise UsageError(
                f"registry entry of kind {kind!r}, expected one of {', '.join(KINDS)}", hint="check the kind"
            )
        data, time = canonical_json(dict(body)), canonical_time(now)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked(fcntl.LOCK_EX):
                seq, end_bytes, last = self._scan()
                # The last line's own word for its predecessor is taken: only `entries` walks the whole chain.
                head = self._check(last, seq - 1, None).hash if seq else GENESIS
                line = self._make_line(seq, head, kind, data, time)
                self._write_line(line, end_bytes)
        except OSError as error:
            raise EnvironmentFault(
                f"cannot append to {self._log}: {error.strerror}",
                hint="check free space and permissions; nothing was added",
            ) from None
        return self._check(line, seq, head)

    def entries(self, *, expected_head: str | None = None) -> list[Entry]:
        """Return all entries, oldest first, after checking every line, signature and body.

        Args:
            expected_head: Hash of an entry that must be in the log. Without it a log that lost its newest
                lines reads as well as a whole one.
        Raises:
            NotFoundError: There is no registry in the folder.
            EnvironmentFault: The log cannot be read (permissions).
            AuthenticationError: The registry belongs to another key.
            RegistryError: A line was changed, dropped, swapped or moved, or ``expected_head`` is missing.
        """
        entries: list[Entry] = []
        head = GENESIS
        try:
            with self._locked(fcntl.LOCK_SH), self._log.open("rb") as file:
                for line in _complete_lines(file):
                    entries.append(self._check(line, len(entries), head))
                    head = entries[-1].hash
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"no registry in {self._directory}: no file {LOG_NAME}",
                hint="check --registry; a registry is made by the first run that marks a model",
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"cannot read {self._log}: {error.strerror}", hint="check its permissions") from None
        if expected_head not in {None, GENESIS, *(entry.hash for entry in entries)}:
            raise RegistryError(
                f"{self._log} with {len(entries)} entries does not hold {expected_head}",
                hint="this is an older copy of the registry, or another: find the one used for this model",
            )
        return entries

    def head(self) -> str:
        """Return the hash of the newest entry (`GENESIS` where there is none); errors as `entries`."""
        entries = self.entries()
        return entries[-1].hash if entries else GENESIS

    def commitments(self, model_id: str | None = None) -> list[Entry]:
        """Return the commitments, oldest first, of one model or of all; errors as `entries`."""
        return [
            entry
            for entry in self.entries()
            if entry.kind == "commitment" and model_id in (None, entry.body.get("model_id"))
        ]

    def find(self, entry_hash: str) -> Entry:
        """Return the entry of a hash; errors as `entries`, also where no entry has it."""
        for entry in self.entries(expected_head=entry_hash):
            if entry.hash == entry_hash:
                return entry
        raise RegistryError(f"{entry_hash} names no entry", hint="use the hash that a manifest or a report names")

    def _scan(self) -> tuple[int, int, bytes]:
        """Return how many lines there are, the bytes they take, and the last one."""
        count, end_bytes, last = 0, 0, b""
        if self._log.exists():
            with self._log.open("rb") as file:
                for last in _complete_lines(file):
                    count, end_bytes = count + 1, end_bytes + len(last) + 1
        if count >= MAX_ENTRIES:
            raise UsageError(f"{self._log} has {count} entries, the most there can be", hint="start a new registry")
        return count, end_bytes, last

    def _write_line(self, line: bytes, end_bytes: int) -> None:
        is_new = not self._log.exists()
        descriptor = os.open(self._log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._move_torn_tail(descriptor, end_bytes)
            # One write call, so that a crash leaves the beginning of one line and never parts of two.
            if os.write(descriptor, line + b"\n") != len(line) + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end_bytes)
            raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(self._directory)

    def _move_torn_tail(self, descriptor: int, end_bytes: int) -> None:
        tail = os.pread(descriptor, MAX_LINE_BYTES, end_bytes)
        if not tail:
            return
        number = 1
        while (target := self._directory / f"{LOG_NAME}.torn-{number}").exists():
            number += 1
        write_new_file(target, tail, mode=0o600)
        os.ftruncate(descriptor, end_bytes)
        _logger.warning("%s: the unfinished last line was moved to %s", self._log, target.name)

    def _make_line(self, seq: int, prev: str, kind: str, body: bytes, time: str) -> bytes:
        header = [seq, prev, time, kind, self._key_id]
        sealed = self._owner.seal("registry", body, aad=canonical_json(header))
        fields: dict[str, Any] = {
            **dict(zip(("seq", "prev", "time", "kind", "key_id"), header, strict=True)),
            "body": encode_base64(sealed),
        }
        signature = make_signature(canonical_json(fields), ENTRY_TYPE, self._signing_key)
        line = canonical_json({**fields, "signature": encode_base64(signature)})
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(
                f"registry entry has {len(line)} bytes, expected at most {MAX_LINE_BYTES}",
                hint="keep large arrays in a file",
            )
        return line

    def _check(self, line: bytes, seq: int, prev: str | None) -> Entry:
        what = f"{self._log} line {seq + 1}"
        fields = require_object(
            parse_canonical(line, what, MAX_LINE_BYTES, error=RegistryError),
            _LINE_FIELDS,
            what,
            error=RegistryError,
        )
        if fields["key_id"] != self._key_id:
            raise AuthenticationError(
                f"{what} belongs to {fields['key_id'][:80]!a}, not to {self._key_id}",
                hint="--owner-key is not the key this registry was made with; use one registry per owner",
            )
        if fields["seq"] != seq or (prev is not None and fields["prev"] != prev):
            raise RegistryError(
                f"{what} does not follow the line before it (number {fields['seq']}, expected {seq})",
                hint="a line was dropped, swapped, repeated or brought in: restore the registry from a copy",
            )
        self._check_signature(fields, what)
        aad = canonical_json([fields[name] for name in ("seq", "prev", "time", "kind", "key_id")])
        sealed = decode_base64(fields["body"], f"{what} body", error=RegistryError)
        body = parse_canonical(
            self._owner.open("registry", sealed, aad=aad), f"{what} body", MAX_LINE_BYTES, error=RegistryError
        )
        if not isinstance(body, dict) or not is_canonical_time(fields["time"]) or not _KIND.fullmatch(fields["kind"]):
            raise RegistryError(
                f"{what}: body, time or kind is malformed",
                hint="upgrade hf-wmguard if a later one wrote this",
            )
        return Entry(
            seq=seq,
            hash=_hash(line),
            prev=fields["prev"],
            time=fields["time"],
            kind=fields["kind"],
            body=body,
        )

    def _check_signature(self, fields: Mapping[str, Any], what: str) -> None:
        signature = decode_base64(fields["signature"], f"{what} signature", error=RegistryError)
        signed = canonical_json({name: value for name, value in fields.items() if name != "signature"})
        if not signature_is_valid(signature, signed, ENTRY_TYPE, self._public_key):
            raise RegistryError(
                f"{what}: the signature does not match",
                hint="the line was changed: restore the registry from a copy",
            )

    @contextmanager
    def _locked(self, operation: int) -> Iterator[None]:
        # The lock is a file of its own, because the log may be replaced by a restored copy while somebody
        # waits. A reader of a copy without lock file, maybe on a read-only disk, goes without.
        flags = os.O_RDWR | os.O_CREAT if operation == fcntl.LOCK_EX else os.O_RDONLY
        try:
            descriptor = os.open(self._directory / LOCK_NAME, flags | os.O_CLOEXEC, 0o600)
        except OSError:
            if operation == fcntl.LOCK_EX:
                raise
            yield
            return
        try:
            fcntl.flock(descriptor, operation)
            yield
        finally:
            os.close(descriptor)


def _complete_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines without their ends. An unfinished last line is left out, with a warning in the log."""
    count = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        count += 1
        if count > MAX_ENTRIES:
            raise RegistryError(f"{file.name} has more than {MAX_ENTRIES} lines", hint="this is not a registry")
        if line.endswith(b"\n"):
            yield line[:-1]
        # A line's only closing brace is its last byte, so a killed write leaves none. One that is there
        # without the line end means that a finished line was damaged: leaving it out would hide an entry.
        elif len(line) > MAX_LINE_BYTES or b"}" in line:
            raise RegistryError(
                f"{file.name} line {count} has no line end",
                hint="the log was edited or damaged: restore the registry from a copy",
            )
        else:
            _logger.warning("%s: line %d is the rest of an append that was killed; ignored", file.name, count)


def _hash(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
