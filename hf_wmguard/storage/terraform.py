"""The same lock as Terraform, for those who keep buckets in code. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from hf_wmguard.storage.planning import Plan
from hf_wmguard.storage.policy import ABORT_DAYS, RULE_ID

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def to_terraform(plan: Plan) -> str:
    """Return a file for the AWS provider (version 5 or later), by which ``terraform apply`` does what the plan does."""
    desired, encryption = plan.desired, plan.desired["encryption"]
    bucket = {"bucket": plan.lock.bucket}
    default = {"sse_algorithm": encryption["SSEAlgorithm"]}
    if key := encryption.get("KMSMasterKeyID"):
        default["kms_master_key_id"] = key
    block = {
        "block_public_acls": True,
        "ignore_public_acls": True,
        "block_public_policy": True,
        "restrict_public_buckets": True,
    }
    others = [rule for rule in desired["lifecycle"] if rule.get("ID") != RULE_ID]
    parts = [
        f"# Written by wmguard storage lockdown for s3://{plan.lock.bucket}/{plan.lock.prefix}",
        *(
            [
                f"# The bucket has {len(others)} other lifecycle rule(s), which this file would remove: add them "
                "below before applying it."
            ]
            if others
            else []
        ),
        "",
        _resource("aws_s3_bucket_versioning", bucket, _block("versioning_configuration", {"status": "Enabled"})),
        _resource(
            "aws_s3_bucket_ownership_controls", bucket, _block("rule", {"object_ownership": desired["ownership"]})
        ),
        _resource(
            "aws_s3_bucket_server_side_encryption_configuration",
            bucket,
            _block(
                "rule",
                {"bucket_key_enabled": True} if encryption.get("BucketKeyEnabled") else {},
                _block("apply_server_side_encryption_by_default", default),
            ),
        ),
        _resource(
            "aws_s3_bucket_lifecycle_configuration",
            bucket,
            _block(
                "rule",
                {"id": RULE_ID, "status": "Enabled"},
                "filter {}",
                _block("abort_incomplete_multipart_upload", {"days_after_initiation": ABORT_DAYS}),
            ),
        ),
        _resource("aws_s3_bucket_public_access_block", {**bucket, **block}),
        _resource("aws_s3_bucket_policy", bucket, f"policy = jsonencode({_value(desired['policy'])})"),
    ]
    return "\n".join(parts)


def _resource(kind: str, settings: dict[str, Any], *blocks: str) -> str:
    return _block(f'resource "{kind}" "wmguard"', settings, *blocks) + "\n"


def _block(head: str, settings: dict[str, Any], *blocks: str) -> str:
    lines = [f"{name} = {_value(value)}" for name, value in settings.items()]
    return "\n".join([f"{head} {{", *(_indented(text) for text in (*lines, *blocks)), "}"])


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{key if _NAME.fullmatch(key) else _value(key)} = {_value(one)}" for key, one in value.items()]
        return "\n".join(["{", *map(_indented, pairs), "}"])
    if isinstance(value, list):
        return "\n".join(["[", *(_indented(f"{_value(one)},") for one in value), "]"])
    # JSON's strings are HCL's, but for the two that begin a template.
    return json.dumps(value, ensure_ascii=False).replace("${", "$${").replace("%{", "%%{")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
