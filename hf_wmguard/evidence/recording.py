"""Writing transcripts: one line per answer, on the disk before it counts."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hf_wmguard.canonical import canonical_json, canonical_time, encode_base64
from hf_wmguard.errors import AuthenticationError, ConfigError, EnvironmentFault, NotFoundError, UsageError
from hf_wmguard.evidence.signing import make_signature
from hf_wmguard.evidence.transcript import (
    GENESIS,
    MAX_LINE_BYTES,
    SEED_BYTES,
    VERDICT_TYPE,
    VERSION,
    Asked,
    check_transcript,
    hash_line,
    parse_lines,
    read_descriptor,
    split_lines,
)
from hf_wmguard.keys import OwnerKey


class Transcript:
    """A transcript that is being written. One process at a time; mode 0600.

    Args:
        path: The file, made if it is not there. One that is there is gone on with if its plan is this one.
        plan: What is fixed before the first question; JSON values.
        owner: Whose key signs the report.
    Attributes:
        seed: Hex of the bytes that the order of the questions is drawn from.
        asked: What stood in the file when it was opened.
        is_finished: Whether it holds a report.
    Raises:
        ConfigError: The file is there with another plan; the message names the fields that differ.
        UsageError: Another process writes to it.
        TranscriptError: It was changed, or is signed by another.
        EnvironmentFault: It cannot be written.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], owner: OwnerKey) -> None:
        self._path = path
        self._owner = owner
        self._head = GENESIS
        self.seed = ""
        self.asked: tuple[Asked, ...] = ()
        self.is_finished = False
        self._descriptor = _open(path)
        try:
            self._begin(plan)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def append(self, asked: Asked) -> None:
        """Add a question and its answer, safe on the disk when this returns."""
        value = {
            "kind": "answer",
            "prev": self._head,
            "prompt": asked.prompt,
            "text": asked.text,
            "label": asked.label,
            "ranked": list(asked.ranked),
            "refused": asked.refused,
            "time": asked.time or canonical_time(),
        }
        self._head = self._write(canonical_json(value))

    def finish(self, report: Mapping[str, Any]) -> None:
        """Add the report, signed. Nothing is added where there is one already."""
        if self.is_finished:
            return
        value = {
            "kind": "verdict",
            "prev": self._head,
            "report": dict(report),
            "key_id": self._owner.key_id(),
            "time": canonical_time(),
        }
        signature = make_signature(canonical_json(value), VERDICT_TYPE, self._owner.signing_key())
        self._write(canonical_json(value | {"signature": encode_base64(signature)}))
        self.is_finished = True

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self, plan: Mapping[str, Any]) -> None:
        data = read_descriptor(self._descriptor, self._path)
        lines, torn = split_lines(data)
        if torn:
            # The rest of a write that was killed: that question was never reported as answered.
            os.ftruncate(self._descriptor, len(data) - len(torn))
        if len(lines) == 1:
            # Nothing was asked yet: the plan may still be another one.
            parse_lines(lines, b"", path=self._path)
            os.ftruncate(self._descriptor, 0)
        if len(lines) < 2:
            self.seed = secrets.token_hex(SEED_BYTES)
            header = {
                "kind": "header",
                "version": VERSION,
                "prev": GENESIS,
                "plan": dict(plan),
                "seed": self.seed,
                "time": canonical_time(),
            }
            self._head = self._write(canonical_json(header))
            return
        contents = parse_lines(lines, b"", path=self._path)
        if contents.report is not None:
            check_transcript(self._path, self._owner.signing_key().public_key())
            self.is_finished = True
        _require_same(contents.plan, plan, self._path)
        self.seed, self.asked, self._head = contents.seed, contents.asked, contents.head

    def _write(self, line: bytes) -> str:
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"a line of {len(line)} bytes, expected at most {MAX_LINE_BYTES}", hint="cut the answer")
        try:
            # One write call, so that a process that is killed leaves the beginning of one line at most.
            if os.write(self._descriptor, line + b"\n") != len(line) + 1:
                raise OSError(None, "disk full")
            os.fsync(self._descriptor)
        except OSError as error:
            raise EnvironmentFault(
                f"cannot write {self._path}: {error.strerror}",
                hint="free some space and run the same command again: what was answered is kept",
            ) from None
        return hash_line(line)


def _open(path: Path) -> int:
    """Return a locked descriptor for reading and appending, of a file that only its owner can read."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise NotFoundError(f"no folder {path.parent}", hint="create the folder first") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot write {path}: {error.strerror}", hint="check path and permissions") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"{path} is not a regular file", hint="choose another file for the transcript")
        os.fchmod(descriptor, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"{path} is being written by another process", hint="wait for it, or choose another file"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise EnvironmentFault(f"cannot lock {path}: {error.strerror}", hint="choose a file of your own") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_same(there: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    differing = sorted(
        name
        for name in there.keys() | wanted.keys()
        if (name in there, there.get(name)) != (name in wanted, wanted.get(name))
    )
    if "owner" in differing:
        raise AuthenticationError(f"{path} was begun with another owner key", hint="check --owner-key")
    if differing:
        raise ConfigError(
            f"{path} was begun with another plan: {', '.join(map(ascii, differing[:8]))} differ",
            hint="repeat the options it was begun with, or choose a new file",
        )
