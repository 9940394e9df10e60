"""Buckets locked down and audited through boto3, against moto's server over TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from s3_server import ACCOUNT, MotoServer, moto_server

from hf_wmguard.delivery.lockdown import Lockdown, make_lock
from hf_wmguard.errors import ConfigError, NotFoundError, StoreError, UsageError
from hf_wmguard.stores.location import parse_location

READER, WRITER = f"arn:aws:iam::{ACCOUNT}:role/inference", f"arn:aws:iam::{ACCOUNT}:role/trainer"


@pytest.fixture
def moto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    """A server with a bucket of everybody's, and us as an IAM user named alice."""
    with moto_server(tmp_path, monkeypatch) as server:
        server.become("alice")
        client = server.client()
        client.create_bucket(Bucket="acme-models")
        client.close()
        yield server


@pytest.fixture
def s3(moto: MotoServer) -> Iterator[Any]:
    """A client of boto3."""
    with closing(moto.client()) as client:
        yield client


def make_bucket(admin: str = f"arn:aws:iam::{ACCOUNT}:user/alice", **more: Any) -> Lockdown:
    names = {"readers": [READER], "writers": [WRITER], "admins": [admin], **more}
    return Lockdown(make_lock(parse_location("s3://acme-models/triage"), **names))


def open_up(s3: Any) -> None:
    """What one finds in old tutorials, and two things that are somebody's own business."""
    s3.put_bucket_acl(Bucket="acme-models", ACL="public-read")
    s3.put_bucket_policy(
        Bucket="acme-models",
        Policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Sid": "Everybody",
                        "Effect": "Allow",
                        "Principal": "*",
                        "Action": "s3:GetObject",
                        "Resource": "arn:aws:s3:::acme-models/*",
                    },
                    {
                        "Sid": "Logs",
                        "Effect": "Allow",
                        "Principal": {"Service": "logging.s3.amazonaws.com"},
                        "Action": "s3:PutObject",
                        "Resource": "arn:aws:s3:::acme-models/logs/*",
                    },
                ],
            }
        ),
    )
    s3.put_bucket_lifecycle_configuration(
        Bucket="acme-models",
        LifecycleConfiguration={
            "Rules": [{"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}]
        },
    )


def test_plan_apply_and_nothing_left(s3: Any) -> None:
    open_up(s3)
    with closing(make_bucket()) as bucket:
        plan = bucket.plan()
        names = [change.setting for change in plan.changes]
        assert names[-2:] == ["public_access_block", "policy"]
        assert set(names) >= {"versioning", "acl", "ownership", "lifecycle"}
        assert plan.lock_out is None
        assert any("Everybody" in line for line in plan.openings)
        assert any("AllUsers" in line for line in plan.openings)
        # Nothing was changed by looking.
        assert "Status" not in s3.get_bucket_versioning(Bucket="acme-models")
        seen: list[str] = []
        assert bucket.apply(plan, progress=seen.append) == tuple(names)
        assert seen == names
        assert bucket.plan().changes == ()
        assert bucket.apply(bucket.plan()) == ()
    statements = json.loads(s3.get_bucket_policy(Bucket="acme-models")["Policy"])["Statement"]
    assert [one["Sid"] for one in statements][0] == "Logs"
    assert all(one["Sid"].startswith("Wmguard") for one in statements[1:])
    rules = s3.get_bucket_lifecycle_configuration(Bucket="acme-models")["Rules"]
    assert [rule["ID"] for rule in rules] == ["theirs", "wmguard-abort-incomplete-uploads"]
    assert s3.get_bucket_versioning(Bucket="acme-models")["Status"] == "Enabled"
    assert all(s3.get_public_access_block(Bucket="acme-models")["PublicAccessBlockConfiguration"].values())
    assert len(s3.get_bucket_acl(Bucket="acme-models")["Grants"]) == 1


def test_a_session_of_the_administrators_role(moto: MotoServer) -> None:
    role = moto.assume("break-glass")
    with closing(make_bucket(role)) as bucket:
        plan = bucket.plan()
        assert plan.caller is not None
        assert "assumed-role/break-glass" in plan.caller
        assert plan.lock_out is None
        bucket.apply(plan)


def test_who_is_no_administrator_is_refused(s3: Any) -> None:
    with closing(make_bucket(f"arn:aws:iam::{ACCOUNT}:user/bob")) as bucket:
        plan = bucket.plan()
        with pytest.raises(UsageError, match="locked out") as raised:
            bucket.apply(plan)
        assert "user/alice" in raised.value.message
        with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucketPolicy"):
            s3.get_bucket_policy(Bucket="acme-models")
        assert "policy" in bucket.apply(plan, lock_me_out=True)


def test_a_bucket_that_changed_meanwhile(s3: Any) -> None:
    with closing(make_bucket()) as bucket:
        plan = bucket.plan()
        open_up(s3)
        with pytest.raises(StoreError, match="has changed"):
            bucket.apply(plan)
        assert "Status" not in s3.get_bucket_versioning(Bucket="acme-models")


def test_a_failure_on_the_way_says_what_was_applied(s3: Any) -> None:
    def vanish(setting: str) -> None:
        if setting == "lifecycle":
            s3.delete_bucket(Bucket="acme-models")

    with closing(make_bucket()) as bucket:
        plan = bucket.plan()
        before = [change.setting for change in plan.changes]
        before = before[: before.index("lifecycle")]
        with pytest.raises(StoreError, match=f"lifecycle: no bucket.*applied before: {', '.join(before)}"):
            bucket.apply(plan, progress=vanish)


def test_no_bucket_no_credentials_not_s3(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = make_lock(parse_location("s3://nobodys-bucket"), admins=[READER])
    with closing(Lockdown(lock)) as bucket, pytest.raises(NotFoundError, match="nobodys-bucket"):
        bucket.plan()
    with pytest.raises(ConfigError, match="Hub"):
        make_lock(parse_location("hub://acme/triage"), admins=[READER])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with closing(make_bucket()) as bucket, pytest.raises(StoreError, match="no credentials"):
        bucket.plan()


def test_plain_http_would_lock_out(s3: Any) -> None:
    from moto.server import ThreadedMotoServer

    # The same buckets, without TLS.
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        lock = make_lock(parse_location("s3://acme-models"), admins=[f"arn:aws:iam::{ACCOUNT}:user/alice"])
        with closing(Lockdown(lock, endpoint_url=f"http://{host}:{port}")) as bucket:
            plan = bucket.plan()
            with pytest.raises(UsageError, match="plain HTTP"):
                bucket.apply(plan)
    finally:
        server.stop()
    with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucketPolicy"):
        s3.get_bucket_policy(Bucket="acme-models")
