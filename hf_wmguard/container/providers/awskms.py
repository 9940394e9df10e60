"""AWS KMS: ``awskms:ARN``, ``awskms:alias/NAME`` or ``awskms:KEY_ID``, by boto3.

Credentials, region and endpoint are boto3's own (environment, shared files, instance role); an ARN brings its region.
The encryption context binds model and set id, and stands in CloudTrail.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from hf_wmguard.container.services import (
    ATTEMPTS,
    missing,
    no_credentials,
    no_such_key,
    refused,
    timeout_s,
    unavailable,
)
from hf_wmguard.errors import ConfigError

KIND = "awskms"
_NAME = re.compile(r"(arn:aws[\w-]*:kms:[a-z0-9-]+:\d{12}:(key|alias)/[\w/-]+)|(alias/[\w/-]+)|([\w-]{1,128})")
_BUSY = frozenset(
    {
        "DependencyTimeoutException",
        "KMSInternalException",
        "KeyUnavailableException",
        "LimitExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)


class AwsKms:
    """A key in AWS KMS; a `WrappingService`.

    Raises:
        ConfigError: Not the name of a key.
    """

    kind = KIND

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError("awskms: not a key of AWS KMS", hint="write awskms:alias/NAME or awskms:ARN")
        self.name = name

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """Return the key encrypted by KMS (Encrypt); errors as `WrappingService.wrap`."""
        answer = self._call("wrap", "encrypt", Plaintext=key, EncryptionContext=dict(context))
        return bytes(answer["CiphertextBlob"])

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return the key decrypted by KMS (Decrypt), by this key and no other that the caller may use."""
        answer = self._call("unwrap", "decrypt", CiphertextBlob=wrapped, EncryptionContext=dict(context))
        return bytes(answer["Plaintext"])

    def _call(self, verb: str, operation: str, **request: Any) -> Any:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import (
                BotoCoreError,
                ClientError,
                NoCredentialsError,
                NoRegionError,
                PartialCredentialsError,
            )
        except ImportError:
            raise missing(KIND, "boto3") from None
        parts = self.name.split(":")
        seconds = timeout_s()
        config = Config(
            connect_timeout=seconds,
            read_timeout=seconds,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        )
        try:
            # boto3 itself reads AWS_DEFAULT_REGION only; every other tool of AWS reads both.
            region = parts[3] if len(parts) > 3 else os.environ.get("AWS_REGION")
            client = boto3.session.Session().client("kms", region_name=region, config=config)
            return getattr(client, operation)(KeyId=self.name, **request)
        except ClientError as error:
            _raise(verb, str(error.response.get("Error", {}).get("Code", "")))
        except (NoCredentialsError, PartialCredentialsError):
            raise no_credentials(KIND, "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except NoRegionError:
            raise ConfigError("awskms: no region", hint="set AWS_REGION, or write the key's whole ARN") from None
        except BotoCoreError as error:
            raise unavailable(KIND, type(error).__name__) from None


def _raise(verb: str, code: str) -> NoReturn:
    if code in _BUSY or code.startswith("5"):
        raise unavailable(KIND, code) from None
    if code == "NotFoundException":
        raise no_such_key(KIND) from None
    # The code is a word of the service, but a hostile endpoint can put anything there.
    raise refused(KIND, verb, code if re.fullmatch(r"\w{1,60}", code) else "") from None
