"""What S3 and its client say when they refuse, in words that help. No client is imported here.

Nothing of an answer is quoted but a code and a region, and those only where they look like one: an answer may
repeat what it was asked with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_wmguard.errors import ConfigError, NotFoundError, StoreError, WmguardError

Explained = tuple[type[WmguardError], str, str]
_WORD = re.compile(r"[\w.]{1,60}")
_REGION = re.compile(r"[a-z]{2,5}(?:-[a-z]{2,12}){1,3}-\d")

_CREDENTIALS = (
    StoreError,
    "does not accept these credentials",
    "check AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret",
)
_EXPIRED = (StoreError, "says that these credentials have expired", "sign in again, then repeat the command")
_DENIED = (
    StoreError,
    "denies {operation}",
    "ask for s3:{permission} on this prefix, and for its KMS key if it has one",
)
_CLOCK = (
    StoreError,
    "says that the clock of this machine is wrong",
    "set the clock (NTP: timedatectl set-ntp true), then repeat the command",
)
_REGION_WRONG = (StoreError, "is in another region", "set AWS_REGION={region}")
_CHANGED = (StoreError, "was changed by somebody else meanwhile", "repeat the command: it reads again what is there")
_BUSY = (StoreError, "is too busy or out of order", "repeat the command later: it goes on where it stopped")
_NO_BUCKET = (
    NotFoundError,
    "does not exist: no such bucket",
    "check the address and the endpoint, or create the bucket",
)
_NO_OBJECT = (NotFoundError, "has no such object", "check the address")
_DAMAGED = (StoreError, "received other bytes than were sent", "repeat the command; if it stays so, look for a proxy")
_LOST = (StoreError, "has lost an upload", "repeat the command: somebody else pushed, or cleared it away")
_FULL = (StoreError, "has no room left", "make room there, or raise the quota")
_UNABLE = (StoreError, "cannot do {operation} as it is needed", "use a store with conditional writes and checksums")
_KMS = (StoreError, "cannot use the KMS key", "check that the key is enabled and that you may use it")

_ODD = (StoreError, "does not take {operation}", "check AWS_REGION, AWS_ENDPOINT_URL_S3 and the credentials")

# What is to be asked for, where it is not called as the operation is.
_PERMISSIONS = {
    "HeadObject": "GetObject",
    "ListObjectsV2": "ListBucket",
    "CopyObject": "PutObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "ListParts": "ListMultipartUploadParts",
    "DeleteObjects": "DeleteObject",
}
# By the code of the answer; where the answer has no body, by its status.
CODES: Mapping[str, Explained] = {
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidSecurity": _CREDENTIALS,
    "400": _ODD,
    "401": _CREDENTIALS,
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "403": _DENIED,
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "PermanentRedirect": _REGION_WRONG,
    "TemporaryRedirect": _REGION_WRONG,
    "AuthorizationHeaderMalformed": _REGION_WRONG,
    "IllegalLocationConstraintException": _REGION_WRONG,
    "301": _REGION_WRONG,
    "307": _REGION_WRONG,
    "PreconditionFailed": _CHANGED,
    "ConditionalRequestConflict": _CHANGED,
    "OperationAborted": _CHANGED,
    "409": _CHANGED,
    "412": _CHANGED,
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "InternalError": _BUSY,
    "RequestLimitExceeded": _BUSY,
    "RequestTimeout": _BUSY,
    "Throttling": _BUSY,
    "ThrottlingException": _BUSY,
    "TooManyRequests": _BUSY,
    "429": _BUSY,
    "500": _BUSY,
    "502": _BUSY,
    "503": _BUSY,
    "504": _BUSY,
    "NoSuchBucket": _NO_BUCKET,
    "NoSuchKey": _NO_OBJECT,
    "NoSuchVersion": _NO_OBJECT,
    "404": _NO_OBJECT,
    "InvalidRange": (StoreError, "is shorter than it said", "open it again: it was replaced meanwhile"),
    "416": (StoreError, "is shorter than it said", "open it again: it was replaced meanwhile"),
    "BadDigest": _DAMAGED,
    "InvalidDigest": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "IncompleteBody": _DAMAGED,
    "InvalidPart": _LOST,
    "NoSuchUpload": _LOST,
    "QuotaExceeded": _FULL,
    "507": _FULL,
    "NotImplemented": _UNABLE,
    "501": _UNABLE,
    "KMS.NotFoundException": _KMS,
    "KMS.DisabledException": _KMS,
    "KMS.KMSInvalidStateException": _KMS,
    "KMS.AccessDeniedException": _KMS,
}
# By the name of the client's exception or of what it is derived from.
EXCEPTIONS: Mapping[str, Explained] = {
    "NoCredentialsError": (
        StoreError,
        "needs credentials and there are none",
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "PartialCredentialsError": (
        StoreError,
        "needs credentials and a part of them is missing",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY together",
    ),
    "CredentialRetrievalError": (StoreError, "needs credentials that cannot be had", "sign in again (aws sso login)"),
    "SSOError": (StoreError, "needs a session that has ended", "sign in again: aws sso login"),
    "TokenRetrievalError": (StoreError, "needs a session that has ended", "sign in again: aws sso login"),
    "ProfileNotFound": (ConfigError, "is asked with a profile that does not exist", "check AWS_PROFILE"),
    "NoRegionError": (ConfigError, "needs a region", "set AWS_REGION"),
    "InvalidRegionError": (ConfigError, "is asked with a region that is none", "check AWS_REGION"),
    "ParamValidationError": (ConfigError, "cannot be asked this", "check the address: s3://bucket/prefix"),
    "SSLError": (
        StoreError,
        "has a certificate that is not trusted",
        "set AWS_CA_BUNDLE to its authority's certificate; do not switch the check off",
    ),
    "ProxyConnectionError": (StoreError, "cannot be reached through the proxy", "check HTTPS_PROXY and NO_PROXY"),
    "EndpointConnectionError": (StoreError, "cannot be reached", "check the network and AWS_ENDPOINT_URL_S3"),
    "ConnectTimeoutError": (StoreError, "does not answer", "check the network and AWS_ENDPOINT_URL_S3"),
    "ReadTimeoutError": (StoreError, "stopped answering", "repeat the command: it goes on where it stopped"),
    "HTTPClientError": (StoreError, "cut the connection", "repeat the command: it goes on where it stopped"),
    "ConnectionError": (StoreError, "cut the connection", "repeat the command: it goes on where it stopped"),
    "BotoCoreError": (StoreError, "cannot be asked", "check the settings of AWS on this machine"),
}


def code_of(response: Mapping[str, Any]) -> str:
    """Return the code of an error's parsed answer; its status, where it has none."""
    code = str(response.get("Error", {}).get("Code", ""))
    return code if code in CODES else str(status_of(response) or code)


