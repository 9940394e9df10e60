"""What is open of a bucket: its settings, its policy, and what lies under a prefix, older versions included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from hf_wmguard.errors import NotFoundError, StoreError
from hf_wmguard.storage.aws import DENIED, UNSUPPORTED, ask, read_body
from hf_wmguard.storage.bucket import Settings, read_settings
from hf_wmguard.storage.contents import judge_file, judge_manifest, needs_reading
from hf_wmguard.storage.findings import Audit, Finding, make_audit
from hf_wmguard.storage.planning import aborts_uploads
from hf_wmguard.storage.policy import OWNERSHIP, PUBLIC_ACCESS_BLOCK
from hf_wmguard.storage.statements import (
    denies_others,
    is_ours,
    is_public,
    principals_of,
    requires_tls,
    sid_of,
    statements_of,
)
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.s3 import S3Options, s3_client
from hf_wmguard.stores.store import StoredFile

MAX_VERSIONS = 10_000
MAX_ACLS = 100
_EVERYBODY = ("/AllUsers", "/AuthenticatedUsers")
_LOCK = "wmguard storage lockdown"
_GONE = frozenset({"NoSuchKey", "NoSuchVersion", "InvalidRange", "MethodNotAllowed", "404", "InvalidObjectState"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """One version of an object."""

    key: str
    version: str
    size_bytes: int
    tag: str
    current: bool

    @property
    def where(self) -> str:
        return self.key if self.current else f"{self.key} (older version {self.version})"


@dataclass(slots=True, kw_only=True)
class _VersionFile:
    """The bytes of one version, as a `container.source.Source`."""

    client: Any = field(repr=False)
    bucket: str
    version: _Version
    closed: bool = False
    read_bytes: int = 0

    @property
    def name(self) -> str:
        return self.version.key.rpartition("/")[2]

    @property
    def size_bytes(self) -> int:
        return self.version.size_bytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from an offset; errors as `ask`."""
        request = {"Key": self.version.key, "Range": f"bytes={offset}-{offset + len(buffer) - 1}"}
        if self.version.version != "null":
            request["VersionId"] = self.version.version
        answer, code = ask(self.client, "get_object", _GONE | DENIED, Bucket=self.bucket, **request)
        if code:
            raise StoreError(f"{self.version.where} may not be read: {code}", hint="use credentials of a reader")
        with closing(answer["Body"]) as body:
            data = read_body(body, len(buffer))
        if len(data) != len(buffer):
            raise StoreError(f"{self.version.where}: got other bytes than those asked for", hint="check the endpoint")
        buffer[:] = data

    def close(self) -> None:
        self.closed = True


def audit_s3(location: Location, endpoint_url: str | None, note: Callable[[str], None]) -> Audit:
    """Return what is open of a bucket and under a prefix; see `hf_wmguard.storage.audit.audit`."""
    with closing(s3_client(S3Options(endpoint_url=endpoint_url))) as client:
        note("settings")
        settings = read_settings(client, location.root)
        if not settings.values:
            # A list of things that could not be asked would look like one of things that are closed.
            raise StoreError(
                f"none of the settings of {location.root} may be read", hint="use credentials of its administrator"
            )
        public = _is_public(client, location.root, settings)
        found = [*_judge_settings(settings), *_judge_policy(location.root, settings, public)]
        found += _judge_rest(client, location, settings)
        found += _judge_contents(client, location, bool(public), note)
        found += _judge_acls(client, location, settings, note)
    return make_audit(str(location), found)


def _unchecked(where: str, code: str) -> Finding:
    return Finding(
        severity="info",
        what="unchecked",
        where=where,
        detail=f"may not be asked ({code})" if code in DENIED else f"this store does not say ({code})",
        remedy="use credentials of the bucket's administrator" if code in DENIED else "look with the store's own means",
    )


def _is_public(client: Any, bucket: str, settings: Settings) -> bool | None:
    """Return whether S3 itself calls the policy public; None where it does not say."""
    answer, code = ask(client, "get_bucket_policy_status", DENIED | UNSUPPORTED | {"NoSuchBucketPolicy"}, Bucket=bucket)
    if code:
        return None
    blocked = (settings.values.get("public_access_block") or {}).get("RestrictPublicBuckets") is True
    return bool(answer.get("PolicyStatus", {}).get("IsPublic")) and not blocked


