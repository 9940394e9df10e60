"""Ask S3 and STS by boto3 about a bucket and not a prefix, and turn their refusals into this package's errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from hf_wmguard.errors import ConfigError, MissingDependencyError, NotFoundError, StoreError

DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccessDeniedException", "403", "Forbidden"})
"""What a store calls a request that this caller may not make."""
UNSUPPORTED = frozenset({"NotImplemented", "MethodNotAllowed", "XNotImplemented", "UnsupportedOperation", "405", "501"})
"""What an S3-compatible store says to a request that it does not know."""
_CONNECT_S, _READ_S, _ATTEMPTS = 10, 60, 4


def make_client(service: str, endpoint_url: str | None = None) -> Any:
    """Return a boto3 client of ``s3`` or ``sts``; credentials, region and endpoint are boto3's own business.

    Raises:
        MissingDependencyError: boto3 is not installed.
        ConfigError: The endpoint is no URL, or there is no region.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, NoRegionError
    except ImportError:
        raise MissingDependencyError("S3 delivery needs boto3", hint="pip install 'hf-wmguard[s3]'") from None
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
    try:
        # boto3 itself reads AWS_DEFAULT_REGION only; every other tool of AWS reads both.
        region = os.environ.get("AWS_REGION")
        return boto3.session.Session().client(service, region_name=region, endpoint_url=endpoint_url, config=config)
    except NoRegionError:
        raise ConfigError("S3: no region", hint="set AWS_REGION") from None
    except (BotoCoreError, ValueError):
        raise ConfigError(
            f"cannot make a client of {service}",
            hint="check --endpoint-url, AWS_PROFILE, AWS_REGION and ~/.aws/config",
        ) from None


def ask(client: Any, operation: str, expected: Iterable[str] = (), **request: Any) -> tuple[dict[str, Any], str]:
    """Return a service's answer, or the code of a refusal that the caller expects, with the other one empty.

    Args:
        client: From `make_client`.
        operation: A method of it, such as ``get_bucket_policy``.
        expected: Codes of refusals that are no errors here.
        request: Its arguments.
    Raises:
        NotFoundError: No such bucket.
        StoreError: Any other refusal, no credentials, or no answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        answer: dict[str, Any] = getattr(client, operation)(**request)
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in expected:
            return {}, code
        # The code is a word of the service, but a hostile endpoint can put anything there.
        word = code if re.fullmatch(r"\w{1,60}", code) else "refused"
        if code == "NoSuchBucket":
            raise NotFoundError(
                f"no bucket {request.get('Bucket')}", hint="check the address, the region and AWS_ENDPOINT_URL"
            ) from None
        raise StoreError(f"{operation} was refused: {word}", hint=_hint(code)) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise StoreError(
            "no credentials for S3", hint="set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except BotoCoreError as error:
        raise StoreError(
            f"{operation} got no answer: {type(error).__name__}",
            hint="check the network and the endpoint, and try again",
        ) from None
    return answer, ""


def read_body(body: Any, count: int) -> bytes:
    """Return some bytes of an answer, or one more where the server sends more than was asked for.

    Raises:
        StoreError: The connection was cut.
    """
    from botocore.exceptions import BotoCoreError

    try:
        return bytes(body.read(count + 1))
    except (BotoCoreError, OSError) as error:
        raise StoreError(f"the connection was cut: {type(error).__name__}", hint="run the same command again") from None


def _hint(code: str) -> str:
    if code in DENIED:
        return "use credentials of an administrator of the bucket"
    if code in UNSUPPORTED:
        return "this store does not have that setting"
    return {
        "MalformedPolicy": "the store refuses the policy: check that every role and user that is named exists",
        "InvalidBucketAclWithObjectOwnership": "the bucket's ACL still grants something to others",
        "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
        "PermanentRedirect": "the bucket is in another region: set AWS_REGION",
        "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION",
    }.get(code, "see what the store's own log says")
