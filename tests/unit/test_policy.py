"""What the policy of a locked bucket lets whom do, judged by the rules of IAM (`tests/iam.py`)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from iam import BUCKET, Asker, may

from hf_wmguard.errors import ConfigError
from hf_wmguard.storage.bucket import Settings
from hf_wmguard.storage.lockdown import make_lock
from hf_wmguard.storage.planning import make_plan
from hf_wmguard.storage.policy import MAX_POLICY_BYTES, abort_rule, bucket_policy
from hf_wmguard.storage.principals import is_caller, parse_principal
from hf_wmguard.storage.statements import denies_others, is_public, requires_tls
from hf_wmguard.stores.location import parse_location

ACCOUNT = "111122223333"
READER = f"arn:aws:iam::{ACCOUNT}:role/inference"
WRITER = f"arn:aws:iam::{ACCOUNT}:role/ml/trainer"
BOTH = f"arn:aws:iam::{ACCOUNT}:user/ci"
ADMIN = f"arn:aws:iam::{ACCOUNT}:role/break-glass"
OUTSIDER = f"arn:aws:iam::{ACCOUNT}:role/intern"
STRANGER = "arn:aws:iam::999988887777:role/anybody"
OBJECT = f"{BUCKET}/triage/model.safetensors"
ELSEWHERE = f"{BUCKET}/other/model.safetensors"
LISTING = {"s3_prefix": "triage/"}

READS = {"s3:GetObject", "s3:GetObjectVersion"}
PUSH = READS | {"s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"}
LOOKS = {
    "s3:ListBucket",
    "s3:ListBucketMultipartUploads",
    "s3:GetBucketPublicAccessBlock",
    "s3:GetBucketPolicyStatus",
    "s3:GetBucketAcl",
}
MORE = {
    "s3:DeleteObject",
    "s3:DeleteObjectVersion",
    "s3:PutObjectAcl",
    "s3:PutObjectRetention",
    "s3:RestoreObject",
    "s3:GetObjectAcl",
}
BUCKET_MORE = {
    "s3:PutBucketPolicy",
    "s3:DeleteBucketPolicy",
    "s3:PutBucketVersioning",
    "s3:PutLifecycleConfiguration",
    "s3:PutBucketPublicAccessBlock",
    "s3:DeleteBucket",
    "s3:ListBucketVersions",
    "s3:GetBucketPolicy",
}
EVERYTHING = ("s3:*",)


def make_policy(prefix: str = "/triage", **changes: Any) -> dict[str, Any]:
    names = {"readers": [READER, BOTH], "writers": [WRITER, BOTH], "admins": [ADMIN], **changes}
    return bucket_policy(make_lock(parse_location(f"s3://acme-models{prefix}"), **names))


def can(asker: Asker, policy: dict[str, Any] | None = None) -> set[str]:
    """Everything of the above that somebody may do with an object under the prefix, and with the bucket."""
    policy = policy or make_policy()
    found = {action for action in READS | PUSH | MORE if may(policy, asker, action, OBJECT)}
    found |= {action for action in (BUCKET_MORE | LOOKS) - {"s3:ListBucket"} if may(policy, asker, action, BUCKET)}
    return found | ({"s3:ListBucket"} if may(policy, asker, "s3:ListBucket", BUCKET, **LISTING) else set())


# Whatever the account's own IAM gives: nothing, or everything.
@pytest.mark.parametrize("allowed", [(), EVERYTHING], ids=["no IAM", "IAM of everything"])
@pytest.mark.parametrize(
    ("arn", "expected"),
    [
        (READER, READS | {"s3:ListBucket"}),
        (WRITER, PUSH | LOOKS),
        (BOTH, PUSH | LOOKS),
        (ADMIN, PUSH | MORE | LOOKS | BUCKET_MORE),
        (OUTSIDER, set()),
        (STRANGER, set()),
        (f"arn:aws:iam::{ACCOUNT}:root", set()),
    ],
)
def test_each_gets_what_is_theirs_and_no_more(arn: str, allowed: tuple[str, ...], expected: set[str]) -> None:
    asker = Asker(arn=arn, allowed=allowed)
    assert can(asker) == expected
    for action in READS | PUSH:
        assert may(make_policy(), asker, action, ELSEWHERE) is (arn == ADMIN)
    for prefix in ("", "other/", "triage2/", "triage"):
        assert may(make_policy(), asker, "s3:ListBucket", BUCKET, s3_prefix=prefix) is (arn in (WRITER, BOTH, ADMIN))
    # As S3 asks itself before it calls an object missing.
    assert may(make_policy(), asker, "s3:ListBucket", BUCKET) is (arn in (WRITER, BOTH, ADMIN))
    assert can(replace(asker, https=False)) == set()


def test_a_push_needs_no_more_than_a_writer_has() -> None:
    """The uploader is not locked out: conditional and multipart uploads, their resumption, and giving them up."""
    for asker in (Asker(arn=WRITER), Asker(arn=WRITER, allowed=EVERYTHING)):
        # CreateMultipartUpload, UploadPart and CompleteMultipartUpload are PutObject, HEAD is GetObject.
        for action in ("s3:PutObject", "s3:GetObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"):
            assert may(make_policy(), asker, action, OBJECT)
        for action in LOOKS:
            assert may(make_policy(), asker, action, BUCKET)


def test_anonymous_gets_nothing() -> None:
    assert can(Asker(arn=None)) == set()
    opened = make_policy()
    opened["Statement"].append({"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": [f"{BUCKET}/*"]})
    assert can(Asker(arn=None), opened) == set()
    assert can(Asker(arn=OUTSIDER, allowed=EVERYTHING), opened) == set()


def test_services_of_aws_get_what_others_gave_them() -> None:
    service = Asker(arn=None, service=True, owner_account="")
    assert can(service) == set()
    policy = make_policy()
    policy["Statement"].append({"Effect": "Allow", "Principal": "*", "Action": "s3:PutObject", "Resource": [OBJECT]})
    # The one who was named gets through; what it may do is up to that statement.
    denied = [one for one in policy["Statement"] if one["Effect"] == "Deny" and one["Sid"] == "WmguardDenyOthers"]
    assert denied[0]["Condition"]["BoolIfExists"] == {"aws:PrincipalIsAWSService": "false"}


def test_minimum_tls() -> None:
    policy = make_policy(minimum_tls="1.3")
    assert can(Asker(arn=READER, tls="1.3"), policy) == READS | {"s3:ListBucket"}
    assert can(Asker(arn=READER, tls="1.2"), policy) == set()
    assert can(Asker(arn=ADMIN, tls="1.2"), policy) == set()


def test_whole_bucket() -> None:
    policy = make_policy("")
    assert may(policy, Asker(arn=READER), "s3:GetObject", ELSEWHERE)
    assert may(policy, Asker(arn=READER), "s3:ListBucket", BUCKET)
    assert not may(policy, Asker(arn=READER, allowed=EVERYTHING), "s3:PutObject", ELSEWHERE)


def test_an_account_as_reader_is_whom_its_own_iam_lets() -> None:
    policy = make_policy(readers=["999988887777"])
    assert can(Asker(arn=STRANGER, allowed=EVERYTHING), policy) == READS | {"s3:ListBucket"}
    assert can(Asker(arn=STRANGER), policy) == set()
    # A writer of an account that reads is not held to what a reader may, and gets no further than both.
    policy = make_policy(readers=[ACCOUNT])
    assert can(Asker(arn=WRITER, allowed=EVERYTHING), policy) == PUSH | LOOKS
    assert can(Asker(arn=OUTSIDER, allowed=EVERYTHING), policy) == READS | {"s3:ListBucket"}


def test_the_root_user_alone() -> None:
    policy = make_policy(admins=[f"arn:aws:iam::{ACCOUNT}:root"])
    assert "s3:PutBucketPolicy" in can(Asker(arn=f"arn:aws:iam::{ACCOUNT}:root", allowed=EVERYTHING), policy)
    assert can(Asker(arn=OUTSIDER, allowed=EVERYTHING), policy) == set()


def test_no_reader_no_writer() -> None:
    policy = make_policy(readers=[], writers=[])
    assert can(Asker(arn=READER, allowed=EVERYTHING), policy) == set()
    assert "s3:PutBucketPolicy" in can(Asker(arn=ADMIN), policy)


def test_our_own_policy_is_neither_public_nor_open() -> None:
    statements = make_policy()["Statement"]
    assert not any(is_public(one) for one in statements)
    assert [one["Sid"] for one in statements if requires_tls(one, BUCKET)] == ["WmguardDenyPlainHttp"]
    assert [one["Sid"] for one in statements if denies_others(one, BUCKET)] == ["WmguardDenyOthers"]
    assert len({one["Sid"] for one in statements}) == len(statements)
    assert len(json.dumps(make_policy())) < MAX_POLICY_BYTES / 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "arn:aws:iam::111122223333:role/*",
        "arn:aws:iam::111122223333:role/train?r",
        "arn:aws:iam::111122223333:role",
        "arn:aws:iam::111122223333:role/",
        "arn:aws:iam::111122223333:role//x",
        "arn:aws:iam::111122223333:root/x",
        "arn:aws:iam::111122223333:group/x",
        "arn:aws:iam::11112222333:user/x",
        "arn:aws:iam:::role/x",
        "arn:aws:iam:::root",
        "arn:aws:s3:::bucket",
        "arn:aws:sts::111122223333:assumed-role/trainer/me",
        "111122223333 ",
        "11112222333",
        "arn:aws:iam::111122223333:user/x\n",
        "arn:aws:iam::111122223333:user/${aws:username}",
        "arn:aws:iam::١١١١٢٢٢٢٣٣٣٣:user/x",
        "AROAEXAMPLE",
    ],
)
def test_what_is_no_principal(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_principal(text)
    assert raised.value.hint


def test_a_session_is_told_its_role() -> None:
    with pytest.raises(ConfigError, match="session") as raised:
        parse_principal("arn:aws:sts::111122223333:assumed-role/trainer/me@acme")
    assert "arn:aws:iam::111122223333:role/trainer" in raised.value.hint


@pytest.mark.parametrize(
    ("caller", "admin", "same"),
    [
        (ADMIN, ADMIN, True),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/break-glass/me", ADMIN, True),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/trainer/me", WRITER, True),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/break/glass", ADMIN, False),
        ("arn:aws:sts::999988887777:assumed-role/break-glass/me", ADMIN, False),
        (f"arn:aws-cn:sts::{ACCOUNT}:assumed-role/break-glass/me", ADMIN, False),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/ci/me", BOTH, False),
        (f"arn:aws:sts::{ACCOUNT}:federated-user/break-glass", ADMIN, False),
        (f"arn:aws:iam::{ACCOUNT}:user/break-glass", ADMIN, False),
        (f"arn:aws:iam::{ACCOUNT}:root", f"arn:aws:iam::{ACCOUNT}:root", True),
        (ADMIN, f"arn:aws:iam::{ACCOUNT}:root", False),
        ("nonsense", ADMIN, False),
    ],
)
def test_who_the_caller_is(caller: str, admin: str, same: bool) -> None:
    assert is_caller(parse_principal(admin), caller) is same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"admins": []}, "no administrator"),
        ({"admins": [ACCOUNT]}, "everybody in it"),
        ({"readers": ["arn:aws-cn:iam::111122223333:role/x"]}, "partitions"),
        ({"kms_key": "a key"}, "no key"),
        ({"minimum_tls": "1.1"}, "no TLS"),
        (
            {"readers": [f"arn:aws:iam::{ACCOUNT}:role/{'x' * 60}{number}" for number in range(200)]},
            "policy would have",
        ),
    ],
)
def test_bad_locks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(**changes)


@pytest.mark.parametrize("prefix", ["/tri*ge", "/tri?ge", "/${x}"])
def test_a_prefix_that_is_a_pattern(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        make_policy(prefix)


def test_another_partition() -> None:
    admin, reader = "arn:aws-cn:iam::111122223333:role/x", ACCOUNT
    policy = make_policy(admins=[admin], readers=[reader], writers=[])
    text = json.dumps(policy)
    assert "arn:aws:" not in text
    assert f"arn:aws-cn:iam::{ACCOUNT}:root" in text


PUBLIC = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"{BUCKET}/*"}


@pytest.mark.parametrize(
    ("changes", "public"),
    [
        ({}, True),
        ({"Principal": {"AWS": "*"}}, True),
        ({"Principal": {"AWS": [READER, "*"]}}, True),
        ({"Principal": {"AWS": READER}}, False),
        ({"Principal": {"Service": "logging.s3.amazonaws.com"}}, False),
        ({"Effect": "Deny"}, False),
        ({"Condition": {"Bool": {"aws:SecureTransport": "true"}}}, True),
        ({"Condition": {"StringEquals": {"aws:PrincipalOrgID": "o-acme"}}}, False),
        ({"Condition": {"StringLike": {"aws:PrincipalArn": "arn:aws:iam::*:role/x"}}}, True),
        ({"Condition": {"StringEqualsIfExists": {"aws:PrincipalOrgID": "o-acme"}}}, True),
        ({"Condition": {"StringNotEquals": {"aws:PrincipalOrgID": "o-acme"}}}, True),
        ({"Condition": {"StringEquals": {"aws:Referer": "acme.example"}}}, True),
        ({"Condition": {"IpAddress": {"aws:SourceIp": "203.0.113.0/24"}}}, False),
        ({"Condition": {"IpAddress": {"aws:SourceIp": ["203.0.113.0/24", "0.0.0.0/1"]}}}, True),
        ({"Condition": {"IpAddress": {"aws:SourceIp": "nowhere"}}}, True),
        ({"Condition": {"StringEquals": {"AWS:SourceVpce": "vpce-1"}}}, False),
    ],
)
def test_what_is_public(changes: dict[str, Any], public: bool) -> None:
    assert is_public({**PUBLIC, **changes}) is public


def test_not_principal_with_allow_is_public() -> None:
    statement = {key: value for key, value in PUBLIC.items() if key != "Principal"}
    assert is_public({**statement, "NotPrincipal": {"AWS": READER}})


def test_merging_keeps_what_is_safe() -> None:
    log = {
        "Sid": "Logs",
        "Effect": "Allow",
        "Principal": {"Service": "logging.s3.amazonaws.com"},
        "Action": "s3:PutObject",
        "Resource": f"{BUCKET}/logs/*",
    }
    partner = {**PUBLIC, "Sid": "Partner", "Principal": {"AWS": STRANGER}}
    deny = {**PUBLIC, "Sid": "NoDelete", "Effect": "Deny", "Action": "s3:DeleteBucket"}
    old = make_policy("/old")["Statement"]
    now = {"Version": "2012-10-17", "Statement": [log, PUBLIC, partner, deny, *old]}
    rule = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}
    lock = make_lock(parse_location("s3://acme-models/triage"), readers=[READER], admins=[ADMIN])
    plan = make_plan(lock, Settings(values={"policy": now, "lifecycle": [rule]}), ADMIN)
    assert plan.desired["policy"]["Statement"][:3] == [log, partner, deny]
    assert plan.desired["lifecycle"] == [rule, abort_rule()]
    assert plan.openings == ("statement 2 of the policy gives s3:GetObject to the public, and is removed",)
    notes = "\n".join(plan.notes)
    assert "Partner" in notes
    assert "NoDelete" in notes
    assert "acme-models/old/*" in notes
    assert "Logs" not in notes
    assert [change.setting for change in plan.changes] == ["lifecycle", "policy"]
    assert '-      "Principal": "*",' in plan.changes[1].diff
    again = make_plan(lock, Settings(values={name: plan.desired[name] for name in ("policy", "lifecycle")}), ADMIN)
    assert again.changes == ()


def test_order_and_spelling_are_no_change() -> None:
    lock = make_lock(parse_location("s3://acme-models/triage"), readers=[READER], admins=[ADMIN])
    policy = bucket_policy(lock)
    spelt = json.loads(json.dumps(policy).replace(f'["{READER}"]', f'"{READER}"'))
    for statement in spelt["Statement"]:
        if isinstance(statement.get("Action"), list):
            statement["Action"].reverse()
    assert spelt != policy
    assert make_plan(lock, Settings(values={"policy": spelt}), ADMIN).changes == ()


def test_encryption_is_never_weakened() -> None:
    kms = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "alias/theirs"}
    lock = make_lock(parse_location("s3://acme-models"), admins=[ADMIN])
    assert make_plan(lock, Settings(values={"encryption": kms}), ADMIN).changes == ()
    with_key = make_lock(parse_location("s3://acme-models"), admins=[ADMIN], kms_key="alias/ours")
    (change,) = make_plan(with_key, Settings(values={"encryption": kms}), ADMIN).changes
    assert change.after == {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "alias/ours", "BucketKeyEnabled": True}


def test_who_would_be_locked_out() -> None:
    lock = make_lock(parse_location("s3://acme-models"), admins=[ADMIN])
    empty = Settings()
    session = f"arn:aws:sts::{ACCOUNT}:assumed-role/break-glass/me"
    assert make_plan(lock, empty, session).lock_out is None
    assert "not one of" in str(make_plan(lock, empty, OUTSIDER).lock_out)
    assert "who you are" in str(make_plan(lock, empty, None).lock_out)
    assert "plain HTTP" in str(make_plan(lock, empty, ADMIN, plain_http=True).lock_out)
