"""Azure Key Vault and Managed HSM: ``azurekv:https://VAULT.vault.azure.net/keys/NAME``, by azure-keyvault-keys.

Credentials are azure-identity's ``DefaultAzureCredential``. An RSA key wraps with RSA-OAEP-256, which takes no
associated data: our own sealing binds the stanza to its save. The key's version is noted with what it wrapped, so
that a rotated key still unwraps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_wmguard.container.services import ATTEMPTS, by_status, missing, no_credentials, refused, timeout_s, unavailable
from hf_wmguard.errors import ConfigError

KIND = "azurekv"
_NAME = re.compile(r"https://[A-Za-z0-9.-]+(:\d{1,5})?/keys/[A-Za-z0-9-]{1,127}")
_WRAPPED = re.compile(rb"([0-9a-f]{32})\.(.+)", re.DOTALL)


class AzureKeyVault:
    """An RSA key in Azure Key Vault; a `WrappingService`.

    Args:
        name: The key's URL without its version.
        credential: A ``TokenCredential``; by default azure-identity's.
        options: Passed on to the client.
    Raises:
        ConfigError: Not such a URL.
    """

    kind = KIND

    def __init__(self, name: str, credential: Any = None, **options: Any) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                "azurekv: not the URL of a key without its version",
                hint="write azurekv:https://VAULT.vault.azure.net/keys/NAME",
            )
        self.name = name
        self._credential = credential
        self._options = options

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """Return the key's version and what it wrapped; errors as `WrappingService.wrap`."""
        result = self._call("wrap", "wrap_key", self.name, key)
        version = str(result.key_id).rsplit("/", 1)[-1]
        wrapped = version.encode() + b"." + bytes(result.encrypted_key)
        if not _WRAPPED.fullmatch(wrapped):
            raise unavailable(KIND, "an answer without the key's version")
        return wrapped

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return what this key, in the version that wrapped, unwraps; errors as `WrappingService.unwrap`."""
        found = _WRAPPED.fullmatch(wrapped)
        if found is None:
            raise refused(KIND, "unwrap")
        return bytes(self._call("unwrap", "unwrap_key", f"{self.name}/{found[1].decode()}", found[2]).key)

    def _call(self, verb: str, operation: str, key: Any, data: bytes) -> Any:
        try:
            from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError
            from azure.identity import CredentialUnavailableError, DefaultAzureCredential
            from azure.keyvault.keys import KeyClient
            from azure.keyvault.keys.crypto import CryptographyClient, KeyWrapAlgorithm
        except ImportError:
            raise missing(KIND, "azure-keyvault-keys and azure-identity") from None
        seconds = timeout_s()
        options = {
            "connection_timeout": seconds,
            "read_timeout": seconds,
            "retry_total": ATTEMPTS - 1,
            "retry_backoff_factor": 0.2,
            "retry_backoff_max": 2,
            **self._options,
        }
        try:
            credential = self._credential or DefaultAzureCredential()
            if operation == "wrap_key":
                # The newest version; its public half is all that wrapping takes.
                vault, _, name = key.rpartition("/keys/")
                with KeyClient(vault, credential, **options) as keys:
                    key = keys.get_key(name)
            with CryptographyClient(key, credential, **options) as client:
                return getattr(client, operation)(KeyWrapAlgorithm.rsa_oaep_256, data)
        except CredentialUnavailableError:
            raise no_credentials(KIND, "run: az login") from None
        except ClientAuthenticationError:
            raise refused(KIND, verb, "the credentials are not accepted") from None
        except HttpResponseError as error:
            raise by_status(KIND, verb, error.status_code) from None
        except AzureError as error:
            raise unavailable(KIND, type(error).__name__) from None
