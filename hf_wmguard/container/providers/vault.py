"""HashiCorp Vault, secrets engine Transit: ``vault:MOUNT/KEY``, by hvac.

``VAULT_ADDR`` and ``VAULT_TOKEN`` (or ``~/.vault-token``) say where and who, as for the ``vault`` command, likewise
``VAULT_NAMESPACE`` and ``VAULT_CACERT``. The key must be of an AEAD type (``aes256-gcm96``). Model and set id are
associated data, which Vault has known since 1.9; an older one ignores it, and our own sealing stands alone.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from hf_wmguard.canonical import canonical_json, encode_base64
from hf_wmguard.container.services import ATTEMPTS, by_status, missing, no_credentials, refused, timeout_s, unavailable
from hf_wmguard.errors import ConfigError

KIND = "vault"
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+")
_TOKEN = re.compile(rb"vault:v\d{1,9}:[A-Za-z0-9+/]+={0,2}")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Vault:
    """A key of Vault's Transit engine; a `WrappingService`.

    Raises:
        ConfigError: Not a mount and a key.
    """

    kind = KIND

    def __init__(self, name: str) -> None:
        # A part of dots only would climb out of the engine's path.
        if not _NAME.fullmatch(name) or any(set(part) <= {"."} for part in name.split("/")):
            raise ConfigError("vault: not a mount and a key", hint="write vault:transit/KEY")
        self.name = name

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """Return Vault's text ``vault:v1:...``; errors as `WrappingService.wrap`."""
        answer = self._call("wrap", "encrypt_data", context, plaintext=encode_base64(key))
        token = str(answer.get("ciphertext", "")).encode()
        if not _TOKEN.fullmatch(token):
            raise unavailable(KIND, "an answer that is not Vault's")
        return token

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return what Vault decrypts; errors as `WrappingService.unwrap`."""
        if not _TOKEN.fullmatch(wrapped):
            raise refused(KIND, "unwrap")
        answer = self._call("unwrap", "decrypt_data", context, ciphertext=wrapped.decode())
        try:
            return base64.b64decode(str(answer.get("plaintext", "")), validate=True)
        except (binascii.Error, ValueError):
            raise unavailable(KIND, "an answer that is not Vault's") from None

    def _call(self, verb: str, operation: str, context: Mapping[str, str], **request: str) -> dict[str, Any]:
        try:
            import hvac
            from requests import RequestException, Session
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry
        except ImportError:
            raise missing(KIND, "hvac") from None
        address = _address()
        # A request that wraps or unwraps changes nothing there, so that it may be sent again.
        retry = Retry(total=ATTEMPTS - 1, backoff_factor=0.2, backoff_max=2, allowed_methods=None,
                      status_forcelist=(429, 500, 502, 503, 504), respect_retry_after_header=False,
                      raise_on_status=False)  # fmt: skip
        mount, _, key = self.name.rpartition("/")
        try:
            with Session() as session:
                # A session of our own takes these from nobody else.
                session.verify = os.environ.get("VAULT_CACERT") or os.environ.get("VAULT_CAPATH") or True
                session.mount(address, HTTPAdapter(max_retries=retry))
                # allow_redirects: the token is not carried to wherever a server points.
                client = hvac.Client(
                    url=address,
                    namespace=os.environ.get("VAULT_NAMESPACE"),
                    session=session,
                    timeout=timeout_s(),
                    allow_redirects=False,
                )
                if not client.token:
                    raise no_credentials(KIND, "set VAULT_TOKEN, or log in with: vault login")
                data = encode_base64(canonical_json(dict(context)))
                engine = client.secrets.transit
                answer = getattr(engine, operation)(name=key, mount_point=mount, associated_data=data, **request)
        except hvac.exceptions.VaultError as error:
            raise by_status(KIND, verb, _status(error)) from None
        except (RequestException, OSError) as error:
            raise unavailable(KIND, type(error).__name__) from None
        except ValueError:
            raise unavailable(KIND, "an answer that is not Vault's") from None
        found = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(found, dict):
            raise unavailable(KIND, "an answer that is not Vault's")
        return found


def _address() -> str:
    address = os.environ.get("VAULT_ADDR", "")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("vault: VAULT_ADDR is no URL", hint="set VAULT_ADDR to https://HOST:8200")
    # The token and what is wrapped would be readable on the way.
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise ConfigError("vault: VAULT_ADDR is not https", hint="use https; http is for a server on this machine")
    return address


def _status(error: Any) -> int | None:
    """Return the HTTP status behind an error of hvac, which has a class for each instead."""
    names = {
        "InvalidRequest": 400,
        "Unauthorized": 401,
        "Forbidden": 403,
        "InvalidPath": 404,
        "UnsupportedOperation": 405,
        "PreconditionFailed": 412,
        "RateLimitExceeded": 429,
        "InternalServerError": 500,
        "VaultNotInitialized": 501,
        "BadGateway": 502,
        "VaultDown": 503,
    }
    return names.get(type(error).__name__)