def _judge_settings(settings: Settings) -> Iterator[Finding]:
    values = settings.values
    yield from (_unchecked(name, "AccessDenied") for name in settings.denied)
    yield from (_unchecked(name, "NotImplemented") for name in settings.unsupported)
    if "public_access_block" in values:
        block = values["public_access_block"] or {}
        missing = [name for name in PUBLIC_ACCESS_BLOCK if block.get(name) is not True]
        if missing:
            yield _open("high", "public_access_block", "public access block", f"off: {', '.join(missing)}")
    inert = values.get("ownership") == OWNERSHIP
    for grant in values.get("acl") or ():
        everybody = str(grant["Grantee"]).endswith(_EVERYBODY)
        yield _open(
            "info" if inert else "critical" if everybody else "medium",
            "acl",
            "ACL of the bucket",
            f"grants {grant['Permission']} to {grant['Grantee']}{', but ACLs are off' if inert else ''}",
        )
    if "ownership" in values and not inert:
        yield _open("medium", "ownership", "object ownership", "ACLs of single objects can open them to everybody")
    if "versioning" in values and values["versioning"] != "Enabled":
        yield _open("medium", "versioning", "versioning", "off: what is overwritten or deleted is gone")
    if "encryption" in values and not values["encryption"]:
        yield _open("medium", "encryption", "default encryption", "off")
    if "lifecycle" in values and not any(aborts_uploads(rule) for rule in values["lifecycle"] or ()):
        yield _open("low", "lifecycle", "lifecycle", "no rule clears what interrupted uploads leave")


def _judge_policy(bucket: str, settings: Settings, public: bool | None) -> Iterator[Finding]:
    if "policy" not in settings.values:
        return
    statements = statements_of(settings.values["policy"])
    if public:
        yield _open("critical", "public", "policy", "S3 calls the bucket public")
    arns = [f"arn:{partition}:s3:::{bucket}" for partition in ("aws", "aws-cn", "aws-us-gov")]
    named = {name for one in statements if is_ours(one) for _, name in principals_of(one)}
    for number, one in enumerate(statements, start=1):
        where = f"policy, {sid_of(one, number)}"
        if is_public(one):
            yield _open("critical", "public", where, "gives something to everybody")
            continue
        for kind, name in principals_of(one):
            if one.get("Effect") == "Allow" and kind == "AWS" and name not in named:
                detail = f"gives something to {name}, whom no lock names"
                yield Finding(severity="info", what="grant", where=where, detail=detail, remedy="see that it is meant")
    if not any(requires_tls(one, arn) for one in statements for arn in arns):
        yield _open("medium", "tls", "policy", "no statement denies plain HTTP")
    if not any(denies_others(one, arn) for one in statements for arn in arns):
        detail = "no statement denies others: whomever the account's IAM lets can read and overwrite"
        yield _open("medium", "policy", "policy", detail)


def _open(severity: str, what: str, where: str, detail: str) -> Finding:
    return Finding(severity=severity, what=what, where=where, detail=detail, remedy=_LOCK)


def _judge_rest(client: Any, location: Location, settings: Settings) -> Iterator[Finding]:
    bucket, absent = location.root, "NoSuchWebsiteConfiguration"
    _, code = ask(client, "get_bucket_website", {absent} | DENIED | UNSUPPORTED, Bucket=bucket)
    if not code:
        yield Finding(
            severity="medium",
            what="website",
            where="website hosting",
            detail="on: it speaks plain HTTP, and is made for the public",
            remedy="aws s3api delete-bucket-website",
        )
    elif code != absent:
        yield _unchecked("website hosting", code)
    answer, code = ask(client, "get_bucket_logging", DENIED | UNSUPPORTED, Bucket=bucket)
    if code:
        yield _unchecked("logging", code)
    elif not answer.get("LoggingEnabled"):
        remedy = "log to another bucket, or record data events with CloudTrail"
        yield Finding(
            severity="low", what="logging", where="logging", detail="off: nobody sees who reads", remedy=remedy
        )
    answer, code = ask(client, "list_multipart_uploads", DENIED | UNSUPPORTED, Bucket=bucket, Prefix=_prefix(location))
    if code:
        yield _unchecked("unfinished uploads", code)
    for upload in answer.get("Uploads", ()):
        detail = f"unfinished upload since {upload['Initiated']:%Y-%m-%d}, which no listing shows"
        yield Finding(
            severity="low", what="upload", where=upload["Key"], detail=detail, remedy="finish it, or abort it"
        )


def _prefix(location: Location) -> str:
    return f"{location.path}/" if location.path else ""


