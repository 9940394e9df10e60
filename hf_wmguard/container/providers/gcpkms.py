"""Google Cloud KMS: ``gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K``, by google-cloud-kms over HTTPS.

Credentials are Google's application default credentials. Model and set id are additional authenticated data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.services import ATTEMPTS, by_status, missing, no_credentials, timeout_s, unavailable
from hf_wmguard.errors import ConfigError

KIND = "gcpkms"
_NAME = re.compile(r"projects/[\w:.-]+/locations/[\w-]+/keyRings/[\w-]+/cryptoKeys/[\w-]+")


class GcpKms:
    """A symmetric key in Google Cloud KMS; a `WrappingService`.

    Args:
        name: The key's resource name.
        client: A ``KeyManagementServiceClient``; by default one with the application default credentials.
    Raises:
        ConfigError: Not such a name.
    """

    kind = KIND

    def __init__(self, name: str, client: Any = None) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                "gcpkms: not the resource name of a key",
                hint="write gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K",
            )
        self.name = name
        self._client = client

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """Return the key encrypted by the service (Encrypt); errors as `WrappingService.wrap`."""
        return bytes(self._call("wrap", "encrypt", context, plaintext=key).ciphertext)

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return the key decrypted by the service (Decrypt); errors as `WrappingService.unwrap`."""
        return bytes(self._call("unwrap", "decrypt", context, ciphertext=wrapped).plaintext)

    def _call(self, verb: str, operation: str, context: Mapping[str, str], **request: bytes) -> Any:
        try:
            from google.api_core import exceptions, retry
            from google.auth import exceptions as auth
            from google.cloud import kms
            from requests import RequestException
        except ImportError:
            raise missing(KIND, "google-cloud-kms") from None
        busy = (exceptions.TooManyRequests, exceptions.ServiceUnavailable, exceptions.GatewayTimeout, RequestException)
        seconds = timeout_s()
        try:
            # REST and not gRPC, whose threads do not survive a fork of the process, and training forks.
            client = self._client or kms.KeyManagementServiceClient(transport="rest")
            return getattr(client, operation)(
                request={
                    "name": self.name,
                    "additional_authenticated_data": canonical_json(dict(context)),
                    **request,
                },
                retry=retry.Retry(
                    predicate=retry.if_exception_type(*busy), initial=0.2, maximum=2, timeout=ATTEMPTS * seconds
                ),
                timeout=seconds,
            )
        except auth.DefaultCredentialsError:
            raise no_credentials(KIND, "run: gcloud auth application-default login") from None
        except exceptions.RetryError:
            raise unavailable(KIND, "no answer in time") from None
        except exceptions.GoogleAPICallError as error:
            raise by_status(KIND, verb, error.code) from None
        except (auth.GoogleAuthError, RequestException, OSError) as error:
            raise unavailable(KIND, type(error).__name__) from None
