"""List what is open at an address: of a bucket in S3, or of a repo on the Hub. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable

from hf_wmguard.storage.findings import Audit
from hf_wmguard.stores.location import Location


def audit(
    location: Location, *, endpoint_url: str | None = None, progress: Callable[[str], None] | None = None
) -> Audit:
    """Return what is open.

    Args:
        location: A prefix in S3 or a repo on the Hub; of the Hub all branches, tags and pull requests are looked at,
            whatever its revision says.
        endpoint_url: Of an S3-compatible store.
        progress: Called with what is looked at.
    Raises:
        NotFoundError: No such bucket or repo.
        StoreError: The store refuses everything, or does not answer.
        MissingDependencyError: boto3 is not installed.
    """
    note = progress or (lambda what: None)
    if location.scheme == "hub":
        from hf_wmguard.storage.audit_hub import audit_hub

        return audit_hub(location, note)
    from hf_wmguard.storage.audit_s3 import audit_s3

    return audit_s3(location, endpoint_url, note)