def status_of(response: Mapping[str, Any]) -> int:
    """Return the status of a parsed answer, 0 where it has none."""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0


def retry_after_s(response: Mapping[str, Any], limit_s: float) -> float | None:
    """Return how long a busy store asks to wait (RFC 9110, sec. 10.2.3, in seconds), None where it does not."""
    if status_of(response) not in (429, 503):
        return None
    text = str(response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return min(float(text), limit_s) if re.fullmatch(r"\d{1,9}", text) else None


def refusal(where: str, operation: str, response: Mapping[str, Any]) -> WmguardError:
    """Return the error for an answer that is one.

    Args:
        where: The address that was asked for.
        operation: What was asked, as S3 calls it (``GetObject``).
        response: The client's parsed answer.
    """
    code = code_of(response)
    kind, message, hint = CODES.get(code, (StoreError, "refuses {operation}", "look at the code of the answer"))
    error = response.get("Error", {})
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    said = str(error.get("Region") or headers.get("x-amz-bucket-region") or "")
    region = said if _REGION.fullmatch(said) else "the bucket's own region"
    word = str(error.get("Code", ""))
    shown = f" ({word})" if _WORD.fullmatch(word) else ""
    permission = _PERMISSIONS.get(operation, operation)
    words = {"operation": operation, "permission": permission, "region": region}
    return kind(f"{where} {message.format(**words)}{shown}", hint=hint.format(**words))


def failure(where: str, error: BaseException) -> WmguardError:
    """Return the error for an exception of the client, whose own text is not repeated."""
    names = [kind.__name__ for kind in type(error).__mro__]
    name = next((name for name in names if name in EXCEPTIONS), "BotoCoreError")
    kind, message, hint = EXCEPTIONS[name]
    return kind(f"{where} {message} ({names[0]})", hint=hint)
