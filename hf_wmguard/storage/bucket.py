"""The settings of a bucket: read each, and write each, in the words of S3's API."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_wmguard.errors import StoreError
from hf_wmguard.storage.aws import DENIED, UNSUPPORTED, ask

# In the order in which they are applied: first what closes something and can lock nobody out, so that a failure on
# the way leaves the bucket more closed than before, and still in its administrator's hands. The ACL is emptied before
# ACLs are switched off, which S3 refuses otherwise. The policy is last: after it only administrators can change things.
SETTINGS = (
    "versioning",
    "acl",
    "ownership",
    "encryption",
    "lifecycle",
    "public_access_block",
    "policy",
)
_ABSENT = {
    "NoSuchBucketPolicy",
    "NoSuchLifecycleConfiguration",
    "NoSuchPublicAccessBlockConfiguration",
    "OwnershipControlsNotFoundError",
    "ServerSideEncryptionConfigurationNotFoundError",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a bucket is set to.

    Args:
        values: By the names in `SETTINGS`; None where nothing is set.
        denied: Settings that this caller may not read.
        unsupported: Settings that this store does not have.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    denied: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()


def read_settings(client: Any, bucket: str) -> Settings:
    """Return what a bucket is set to.

    Raises:
        NotFoundError: No such bucket.
        StoreError: The store does not answer, or answers what nobody expects.
    """
    values: dict[str, Any] = {}
    denied, unsupported = [], []
    for name in SETTINGS:
        operation, value_of = _READ[name]
        answer, code = ask(client, operation, _ABSENT | DENIED | UNSUPPORTED, Bucket=bucket)
        if code in DENIED:
            denied.append(name)
        elif code in UNSUPPORTED:
            unsupported.append(name)
        elif code:
            values[name] = None
        else:
            try:
                values[name] = value_of(answer)
            except (KeyError, IndexError, TypeError):
                # Stores answer what they do not know with something else, such as a listing.
                unsupported.append(name)
    return Settings(values=values, denied=tuple(denied), unsupported=tuple(unsupported))


def write_setting(client: Any, bucket: str, name: str, value: Any) -> str:
    """Set one thing, and return nothing, or the code with which the store says that it does not have it.

    Raises:
        StoreError: The store refuses, or does not answer.
    """
    operation, request_of = _WRITE[name]
    _, code = ask(client, operation, UNSUPPORTED, Bucket=bucket, **request_of(value))
    return code


def _policy(answer: Mapping[str, Any]) -> dict[str, Any]:
    try:
        policy = json.loads(answer["Policy"])
    except (ValueError, RecursionError):
        policy = None
    if not isinstance(policy, dict):
        raise StoreError("the bucket's policy is not JSON", hint="check the endpoint: this does not look like S3")
    return policy


def _encryption(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    rules = answer["ServerSideEncryptionConfiguration"].get("Rules") or [{}]
    default = rules[0].get("ApplyServerSideEncryptionByDefault")
    if not default:
        return None
    # What S3 adds of itself to a rule would otherwise show as a difference for ever.
    bucket_key = {"BucketKeyEnabled": True} if rules[0].get("BucketKeyEnabled") else {}
    return {**default, **bucket_key}


def _grants(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the grants to anyone but the owner."""
    owner = answer.get("Owner", {}).get("ID")
    return [
        {"Grantee": grant["Grantee"].get("URI") or grant["Grantee"].get("ID"), "Permission": grant.get("Permission")}
        for grant in answer.get("Grants", [])
        if grant["Grantee"].get("ID") != owner or owner is None
    ]


_READ: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "versioning": ("get_bucket_versioning", lambda answer: answer.get("Status")),
    "acl": ("get_bucket_acl", _grants),
    "ownership": (
        "get_bucket_ownership_controls",
        lambda answer: answer["OwnershipControls"]["Rules"][0]["ObjectOwnership"],
    ),
    "encryption": ("get_bucket_encryption", _encryption),
    "lifecycle": ("get_bucket_lifecycle_configuration", lambda answer: answer.get("Rules") or None),
    "public_access_block": ("get_public_access_block", lambda answer: answer["PublicAccessBlockConfiguration"]),
    "policy": ("get_bucket_policy", _policy),
}
_WRITE: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "versioning": ("put_bucket_versioning", lambda value: {"VersioningConfiguration": {"Status": value}}),
    "acl": ("put_bucket_acl", lambda _: {"ACL": "private"}),
    "ownership": (
        "put_bucket_ownership_controls",
        lambda value: {"OwnershipControls": {"Rules": [{"ObjectOwnership": value}]}},
    ),
    "encryption": (
        "put_bucket_encryption",
        lambda value: {
            "ServerSideEncryptionConfiguration": {
                "Rules": [
                    {
                        "ApplyServerSideEncryptionByDefault": {
                            name: one for name, one in value.items() if name != "BucketKeyEnabled"
                        },
                        **({"BucketKeyEnabled": True} if value.get("BucketKeyEnabled") else {}),
                    }
                ]
            }
        },
    ),
    "lifecycle": (
        "put_bucket_lifecycle_configuration",
        lambda value: {"LifecycleConfiguration": {"Rules": value}},
    ),
    "public_access_block": ("put_public_access_block", lambda value: {"PublicAccessBlockConfiguration": value}),
    "policy": ("put_bucket_policy", lambda value: {"Policy": json.dumps(value)}),
}
