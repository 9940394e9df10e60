"""Ask S3 and STS by boto3 about a bucket and not a prefix, and turn their refusals into this package's errors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hf_wmguard.errors import NotFoundError, StoreError

DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccessDeniedException", "403", "Forbidden"})
"""What a store calls a request that this caller may not make."""
UNSUPPORTED = frozenset({"NotImplemented", "MethodNotAllowed", "XNotImplemented", "UnsupportedOperation", "405", "501"})
"""What an S3-compatible store says to a request that it does not know."""


def ask(client: Any, operation: str, expected: Iterable[str] = (), **request: Any) -> tuple[dict[str, Any], str]:
    """Return a service's answer, or the code of a refusal that the caller expects, with the other one empty.

    Args:
        client: From `stores.s3.s3_client`.
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
