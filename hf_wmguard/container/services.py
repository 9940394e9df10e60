"""Wrapping by a service that keeps its key to itself: a cloud's KMS, Vault, a hardware token.

A provider is one small class, `WrappingService`. What it wraps is not the DEK but a random key of this stanza,
under which the DEK is sealed here. Three things follow:

- The stanza is bound to its save by our own AES-GCM, also where a service knows no associated data (RSA in
  Azure Key Vault) or ignores it (an old Vault). Where it knows it, model and set id are given to it as well, so
  that its policies and its audit log can tell one model from another.
- The service, and whoever reads its traffic, never sees the DEK.
- A service that answers with another key opens nothing.

Which service is asked is what the user's reference says. The file never chooses: its stanza names the reference by
a hash, because a protected folder may be public and names of accounts and hosts are nobody's business.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from hf_wmguard.canonical import canonical_json, decode_base64, encode_base64
from hf_wmguard.container.stanzas import Stanza, WrapContext
from hf_wmguard.container.symmetric import KEY_BYTES, seal, unseal
from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    KeyServiceError,
    MissingDependencyError,
    NotFoundError,
    WmguardError,
)

TIMEOUT_VARIABLE = "WMGUARD_SERVICE_TIMEOUT_S"
ATTEMPTS = 3
MAX_WRAPPED_BYTES = 16 * 1024


@dataclass(slots=True)
class _Quiet:
    """How many blocks of `quiet_logs` are open in this process, and the level before the first."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    depth: int = 0
    before: int = 0


_quiet = _Quiet()


class WrappingService(Protocol):
    """A key that never leaves its service."""

    @property
    def kind(self) -> str:
        """The kind of the stanza: the scheme of the reference."""

    @property
    def name(self) -> str:
        """The key's one name, behind the scheme. Nothing secret, and nothing that may differ between machines."""

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """Return 32 bytes wrapped.

        Args:
            key: What is wrapped.
            context: Bound to it, where the service can: model id, set id, use.
        Raises:
            AuthenticationError: The service refuses.
            NotFoundError: It has no such key.
            KeyServiceError: It cannot be reached, or is too busy.
        """

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return what `wrap` wrapped; errors likewise."""


class ServiceKey:
    """A service as recipient and identity."""

    __slots__ = ("_service",)

    def __init__(self, service: WrappingService) -> None:
        self._service = service

    @property
    def key_id(self) -> str:
        """``sha256:`` and the hex digest of kind and name."""
        return "sha256:" + hashlib.sha256(canonical_json([self._service.kind, self._service.name])).hexdigest()

    def wrap(self, dek: bytes, context: WrapContext) -> Stanza:
        """Return the DEK wrapped; errors as `WrappingService.wrap`."""
        key, kind = secrets.token_bytes(KEY_BYTES), self._service.kind
        with quiet_logs():
            wrapped = self._service.wrap(key, _pairs(context))
        return {
            "kind": kind,
            "recipient": self.key_id,
            "wrapped": encode_base64(wrapped),
            "ciphertext": seal(key, dek, context.info(kind)),
        }

    def unwrap(self, stanza: Stanza, context: WrapContext) -> bytes | None:
        """Return the DEK, or None where the stanza is for somebody else; errors as `WrappingService.unwrap`."""
        kind = self._service.kind
        if stanza["kind"] != kind or stanza["recipient"] != self.key_id:
            return None
        wrapped = decode_base64(stanza["wrapped"], "stanza")
        if not 0 < len(wrapped) <= MAX_WRAPPED_BYTES:
            raise refused(kind, "unwrap")
        with quiet_logs():
            key = self._service.unwrap(wrapped, _pairs(context))
        if len(key) != KEY_BYTES:
            raise refused(kind, "unwrap")
        return unseal(key, stanza["ciphertext"], context.info(kind))

    def __repr__(self) -> str:
        return f"ServiceKey({self._service.kind}, {self.key_id})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never pickled: pass a reference and load it where it is needed")


def _pairs(context: WrapContext) -> dict[str, str]:
    return {
        "wmguard:use": "recipient/1",
        "wmguard:model_id": context.model_id,
        "wmguard:set_id": context.set_id,
    }


def timeout_s() -> float:
    """Return how long one answer of a service may take, in seconds.

    Raises:
        ConfigError: ``WMGUARD_SERVICE_TIMEOUT_S`` is not a number from 0.1 to 120.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "10")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 120:
        raise ConfigError(f"{TIMEOUT_VARIABLE} is {text!r}", hint="set it to 0.1 to 120 seconds, or not at all")
    return value


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Keep every library from logging at DEBUG in this block.

    Clients of services log whole requests and answers there, and what is wrapped stands in them. The level is the
    process's, since loggers have no other that all of them obey: other threads lose DEBUG lines for as long.
    """
    manager = logging.root.manager
    with _quiet.lock:
        if _quiet.depth == 0:
            _quiet.before = manager.disable
            logging.disable(max(manager.disable, logging.DEBUG))
        _quiet.depth += 1
    try:
        yield
    finally:
        with _quiet.lock:
            _quiet.depth -= 1
            if _quiet.depth == 0:
                logging.disable(_quiet.before)


# The messages of the clients are not repeated: they quote requests, and a request can hold a token.


def refused(kind: str, verb: str, reason: str = "") -> AuthenticationError:
    """Return the error for a service that says no."""
    return AuthenticationError(
        f"{kind} refuses to {verb} the key{f' ({reason})' if reason else ''}",
        hint="check that these credentials may use this key, that it is enabled, and that the file is of this save",
    )


def unavailable(kind: str, reason: str) -> KeyServiceError:
    """Return the error for a service that does not answer."""
    return KeyServiceError(
        f"{kind} does not answer ({reason})",
        hint=f"check address and network, and try again later; {TIMEOUT_VARIABLE} sets how long one answer may take",
    )


def no_such_key(kind: str) -> NotFoundError:
    """Return the error for a service that does not know the key."""
    return NotFoundError(f"{kind} has no such key", hint="check the reference, and the account or server it points at")


def no_credentials(kind: str, hint: str) -> KeyServiceError:
    """Return the error for a client that was given no credentials."""
    return KeyServiceError(f"{kind}: no credentials were found", hint=hint)


def missing(kind: str, package: str, extra: str = "kms") -> MissingDependencyError:
    """Return the error for a client library that is not installed."""
    return MissingDependencyError(f"{kind} needs the package {package}", hint=f"run: pip install 'hf-wmguard[{extra}]'")


def by_status(kind: str, verb: str, status: int | None) -> WmguardError:
    """Return the error for an HTTP status."""
    if status == 404:
        return no_such_key(kind)
    if status is None or status in (408, 429) or status >= 500:
        return unavailable(kind, "too many requests" if status == 429 else f"status {status}")
    return refused(kind, verb, f"status {status}")
