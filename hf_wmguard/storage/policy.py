"""What a locked bucket looks like: its settings and its policy. Pure: nothing is asked, nothing is changed.

The bucket is the model's alone. Readers and writers get the prefix, a named administrator gets everything, and everyone
else is denied, whatever the account's own IAM allows them.

Why nobody is locked out by accident:

- Whoever runs the command must be one of the administrators (`hf_wmguard.storage.lockdown` asks STS), whom no
  statement but the one on TLS denies anything, and must ask over TLS.
- The store itself refuses a policy that names a role or user that does not exist.
- The root user of the account that owns the bucket can always read, write and delete the policy, whatever it says
  (Amazon S3 User Guide, "Bucket policies").

Everyone else is denied with ``aws:PrincipalArn`` and not with ``NotPrincipal``: that one would have to name every
*session* of a role beside the role, so that an administrator who assumed a role, which is how people work, is denied
with the rest. ``aws:PrincipalArn`` of a session is the ARN of its role. Requests without it, which are the anonymous
ones, are denied too: a negated comparison holds where its key is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_wmguard.errors import ConfigError
from hf_wmguard.storage.principals import Principal

SID_PREFIX = "Wmguard"
RULE_ID = "wmguard-abort-incomplete-uploads"
ABORT_DAYS = 7
MAX_POLICY_BYTES = 20 * 1024
TLS_VERSIONS = ("1.2", "1.3")
PUBLIC_ACCESS_BLOCK = {
    "BlockPublicAcls": True,
    "IgnorePublicAcls": True,
    "BlockPublicPolicy": True,
    "RestrictPublicBuckets": True,
}
OWNERSHIP = "BucketOwnerEnforced"

READ = ("s3:GetObject", "s3:GetObjectVersion")
# A conditional write (If-Match) needs GetObject beside PutObject, and so does the HEAD that a push begins with; whose
# model is there already stands in a version's envelope. A multipart upload is PutObject; resuming one needs its list of
# parts, and giving it up AbortMultipartUpload. Nothing deletes: a stolen writer's key can add versions, and every older
# one stays.
WRITE = (*READ, "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
LIST = ("s3:ListBucket",)
# Of the bucket, without a condition on the prefix. S3 knows none for unfinished uploads. And where it asks itself
# whether a missing object may be called missing (404) or is refused (403), there is no prefix: a first push would be
# refused. So a writer sees the names of other prefixes. The rest tells a push whether it would send to the public.
LOOK = (
    *LIST,
    "s3:ListBucketMultipartUploads",
    "s3:GetBucketPublicAccessBlock",
    "s3:GetBucketPolicyStatus",
    "s3:GetBucketAcl",
)

_KMS_KEY = re.compile(r"arn:aws[\w-]*:kms:[a-z0-9-]+:\d{12}:(key|alias)/[\w/-]+|alias/[\w/-]+|[\w-]{1,128}", re.ASCII)
_NO_PATTERN = re.compile(r"[^*?$]*")
Statement = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """Who may do what with a bucket.

    Args:
        bucket: Its name.
        prefix: Without slashes at the ends; empty for the whole bucket.
        readers: Get objects under the prefix, and their older versions.
        writers: Put objects there. Nobody deletes versions but an administrator.
        admins: Do anything: the break-glass administrators, of whom the caller is one.
        kms_key: Default encryption with this key of AWS KMS; None for the store's own (SSE-S3).
        minimum_tls: Refuse older connections: one of `TLS_VERSIONS`, or None to refuse plain HTTP only.
    Raises:
        ConfigError: No administrator, an account as one, more than one partition, or a prefix that is a pattern.
    """

    bucket: str
    prefix: str = ""
    readers: tuple[Principal, ...] = ()
    writers: tuple[Principal, ...] = ()
    admins: tuple[Principal, ...] = ()
    kms_key: str | None = None
    minimum_tls: str | None = None

    def __post_init__(self) -> None:
        if not self.admins:
            raise ConfigError("no administrator is named: nobody could undo this", hint="give --admin ARN, your own")
        for admin in self.admins:
            if admin.is_account:
                raise ConfigError(
                    f"account {admin.account} is named as administrator, which would be everybody in it",
                    hint=f"name a role or user, or its root user: arn:{admin.partition}:iam::{admin.account}:root",
                )
        partitions = {principal.partition for principal in self.everyone}
        if len(partitions) > 1:
            raise ConfigError(
                f"the names are of different partitions: {', '.join(sorted(partitions))}",
                hint="a bucket can be opened to its own partition only",
            )
        if not _NO_PATTERN.fullmatch(self.prefix):
            raise ConfigError(
                f"the prefix {self.prefix!r} holds *, ? or $, which mean something else in a policy",
                hint="choose a prefix without them",
            )
        if self.kms_key is not None and not _KMS_KEY.fullmatch(self.kms_key):
            raise ConfigError(f"{self.kms_key[:200]!r} is no key of AWS KMS", hint="write its ARN")
        if self.minimum_tls not in (None, *TLS_VERSIONS):
            raise ConfigError(f"no TLS version {self.minimum_tls!r}", hint=f"choose {' or '.join(TLS_VERSIONS)}")

    @property
    def everyone(self) -> tuple[Principal, ...]:
        """All who are named, each once."""
        return tuple(dict.fromkeys((*self.readers, *self.writers, *self.admins)))

    @property
    def bucket_arn(self) -> str:
        """The bucket in a policy."""
        return f"arn:{self.admins[0].partition}:s3:::{self.bucket}"

    @property
    def objects_arn(self) -> str:
        """Everything under the prefix in a policy."""
        return f"{self.bucket_arn}/{self.prefix}/*" if self.prefix else f"{self.bucket_arn}/*"


def encryption_of(lock: Lock) -> dict[str, Any]:
    """Return the default encryption, as S3 describes it."""
    if lock.kms_key is None:
        return {"SSEAlgorithm": "AES256"}
    # The bucket key spares a request to KMS, and its price, for every object.
    return {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": lock.kms_key, "BucketKeyEnabled": True}


def abort_rule() -> dict[str, Any]:
    """Return the lifecycle rule that clears what an interrupted upload left, which no listing of objects shows."""
    return {
        "ID": RULE_ID,
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABORT_DAYS},
    }


def bucket_policy(lock: Lock, kept: Iterable[Statement] = ()) -> dict[str, Any]:
    """Return the whole policy.

    Args:
        lock: Who may do what.
        kept: Statements of others, which stay in front.
    Raises:
        ConfigError: It is longer than S3 takes.
    """
    policy = {"Version": "2012-10-17", "Statement": [*kept, *_allowed(lock), *_denied(lock)]}
    size_bytes = len(json.dumps(policy, separators=(",", ":")).encode())
    if size_bytes > MAX_POLICY_BYTES:
        raise ConfigError(
            f"the policy would have {size_bytes} bytes, S3 takes {MAX_POLICY_BYTES}",
            hint="name roles and not each of their users, or remove statements of others",
        )
    return policy


def _allowed(lock: Lock) -> list[Statement]:
    bucket, objects = lock.bucket_arn, lock.objects_arn
    statements = []
    if lock.readers:
        statements.append(_allow("ReadObjects", lock.readers, READ, objects))
        statement = _allow("ListObjects", lock.readers, LIST, bucket)
        if lock.prefix:
            statement["Condition"] = {"StringLike": {"s3:prefix": [f"{lock.prefix}/*"]}}
        statements.append(statement)
    if lock.writers:
        statements.append(_allow("WriteObjects", lock.writers, WRITE, objects))
        statements.append(_allow("LookBeforeWriting", lock.writers, LOOK, bucket))
    statements.append(_allow("Administer", lock.admins, ("s3:*",), bucket, f"{bucket}/*"))
    return statements


def _denied(lock: Lock) -> list[Statement]:
    bucket = lock.bucket_arn
    everything = {"Resource": [bucket, f"{bucket}/*"]}
    statements = [
        _deny("PlainHttp", {"Action": "s3:*", **everything}, {"Bool": {"aws:SecureTransport": "false"}}),
    ]
    if lock.minimum_tls:
        condition = {"NumericLessThan": {"s3:TlsVersion": lock.minimum_tls}}
        statements.append(_deny("OldTls", {"Action": "s3:*", **everything}, condition))
    statements += [
        _deny("Others", {"Action": "s3:*", **everything}, _unless(lock.everyone)),
        # What the account's IAM gives to somebody who is named is added to what this policy gives, so the rest is
        # denied by name. Whoever is a writer too, or may be, is not held to what a reader may.
        _deny("MoreToReaders", _but((*READ, *LIST), everything), _unless((*lock.writers, *lock.admins))),
        # A writer reads too, so that this is the same for writers and for both.
        _deny("Administration", _but((*WRITE, *LOOK), everything), _unless(lock.admins)),
    ]
    if lock.prefix:
        elsewhere = {"Action": "s3:*", "NotResource": [bucket, lock.objects_arn]}
        listing = {"Action": list(LIST), "Resource": [bucket]}
        another = {"StringNotLike": {"s3:prefix": [f"{lock.prefix}/*"]}, **_unless((*lock.writers, *lock.admins))}
        statements += [
            _deny("OtherObjects", elsewhere, _unless(lock.admins)),
            _deny("OtherListings", listing, another),
        ]
    return statements


def _allow(name: str, whom: Sequence[Principal], actions: Sequence[str], *resources: str) -> Statement:
    return {
        "Sid": SID_PREFIX + name,
        "Effect": "Allow",
        "Principal": {"AWS": list(dict.fromkeys(one.arn for one in whom))},
        "Action": list(actions),
        "Resource": list(resources),
    }


def _deny(name: str, what: Statement, condition: dict[str, Any]) -> Statement:
    return {"Sid": f"{SID_PREFIX}Deny{name}", "Effect": "Deny", "Principal": "*", **what, "Condition": condition}


def _but(actions: Sequence[str], resource: Statement) -> Statement:
    return {"NotAction": list(actions), **resource}


def _unless(whom: Sequence[Principal]) -> dict[str, Any]:
    return {
        "ArnNotLike": {"aws:PrincipalArn": list(dict.fromkeys(one.pattern for one in whom))},
        # A service of AWS itself (delivery of logs, say) has no such ARN, and may do only what a statement allows it.
        # "IfExists": anonymous requests lack the key, and are denied.
        "BoolIfExists": {"aws:PrincipalIsAWSService": "false"},
    }
