"""Whether a bucket is open to everybody, asked before anything is sent to it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from hf_wmguard.errors import ExposureError
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.s3 import S3Place

# Whoever pushes may not be allowed to ask, and a store may not know the question: neither means that it is open.
_NOT_TOLD = frozenset({"AccessDenied", "403", "NotImplemented", "501", "MethodNotAllowed", "405"})
_NONE = frozenset({"NoSuchPublicAccessBlockConfiguration", "NoSuchBucketPolicy", "404"})
_PROBE = "wmguard_check"
_EVERYBODY = {
    "http://acs.amazonaws.com/groups/global/AllUsers": "everybody",
    "http://acs.amazonaws.com/groups/global/AuthenticatedUsers": "every AWS account",
}


def check_s3(location: Location, *, allow_public: bool = False) -> None:
    """Check that a push to a prefix will be let in. Nothing that readers see is changed.

    Raises:
        ExposureError: The bucket is public, unless that is allowed.
        StoreError: S3 does not answer, or this user may not write there.
        NotFoundError: No such bucket.
    """
    with closing(S3Place(location)) as place:
        check_not_public(place, allow_public=allow_public)
        place.read_pointer()
        # Begun and given up at once: it shows who may write, and leaves neither an object nor a version.
        key = location.key(_PROBE)
        upload = place.call("create_multipart_upload", Key=key)
        place.call("abort_multipart_upload", Key=key, UploadId=upload["UploadId"])


def check_not_public(place: S3Place, *, allow_public: bool) -> tuple[str, ...]:
    """Return what could not be asked about the bucket.

    Raises:
        ExposureError: Its policy or its list of grants lets everybody in, unless that is allowed.
        StoreError: S3 does not answer.
        NotFoundError: No such bucket.
    """
    unchecked: list[str] = []
    block = _ask(place, "get_public_access_block", "PublicAccessBlockConfiguration", unchecked) or {}
    openings = []
    if not block.get("RestrictPublicBuckets"):
        status = _ask(place, "get_bucket_policy_status", "PolicyStatus", unchecked) or {}
        if status.get("IsPublic"):
            openings.append("its policy is public")
    if not block.get("IgnorePublicAcls"):
        grants = _ask(place, "get_bucket_acl", "Grants", unchecked) or ()
        groups = {_EVERYBODY.get(grant.get("Grantee", {}).get("URI", ""), "") for grant in grants} - {""}
        openings += [f"its ACL grants {group} access" for group in sorted(groups)]
    if openings and not allow_public:
        raise ExposureError(
            f"bucket {place.bucket} is public ({', '.join(openings)}): nothing was sent",
            hint="close it with wmguard storage lockdown, choose another, or say that public is meant",
        )
    return tuple(unchecked)


def _ask(place: S3Place, operation: str, field: str, unchecked: list[str]) -> Any:
    answer, code = place.ask(operation, allow=_NOT_TOLD | _NONE)
    if answer is not None:
        return answer.get(field)
    if code in _NOT_TOLD:
        unchecked.append(f"{operation} ({code})")
    return None
