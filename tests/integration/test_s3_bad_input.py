"""S3 that refuses, lies, cuts or is not there: a named error with a way out, and nothing secret in it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from key_servers import Service, serving, write_certificate
from recording_proxy import recording
from s3_servers import ENVIRONMENT, Answer, answering, error_answer, make_save, moto_s3
from tiny import largest_file

from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.delivery.fetching import fetch_all
from hf_wmguard.delivery.parcel import Parcel, pack
from hf_wmguard.delivery.pulling import pull
from hf_wmguard.delivery.s3 import push_to_s3
from hf_wmguard.errors import ConfigError, EnvironmentFault, FormatError, NotFoundError, StoreError, WmguardError
from hf_wmguard.keys import OwnerKey, write_key_pair
from hf_wmguard.stores.location import parse_location
from hf_wmguard.stores.s3 import S3Options, S3Place, S3Store, s3_client
from hf_wmguard.stores.s3_pointer import POINTER_NAME, Entry, Pointer, Save

WHERE = parse_location("s3://models/acme/tiny")
DATA = bytes(range(256)) * 4096


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def parcel(tmp_path_factory: pytest.TempPathFactory) -> Parcel:
    root = tmp_path_factory.mktemp("saves")
    OwnerKey.generate().write(root / "owner")
    identity = generate_identity()
    write_key_pair(root / "reader", identity.to_text().encode(), identity.recipient().to_text().encode())
    make_save(root, "save", seed=0, owner=root / "owner", reader=root / "reader", matrices=2)
    return pack(root / "save")


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    with moto_s3() as address:
        yield address


@pytest.fixture
def bucket(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{moto[0]}:{moto[1]}")
    client = s3_client()
    client.create_bucket(Bucket="models")
    yield client
    client.close()


def at(port: int, **options: Any) -> S3Options:
    return S3Options(**{"endpoint_url": f"http://127.0.0.1:{port}", "attempts": 2, "timeout_s": 5.0, **options})


def checked(error: WmguardError) -> WmguardError:
    """Return an error that says what to do, and nothing that it must not."""
    text = f"{error!s} {error!r} {error.__cause__} {error.__context__ if not error.__suppress_context__ else ''}"
    assert error.hint
    for secret in ("SECRET-IN-ANSWER", ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], "AKIA"):
        assert secret not in text
    return error


@pytest.mark.parametrize(
    ("status", "code", "extra", "kind", "message", "hint"),
    [
        (404, "NoSuchBucket", "", NotFoundError, "no such bucket", "create the bucket"),
        (403, "InvalidAccessKeyId", "", StoreError, "does not accept these credentials", "AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", "", StoreError, "does not accept these credentials", "secret"),
        (400, "ExpiredToken", "", StoreError, "expired", "sign in"),
        (403, "AccessDenied", "", StoreError, "denies GetObject", "s3:GetObject"),
        (403, "RequestTimeTooSkewed", "", StoreError, "clock", "NTP"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "<Region>eu-west-1</Region>",
            StoreError,
            "region",
            "AWS_REGION=eu-west-1",
        ),
        (301, "PermanentRedirect", "", StoreError, "redirects", "AWS_ENDPOINT_URL_S3"),
        (429, "TooManyRequests", "", StoreError, "too busy", "later"),
        (503, "SlowDown", "", StoreError, "too busy", "later"),
        (500, "InternalError", "", StoreError, "out of order", "later"),
        (501, "NotImplemented", "", StoreError, "cannot do GetObject", "conditional writes"),
        (400, "KMS.DisabledException", "", StoreError, "KMS key", "enabled"),
        (418, "SomethingNew", "", StoreError, "SomethingNew", "code"),
    ],
)
def test_refusals_have_names(
    status: int, code: str, extra: str, kind: type[WmguardError], message: str, hint: str
) -> None:
    with (
        answering(lambda *_: error_answer(status, code, extra=extra)) as (port, _),
        pytest.raises(kind, match=message) as caught,
    ):
        S3Store(WHERE, options=at(port))
    assert hint in checked(caught.value).hint


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="needs credentials and there are none") as caught:
        S3Store(WHERE, options=at(9))
    checked(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "half")
    with pytest.raises(StoreError, match="a part of them is missing"):
        S3Store(WHERE, options=at(9))
    with pytest.raises(ConfigError, match="profile"):
        S3Store(WHERE, options=at(9, profile="nobody"))


def test_nobody_listens_or_answers() -> None:
    with answering(lambda *_: None) as (port, asked):
        with pytest.raises(StoreError, match="cut the connection") as caught:
            S3Store(WHERE, options=at(port))
        checked(caught.value)
        assert len(asked) == 2
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        S3Store(WHERE, options=at(port))
    checked(caught.value)

    def slow(*_: Any) -> Answer:
        time.sleep(1)
        return error_answer(404, "NoSuchKey")

    with answering(slow) as (port, _), pytest.raises(StoreError, match="stopped answering"):
        S3Store(WHERE, options=at(port, timeout_s=0.2, attempts=1))
    with pytest.raises(ConfigError, match="endpoint"):
        S3Store(WHERE, options=S3Options(endpoint_url="not an address"))


def test_certificate_of_nobody(tmp_path: Path) -> None:
    options = {"attempts": 1, "timeout_s": 5.0}
    with (
        serving(Service(), write_certificate(tmp_path / "server.pem")) as port,
        pytest.raises(StoreError, match="not trusted") as caught,
    ):
        S3Store(WHERE, options=S3Options(endpoint_url=f"https://127.0.0.1:{port}", **options))  # type: ignore[arg-type]
    assert "AWS_CA_BUNDLE" in checked(caught.value).hint


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_store_is_given_the_time_it_asks_for(status: int) -> None:
    times: list[float] = []

    def answer(*_: Any) -> Answer:
        times.append(time.monotonic())
        if len(times) < 4:
            return error_answer(status, "TooManyRequests", headers={"Retry-After": "1"})
        return error_answer(404, "NoSuchBucket")

    with answering(answer) as (port, _), pytest.raises(NotFoundError):
        S3Store(WHERE, options=at(port, attempts=1))
    assert all(later - earlier > 0.9 for earlier, later in pairwise(times))


def folder_of(data: bytes, how: str) -> Any:
    """Return a server of one file, which answers ranges as it should not."""

    def answer(method: str, path: str, headers: Mapping[str, str]) -> Answer | None:
        if POINTER_NAME in path:
            return error_answer(404, "NoSuchKey")
        if "list-type" in path:
            item = f'<Contents><Key>acme/tiny/m.bin</Key><ETag>"a"</ETag><Size>{len(data)}</Size></Contents>'
            body = f"<ListBucketResult>{item}<IsTruncated>false</IsTruncated></ListBucketResult>"
            return 200, {}, body.encode()
        if "Range" not in headers:
            return error_answer(404, "NoSuchBucket")
        first, last = (int(word) for word in headers["Range"].removeprefix("bytes=").split("-"))
        part, where = data[first : last + 1], f"bytes {first}-{last}/{len(data)}"
        if how == "whole":
            return 200, {}, data
        if how == "other":
            return 206, {"Content-Range": f"bytes {first + 1}-{last + 1}/{len(data)}"}, part
        if how == "grown":
            return 206, {"Content-Range": f"bytes {first}-{last}/{len(data) + 1}"}, part
        if how == "short":
            return 206, {"Content-Range": where}, part[:-1]
        if how == "cut":
            return 206, {"Content-Range": where, "Content-Length": str(len(part)), "Connection": "close"}, part[:7]
        if how == "away":
            return 307, {"Location": "http://127.0.0.1:9/elsewhere"}, b""
        return error_answer(412, "PreconditionFailed")

    return answer


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("whole", "other bytes"),
        ("other", "other bytes"),
        ("grown", "other bytes"),
        ("short", "sends 999 bytes"),
        ("away", "region"),
        ("replaced", "replaced or deleted"),
    ],
)
def test_lies_about_ranges(how: str, message: str) -> None:
    with answering(folder_of(DATA, how)) as (port, _), S3Store(WHERE, options=at(port)) as store:
        with pytest.raises(StoreError, match=message) as caught:
            store.read_into("m.bin", 5, memoryview(bytearray(1000)))
        checked(caught.value)


def test_a_connection_that_is_always_cut_makes_progress_or_ends() -> None:
    with answering(folder_of(DATA, "cut")) as (port, asked), S3Store(WHERE, options=at(port)) as store:
        buffer = bytearray(50)
        store.read_into("m.bin", 5, memoryview(buffer))
        assert buffer == DATA[5:55]
        assert len(asked) > 7


def test_connections_cut_in_the_middle_of_parts(
    bucket: Any, moto: tuple[str, int], parcel: Parcel, tmp_path: Path
) -> None:
    with recording(moto, {"client": [3_000_000, 1_000_000], "server": [5_000_000, 2_000_000]}) as proxy:
        options = at(proxy.port, attempts=5)
        push_to_s3(parcel, WHERE, options=options, part_bytes=5 << 20, threads=2)
        assert proxy.cut == 2
        with S3Store(WHERE, options=options) as store:
            fetch_all(store, store.files(), tmp_path, threads=2)
        assert proxy.cut == 4
    assert pack(tmp_path).manifest == parcel.manifest
    assert "Uploads" not in bucket.list_multipart_uploads(Bucket="models")


def test_conditions_that_a_store_ignores_are_found_out(parcel: Parcel) -> None:
    def answer(method: str, path: str, headers: Mapping[str, str]) -> Answer:
        if method == "PUT":
            return 200, {"ETag": '"a"'}, b""
        if method == "POST":
            return 200, {}, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
        for asked_for, name in (("list-type", "ListBucketResult"), ("uploads", "ListMultipartUploadsResult")):
            if asked_for in path:
                return 200, {}, f"<{name}><IsTruncated>false</IsTruncated></{name}>".encode()
        return error_answer(404, "NoSuchBucketPolicy" if "?" in path else "NoSuchKey")

    with answering(answer) as (port, asked):
        with pytest.raises(StoreError, match="ignores the condition") as caught:
            push_to_s3(parcel, WHERE, options=at(port))
        checked(caught.value)
        # Nobody sees parts.
        seen = {line.partition("?")[0] for line in asked if line.startswith("PUT") and "partNumber" not in line}
        assert seen == {f"PUT /models/acme/tiny/{POINTER_NAME}"}


def test_questions_that_may_not_be_asked_are_named(parcel: Parcel) -> None:
    def answer(method: str, path: str, headers: Mapping[str, str]) -> Answer:
        asking = any(word in path for word in ("publicAccessBlock", "policyStatus", "acl"))
        return error_answer(403, "AccessDenied") if asking else error_answer(404, "NoSuchBucket")

    with answering(answer) as (port, asked), pytest.raises(NotFoundError, match="no such bucket"):
        push_to_s3(parcel, WHERE, options=at(port))
    assert len(asked) == 4


def _pointer(name: str = "model.safetensors", *, size_bytes: int = 3) -> Pointer:
    entry = Entry(name=name, key=name, etag='"a"', version=None, size_bytes=size_bytes, sha256="0" * 64)
    save = Save(revision="0" * 32, entries=(entry,))
    return Pointer(current=save, previous=None, push="", done=True, writes=())


def test_pointers_that_are_none(bucket: Any) -> None:
    good = _pointer().to_bytes()
    assert Pointer.from_bytes(good) == _pointer()
    bad = [
        b"",
        b"{}",
        good[:-1],
        good.replace(b'"version":1', b'"version":2'),
        good.replace(b'"key":"model.safetensors"', b'"key":"../model.safetensors"'),
        good.replace(b"model.safetensors", b"../x.safetensors"),
        good.replace(b"model.safetensors", b"/etc/passwd"),
        good.replace(b'"size_bytes":3', b'"size_bytes":-3'),
        good.replace(b"0" * 64, b"g" * 64),
    ]
    for data in bad:
        bucket.put_object(Bucket="models", Key=WHERE.key(POINTER_NAME), Body=data)
        with pytest.raises(FormatError) as caught:
            S3Store(WHERE)
        checked(caught.value)
    bucket.delete_object(Bucket="models", Key=WHERE.key(POINTER_NAME))


def test_a_size_that_lies_costs_nothing(bucket: Any, parcel: Parcel, tmp_path: Path) -> None:
    huge = _pointer("tokenizer_x.json", size_bytes=1 << 53)
    bucket.put_object(Bucket="models", Key=f"huge/{POINTER_NAME}", Body=huge.to_bytes())
    with S3Store(parse_location("s3://models/huge")) as store, pytest.raises(EnvironmentFault, match="do not fit"):
        fetch_all(store, store.files(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    # Beside a manifest that holds: nobody signed how large the tokenizer is.
    push_to_s3(parcel, parse_location("s3://models/huge2"))
    place = S3Place(parse_location("s3://models/huge2"))
    pointer, _ = place.read_pointer()
    place.close()
    assert pointer is not None
    assert pointer.current is not None
    assert huge.current is not None
    lying = replace(pointer.current, entries=(*pointer.current.entries, *huge.current.entries))
    body = replace(pointer, current=lying).to_bytes()
    bucket.put_object(Bucket="models", Key=f"huge2/{POINTER_NAME}", Body=body)
    with pytest.raises(FormatError, match=r"tokenizer_x\.json"):
        pull("s3://models/huge2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pull_onto_a_full_disk(bucket: Any, parcel: Parcel, tmp_path: Path) -> None:
    push_to_s3(parcel, parse_location("s3://models/full"))
    with largest_file(10_000), pytest.raises(EnvironmentFault, match="cannot write into"):
        pull("s3://models/full", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pull("s3://models/full", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_names_that_lead_elsewhere_are_not_listed(bucket: Any, tmp_path: Path) -> None:
    for name in ("good.json", "../evil.json", "a//b.json", "folder/", "C:\\x.json"):
        bucket.put_object(Bucket="models", Key=f"odd/{name}", Body=b"{}")
    with S3Store(parse_location("s3://models/odd")) as store:
        assert set(store.files()) == {"good.json"}
        fetch_all(store, store.files(), tmp_path)
        with pytest.raises(NotFoundError):
            fetch_all(store, ["../evil.json"], tmp_path)
        with pytest.raises(NotFoundError):
            fetch_all(store, store.files(), tmp_path / "missing")
        (tmp_path / "file").write_text("")
        with pytest.raises(EnvironmentFault):
            fetch_all(store, store.files(), Path("/proc/self"))


def test_options_have_bounds(parcel: Parcel) -> None:
    for wrong in ({"attempts": 0}, {"timeout_s": 0.0}):
        with pytest.raises(ConfigError):
            S3Options(**wrong)  # type: ignore[arg-type]
    for wrong in ({"threads": 0}, {"part_bytes": 1}):
        with pytest.raises(ConfigError):
            push_to_s3(parcel, WHERE, **wrong)  # type: ignore[arg-type]
