"""Buckets locked down and audited through boto3, against moto's server over TLS."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import ACCOUNT, MotoServer, moto_server

from hf_wmguard.container.files import FileContext, TensorData, write_protected
from hf_wmguard.errors import ConfigError, NotFoundError, StoreError, UsageError
from hf_wmguard.storage.audit import audit
from hf_wmguard.storage.findings import Finding
from hf_wmguard.storage.lockdown import Lockdown, make_lock
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
    assert statements[0]["Sid"] == "Logs"
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


def found(*, at: str = "s3://acme-models/triage") -> list[Finding]:
    return list(audit(parse_location(at)).findings)


def what(findings: list[Finding], *severities: str) -> set[tuple[str, str]]:
    return {(one.what, one.where) for one in findings if one.severity in severities}


def put_model(s3: Any, path: Path) -> None:
    """Ciphertext under the prefix, nothing else."""
    context = FileContext(model_id="acme/triage", iteration="1", set_id="5e7")
    write_protected(
        path / "model.safetensors",
        {"a": TensorData(dtype="U8", shape=(4,), data=b"1234")},
        dek=bytes(32),
        context=context,
    )
    s3.put_object(Bucket="acme-models", Key="triage/model.safetensors", Body=(path / "model.safetensors").read_bytes())
    s3.put_object(Bucket="acme-models", Key="triage/config.json", Body=b"{}")


def test_audit_before_and_after(s3: Any, tmp_path: Path) -> None:
    open_up(s3)
    put_model(s3, tmp_path)
    s3.put_bucket_website(Bucket="acme-models", WebsiteConfiguration={"IndexDocument": {"Suffix": "index.html"}})
    before = found()
    assert what(before, "critical") == {
        ("public", "policy"),
        ("public", "policy, Everybody"),
        ("acl", "ACL of the bucket"),
        ("acl", "triage/config.json"),
        ("acl", "triage/model.safetensors"),
    }
    assert what(before, "high") == {("public_access_block", "public access block")}
    assert what(before, "medium") >= {
        ("tls", "policy"),
        ("policy", "policy"),
        ("versioning", "versioning"),
        ("ownership", "object ownership"),
        ("website", "website hosting"),
    }
    assert what(before, "low") == {("logging", "logging"), ("lifecycle", "lifecycle")}
    # The worst come first.
    assert before[0].severity == "critical"

    with closing(make_bucket()) as bucket:
        bucket.apply(bucket.plan())
    s3.delete_bucket_website(Bucket="acme-models")
    after = audit(parse_location("s3://acme-models/triage"))
    assert not after.is_open
    assert what(list(after.findings), "low") == {("logging", "logging")}
    # moto lets nobody read objects of a bucket whose policy has a condition: that is said, and not passed over.
    assert ("unchecked", "triage/model.safetensors") in what(list(after.findings), "info")


def test_audit_finds_plaintext_in_any_version(s3: Any, tmp_path: Path) -> None:
    def put(name: str, data: bytes) -> None:
        s3.put_object(Bucket="acme-models", Key=f"triage/{name}", Body=data)

    from safetensors.torch import save

    s3.put_bucket_versioning(Bucket="acme-models", VersioningConfiguration={"Status": "Enabled"})
    plain = save({"a": torch.arange(100_000.0)})
    put("model.safetensors", plain)
    put_model(s3, tmp_path)
    put("copy/renamed.dat", plain)
    put("adapter_model.bin", b"not even weights")
    put("model.gguf", b"GGUF")
    put("gone.pt", b"x")
    s3.delete_object(Bucket="acme-models", Key="triage/gone.pt")
    state = io.BytesIO()
    torch.save({"hf-wmguard": "the state is elsewhere"}, state)
    put("checkpoint-1/optimizer.pt", state.getvalue())
    torch.save({"state": torch.ones(30_000)}, state := io.BytesIO())
    put("checkpoint-2/optimizer.pt", state.getvalue())
    put(".env", b"HF_TOKEN=hf_" + b"a" * 34)
    s3.put_object(Bucket="acme-models", Key="elsewhere/model.gguf", Body=b"GGUF")
    findings = found()
    old = [where for kind, where in what(findings, "high") if kind == "plaintext" and "older version" in where]
    assert sorted(where.split(" ")[0] for where in old) == ["triage/gone.pt", "triage/model.safetensors"]
    assert what(findings, "high") >= {
        ("plaintext", "triage/copy/renamed.dat"),
        ("plaintext", "triage/adapter_model.bin"),
        ("plaintext", "triage/model.gguf"),
    }
    assert ("plaintext", "triage/model.safetensors") not in what(findings, "high", "critical")
    states = {where for kind, where in what(findings, "medium") if kind == "state"}
    assert states == {"triage/checkpoint-2/optimizer.pt"}
    assert ("secret", "triage/.env") in what(findings, "critical")
    assert not any("elsewhere" in one.where for one in findings)
    assert ("plaintext", "elsewhere/model.gguf") in what(found(at="s3://acme-models"), "high")


def test_audit_names_grants_and_unfinished_uploads(s3: Any) -> None:
    partner = {
        "Sid": "Partner",
        "Effect": "Allow",
        "Principal": {"AWS": "arn:aws:iam::999988887777:root"},
        "Action": "s3:GetObject",
        "Resource": "arn:aws:s3:::acme-models/*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [partner]})
    s3.put_bucket_policy(Bucket="acme-models", Policy=policy)
    s3.create_multipart_upload(Bucket="acme-models", Key="triage/model.safetensors")
    findings = found()
    assert ("grant", "policy, Partner") in what(findings, "info")
    assert ("upload", "triage/model.safetensors") in what(findings, "low")


def test_a_prefix_with_nothing_in_it_is_named(s3: Any) -> None:
    findings = list(audit(parse_location("s3://acme-models/typo")).findings)
    assert ("unchecked", "objects") in what(findings, "info")


def test_audit_of_no_bucket(moto: MotoServer) -> None:
    with pytest.raises(NotFoundError, match="nobodys-bucket"):
        found(at="s3://nobodys-bucket")


def test_audit_says_what_it_may_not_ask(moto: MotoServer, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto checks IAM once it is told to: a user who may list, and ask nothing else."""
    from moto import settings

    moto.become("mallory")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "*"}]}
    with closing(moto.client("iam")) as iam:
        iam.put_user_policy(UserName="mallory", PolicyName="list", PolicyDocument=json.dumps(policy))
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    findings = found()
    unchecked = {where for kind, where in what(findings, "info") if kind == "unchecked"}
    assert unchecked >= {"policy", "acl", "versioning", "logging"}
