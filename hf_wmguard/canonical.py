"""Values with exactly one spelling: JSON, base64 and time.

What is signed, hashed or used as associated data must have one byte form only. A reader that accepted a
second one (a duplicate key, a space, stray base64 bits) would let a file change without its meaning, and
its digest without its content.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hf_wmguard.errors import FormatError, IntegrityError, UsageError

_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def canonical_json(value: object) -> bytes:
    """Return the one JSON spelling of a value: sorted keys, no spaces, UTF-8, no NaN.

    Args:
        value: Objects with string keys, lists, strings, finite numbers, booleans, None.
    Raises:
        FormatError: The value holds anything else.
    Source: RFC 8785.
    Deviation: keys are sorted by code point instead of UTF-16 unit, and numbers are spelt as Python does.
    """
    try:
        _require_string_keys(value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError):
        # The cause is cut off: its message may quote the value, and the value may be private.
        raise FormatError(
            f"a {type(value).__name__} cannot be written as canonical JSON",
            hint="use string keys, lists, valid Unicode and finite numbers; no bytes, no tensors",
        ) from None


def _require_string_keys(value: object) -> None:
    # json.dumps writes the keys 1 and "1" alike, so that one object could lose a member on the way.
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for member in value:
        # Asked here and not in the call: a header has thousands of numbers, and few of anything else.
        if isinstance(member, (dict, list, tuple)):
            _require_string_keys(member)


def parse_canonical(data: bytes, what: str, limit_bytes: int, *, error: type[IntegrityError] = FormatError) -> Any:
    """Return the value of canonical JSON bytes.

    Args:
        data: The bytes as read.
        what: The thing that is read, for the error message ("manifest").
        limit_bytes: The most that is parsed.
        error: The class that is raised.
    Raises:
        IntegrityError: ``error``: too large, not JSON, or any other spelling than that of `canonical_json`
            (duplicate keys, spaces, another order, NaN, numbers that overflow).
    """
    if len(data) > limit_bytes:
        raise error(
            f"{what} has {len(data)} bytes, expected at most {limit_bytes}",
            hint="this file is not what its name says",
        )
    try:
        value = json.loads(data.decode())
        canonical = canonical_json(value)
    except (ValueError, RecursionError, FormatError):
        raise error(f"{what} is not canonical JSON", hint=f"the {what} was changed or cut: get it again") from None
    if canonical != data:
        raise error(
            f"{what} is JSON, but not in its canonical spelling",
            hint=f"the {what} was edited or written by another program: get it again",
        )
    return value


def require_object(
    value: object,
    fields: Mapping[str, tuple[type, ...]],
    what: str,
    *,
    error: type[IntegrityError] = FormatError,
) -> dict[str, Any]:
    """Return a parsed object that has exactly the given fields, each of one of the given types.

    Types are compared exactly: True is no int, and 1 is no float.

    Raises:
        IntegrityError: ``error``: not an object, a field unknown or missing, or of another type.
    """
    if not isinstance(value, dict):
        raise error(f"{what} is a {type(value).__name__}, expected an object", hint=f"get the {what} again")
    if unknown := sorted(value.keys() - fields.keys()):
        raise error(
            f"{what} has unknown fields {', '.join(map(ascii, unknown[:5]))}",
            hint="upgrade hf-wmguard if a later release wrote this",
        )
    if missing := sorted(fields.keys() - value.keys()):
        raise error(f"{what} lacks {', '.join(missing)}", hint=f"the {what} was cut or edited: get it again")
    for name, types in fields.items():
        if type(value[name]) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            raise error(
                f"{what}: {name} is a {type(value[name]).__name__}, expected {expected}",
                hint=f"the {what} was edited: get it again",
            )
    return value


def encode_base64(data: bytes) -> str:
    """Return the base64 text of bytes (RFC 4648, sec. 4, padded)."""
    return base64.b64encode(data).decode("ascii")


def decode_base64(text: str, what: str, *, error: type[IntegrityError] = FormatError) -> bytes:
    """Return the bytes of base64 text.

    Raises:
        IntegrityError: ``error``: not base64, or a second spelling of the same bytes.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise error(f"{what} is not base64", hint=f"the {what} was changed: get it again") from None
    # The bits behind the last byte are ignored by the decoder: without this line "QQ==" and "QR==" are alike.
    if encode_base64(data) != text:
        raise error(f"{what} is not in canonical base64", hint=f"the {what} was changed: get it again")
    return data


def canonical_time(now: datetime | None = None) -> str:
    """Return a time in UTC to the second, ``2026-01-31T12:00:00Z`` (RFC 3339).

    Args:
        now: A time with a zone; the clock's by default.
    Raises:
        UsageError: The time has no zone.
    """
    moment = datetime.now(UTC) if now is None else now
    if moment.tzinfo is None:
        raise UsageError("a time without a zone", hint="pass datetime.now(UTC)")
    return moment.astimezone(UTC).strftime(_TIME_FORMAT)


def is_canonical_time(text: str) -> bool:
    """Return whether a text is spelt as `canonical_time` does."""
    try:
        # The year is compared too: strptime takes fewer digits than strftime writes.
        return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC).strftime(_TIME_FORMAT) == text
    except ValueError:
        return False