def _versions(client: Any, location: Location) -> tuple[list[_Version], str, bool]:
    """Return what lies under a prefix, the code of a refusal, and whether there is more than was looked at."""
    request: dict[str, Any] = {"Bucket": location.root, "Prefix": _prefix(location)}
    found: list[_Version] = []
    while True:
        answer, code = ask(client, "list_object_versions", DENIED | UNSUPPORTED, **request)
        if code:
            # Older versions need a right of their own; the newest are looked at all the same.
            return (found, code, False) if found else (*_newest(client, location, code),)
        for one in answer.get("Versions", ()):
            found.append(
                _Version(
                    key=one["Key"],
                    version=one.get("VersionId") or "null",
                    size_bytes=one["Size"],
                    tag=one["ETag"],
                    current=one.get("IsLatest", True),
                )
            )
        if not answer.get("IsTruncated") or len(found) >= MAX_VERSIONS:
            return found, "", bool(answer.get("IsTruncated"))
        request |= {
            "KeyMarker": answer.get("NextKeyMarker", ""),
            **({"VersionIdMarker": answer["NextVersionIdMarker"]} if answer.get("NextVersionIdMarker") else {}),
        }


def _newest(client: Any, location: Location, code: str) -> tuple[list[_Version], str, bool]:
    request: dict[str, Any] = {"Bucket": location.root, "Prefix": _prefix(location)}
    found: list[_Version] = []
    while True:
        answer, refused = ask(client, "list_objects_v2", DENIED, **request)
        if refused:
            return found, refused, False
        for one in answer.get("Contents", ()):
            found.append(
                _Version(key=one["Key"], version="null", size_bytes=one["Size"], tag=one["ETag"], current=True)
            )
        if not answer.get("IsTruncated") or len(found) >= MAX_VERSIONS:
            return found, code, bool(answer.get("IsTruncated"))
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _judge_contents(client: Any, location: Location, public: bool, note: Callable[[str], None]) -> Iterator[Finding]:
    versions, code, more = _versions(client, location)
    if code:
        yield _unchecked("older versions" if versions else "objects", code)
    if not versions and not code:
        detail = "nothing lies under this prefix: no file was judged"
        yield Finding(severity="info", what="unchecked", where="objects", detail=detail, remedy="check the prefix")
    if more:
        detail = f"only the first {len(versions)} versions were looked at"
        yield Finding(severity="info", what="unchecked", where="objects", detail=detail, remedy="audit a longer prefix")
    seen = set()
    # The newest first, so that what is there now is named and not an older copy of it.
    for one in sorted(versions, key=lambda one: not one.current):
        same = (one.key, one.tag, one.size_bytes)
        if same in seen or not needs_reading(one.key, one.size_bytes):
            continue
        seen.add(same)
        note(one.where)
        try:
            yield from judge_file(
                one.key, one.where, _VersionFile(client=client, bucket=location.root, version=one), public=public
            )
        except (NotFoundError, StoreError) as error:
            yield Finding(severity="info", what="unchecked", where=one.where, detail=error.message, remedy=error.hint)
    newest = {one.key: one for one in versions if one.current}
    files = {name: StoredFile(size_bytes=one.size_bytes, tag=one.tag) for name, one in newest.items()}
    try:
        yield from judge_manifest(
            "now",
            files,
            lambda name: _VersionFile(client=client, bucket=location.root, version=newest[name]),
        )
    except (NotFoundError, StoreError) as error:
        yield Finding(severity="info", what="unchecked", where="manifests", detail=error.message, remedy=error.hint)


def _judge_acls(client: Any, location: Location, settings: Settings, note: Callable[[str], None]) -> Iterator[Finding]:
    """Look at the ACLs of the first objects; they mean nothing where ownership is enforced."""
    if settings.values.get("ownership") == OWNERSHIP:
        return
    note("ACLs of objects")
    answer, _ = ask(client, "list_objects_v2", DENIED, Bucket=location.root, Prefix=_prefix(location), MaxKeys=MAX_ACLS)
    for one in answer.get("Contents", ()):
        acl, code = ask(client, "get_object_acl", DENIED | UNSUPPORTED | _GONE, Bucket=location.root, Key=one["Key"])
        if code:
            yield _unchecked("ACLs of objects", code)
            return
        for grant in acl.get("Grants", ()):
            if str(grant["Grantee"].get("URI", "")).endswith(_EVERYBODY):
                yield _open("critical", "acl", one["Key"], f"its ACL grants {grant['Permission']} to everybody")
    if answer.get("IsTruncated"):
        detail = f"only those of the first {MAX_ACLS} objects were looked at"
        yield Finding(severity="info", what="unchecked", where="ACLs of objects", detail=detail, remedy=_LOCK)
