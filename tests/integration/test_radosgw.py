"""The policy where a store enforces it by who asks: signed requests to a Ceph gateway.

Ceph 16 does not know ``aws:PrincipalArn``, nor ``aws:SecureTransport`` of a plain request. So it proves what the policy
allows and that nobody else gets anything, not the statements that take away what the IAM of an account gives, nor the
one on TLS: those are judged in ``tests/unit/test_policy.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from iam import BUCKET, Asker, may
from radosgw import Gateway, gateway, missing_programs

from hf_wmguard.storage.bucket import read_settings, write_setting
from hf_wmguard.storage.lockdown import make_lock
from hf_wmguard.storage.planning import make_plan
from hf_wmguard.stores.location import parse_location

pytestmark = [
    pytest.mark.radosgw,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs Ceph RGW: {', '.join(missing_programs())} not installed"
    ),
]
USERS = ("admin", "reader", "writer", "outsider")
DATA = b"ciphertext" * 1000
PART = b"p" * (5 << 20)


def arn(name: str) -> str:
    return f"arn:aws:iam:::user/{name}"


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A running gateway."""
    with gateway(tmp_path_factory.mktemp("ceph")) as running:
        yield running


@pytest.fixture(scope="module")
def clients(ceph: Gateway) -> Iterator[dict[str, Any]]:
    """A client for each user and for nobody; a bucket of the administrator's that is locked."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(closing(ceph.client(ceph.user(name)))) for name in USERS}
        found["anonymous"] = stack.enter_context(closing(ceph.client(None)))
        admin = found["admin"]
        admin.create_bucket(Bucket="acme-models")
        admin.put_bucket_versioning(Bucket="acme-models", VersioningConfiguration={"Status": "Enabled"})
        for key in ("triage/a", "other/a"):
            admin.put_object(Bucket="acme-models", Key=key, Body=DATA)
        names = {"readers": [arn("reader")], "writers": [arn("writer")], "admins": [arn("admin")]}
        lock = make_lock(parse_location("s3://acme-models/triage"), **names)
        plan = make_plan(lock, read_settings(admin, "acme-models"), arn("admin"))
        assert "policy" in [change.setting for change in plan.changes]
        # The policy alone: in this version BlockPublicAcls refuses every PUT.
        assert write_setting(admin, "acme-models", "policy", plan.desired["policy"]) == ""
        settings = read_settings(admin, "acme-models")
        assert settings.values["policy"] == plan.desired["policy"]
        assert "policy" not in [change.setting for change in make_plan(lock, settings, arn("admin")).changes]
        found["policy"] = plan.desired["policy"]
        yield found


# What is asked: the action of IAM, what it is about, and its condition; then the request itself.
REQUESTS: list[tuple[str, str, dict[str, str], Callable[[Any], Any]]] = [
    ("s3:GetObject", "triage/a", {}, lambda s3: s3.get_object(Bucket="acme-models", Key="triage/a")["Body"].read()),
    ("s3:GetObject", "triage/a", {}, lambda s3: s3.head_object(Bucket="acme-models", Key="triage/a")),
    ("s3:GetObject", "other/a", {}, lambda s3: s3.get_object(Bucket="acme-models", Key="other/a")["Body"].read()),
    ("s3:PutObject", "triage/b", {}, lambda s3: s3.put_object(Bucket="acme-models", Key="triage/b", Body=DATA)),
    ("s3:PutObject", "other/b", {}, lambda s3: s3.put_object(Bucket="acme-models", Key="other/b", Body=DATA)),
    (
        "s3:PutObjectAcl",
        "triage/a",
        {},
        lambda s3: s3.put_object_acl(Bucket="acme-models", Key="triage/a", ACL="private"),
    ),
    ("s3:DeleteObject", "triage/none", {}, lambda s3: s3.delete_object(Bucket="acme-models", Key="triage/none")),
    (
        "s3:ListBucket",
        "",
        {"s3_prefix": "triage/"},
        lambda s3: s3.list_objects_v2(Bucket="acme-models", Prefix="triage/"),
    ),
    (
        "s3:ListBucket",
        "",
        {"s3_prefix": "other/"},
        lambda s3: s3.list_objects_v2(Bucket="acme-models", Prefix="other/"),
    ),
    ("s3:ListBucket", "", {}, lambda s3: s3.list_objects_v2(Bucket="acme-models")),
    ("s3:ListBucketMultipartUploads", "", {}, lambda s3: s3.list_multipart_uploads(Bucket="acme-models")),
    ("s3:GetBucketPolicy", "", {}, lambda s3: s3.get_bucket_policy(Bucket="acme-models")),
    ("s3:DeleteBucketPolicy", "", {}, None),  # type: ignore[list-item]
    ("s3:ListBucketVersions", "", {}, lambda s3: s3.list_object_versions(Bucket="acme-models")),
]


@pytest.mark.parametrize("who", [*USERS, "anonymous"])
def test_the_store_and_the_judge_agree(clients: dict[str, Any], who: str) -> None:
    # In a store without accounts everyone is a stranger to the policy: it alone decides.
    asker = Asker(arn=None if who == "anonymous" else arn(who), allowed=("s3:*",), owner_account="none")
    for action, key, keys, ask in REQUESTS:
        expected = may(clients["policy"], asker, action, f"{BUCKET}/{key}" if key else BUCKET, **keys)
        if ask is None:
            # Only those who may not, so that the policy stays.
            if expected:
                continue
            ask = lambda s3: s3.delete_bucket_policy(Bucket="acme-models")  # noqa: E731
        try:
            ask(clients[who])
            status = 200
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        assert status == (200 if expected else 403), (who, action, key, keys)


def test_the_writer_uploads_in_parts_and_the_reader_gets_it(clients: dict[str, Any]) -> None:
    """The uploader is not locked out."""
    writer, reader = clients["writer"], clients["reader"]
    where = {"Bucket": "acme-models", "Key": "triage/model.safetensors"}
    upload = {**where, "UploadId": writer.create_multipart_upload(**where)["UploadId"]}
    parts = []
    for number, data in enumerate((PART, b"end"), start=1):
        tag = writer.upload_part(**upload, PartNumber=number, Body=data)["ETag"]
        parts.append({"PartNumber": number, "ETag": tag})
    # Taken up again after an interruption: which uploads there are, and which parts.
    assert [one["Key"] for one in writer.list_multipart_uploads(Bucket="acme-models")["Uploads"]] == [where["Key"]]
    assert len(writer.list_parts(**upload)["Parts"]) == 2
    writer.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    with closing(reader.get_object(**where)["Body"]) as body:
        assert body.read() == PART + b"end"
    # And given up.
    upload = {**where, "UploadId": writer.create_multipart_upload(**where)["UploadId"]}
    writer.abort_multipart_upload(**upload)
    assert "Uploads" not in writer.list_multipart_uploads(Bucket="acme-models")


def test_a_missing_object_is_missing_to_the_writer(clients: dict[str, Any]) -> None:
    """A first push looks for what is not there yet; a 403 would stop it."""
    for name, status in (("writer", "404"), ("admin", "404"), ("reader", "403"), ("outsider", "403")):
        with pytest.raises(ClientError, match=status):
            clients[name].head_object(Bucket="acme-models", Key="triage/not-yet")


def test_a_stolen_writer_takes_nothing_away(clients: dict[str, Any]) -> None:
    writer, reader, where = clients["writer"], clients["reader"], {"Bucket": "acme-models", "Key": "triage/kept"}
    old = writer.put_object(**where, Body=b"old")["VersionId"]
    writer.put_object(**where, Body=b"overwritten")
    for request in ({}, {"VersionId": old}):
        with pytest.raises(ClientError, match="AccessDenied"):
            writer.delete_object(**where, **request)
    with closing(reader.get_object(**where, VersionId=old)["Body"]) as body:
        assert body.read() == b"old"


def test_the_administrator_can_undo_it(clients: dict[str, Any]) -> None:
    """Last: afterwards the bucket is not locked any more."""
    admin = clients["admin"]
    admin.delete_bucket_policy(Bucket="acme-models")
    with pytest.raises(ClientError, match="AccessDenied"):
        clients["reader"].get_object(Bucket="acme-models", Key="triage/a")
    write_setting(admin, "acme-models", "policy", clients["policy"])
    with closing(clients["reader"].get_object(Bucket="acme-models", Key="triage/a")["Body"]) as body:
        assert body.read() == DATA


def test_what_this_store_does_not_have_is_said(clients: dict[str, Any], tmp_path: Path) -> None:
    settings = read_settings(clients["admin"], "acme-models")
    assert settings.denied == ()
    assert settings.values["versioning"] == "Enabled"
    assert set(settings.unsupported) <= {"ownership", "encryption", "public_access_block", "lifecycle"}
    assert "ownership" in settings.unsupported
