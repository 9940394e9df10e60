"""The short moment in which a new version takes its place: every write on condition that nobody else has written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from hf_wmguard.errors import StoreError
from hf_wmguard.stores.s3 import ABSENT, CHANGED, S3Place
from hf_wmguard.stores.s3_pointer import KEPT, POINTER_NAME, Entry, Pointer, Save

DIGEST = "wmguard-sha256"
"""What an object's metadata calls the SHA-256 of the whole file."""
_CLASH = (*CHANGED, *ABSENT, "NoSuchUpload", "InvalidPart")
_DENIED = ("AccessDenied", "403", "NotImplemented", "501")
_BATCH = 1000


def somebody_else(place: S3Place) -> StoreError:
    """Return the error of the push that came second."""
    return StoreError(
        f"somebody else pushed to {place.location} meanwhile: this push is not seen by readers",
        hint="look at what is there now; if yours is to replace it, push again",
    )


def head(place: S3Place, key: str) -> Any:
    """Return what S3 says of an object, None where there is none."""
    return place.call("head_object", allow=ABSENT, Key=key)


def holds(found: Any, size_bytes: int, sha256: str | None, extra: Mapping[str, Any]) -> bool:
    """Return whether an object says of itself that it is this file, encrypted as it is wanted now."""
    wanted = extra.get("ServerSideEncryption")
    return (
        found is not None
        and sha256 is not None
        and found["ContentLength"] == size_bytes
        and found.get("Metadata", {}).get(DIGEST) == sha256
        and (wanted is None or found.get("ServerSideEncryption") == wanted)
    )


def entry_of(name: str, key: str, answer: Mapping[str, Any], size_bytes: int, sha256: str | None) -> Entry:
    """Return how the pointer names an object that was just written or found."""
    version = answer.get("VersionId")
    return Entry(
        name=name,
        key=key,
        etag=answer["ETag"],
        version=None if version == "null" else version,
        size_bytes=size_bytes,
        sha256=sha256,
    )


def write_once(
    place: S3Place, operation: str, name: str, before: Any, size_bytes: int, sha256: str, **request: Any
) -> Entry:
    """Write an object under its canonical name, unless it is not what it was when this push began.

    Args:
        place: The prefix.
        operation: ``put_object`` or ``complete_multipart_upload``.
        name: Of the file.
        before: What `head` returned then.
        size_bytes: Of the file.
        sha256: Of the file.
        request: Arguments of the operation.
    Raises:
        StoreError: Somebody else has written it, or S3 refuses.
    """
    key = place.location.key(name)
    condition = {"IfNoneMatch": "*"} if before is None else {"IfMatch": before["ETag"]}
    answer = place.call(operation, allow=_CLASH, Key=key, **condition, **request)
    if answer is None:
        # The client asks again where an answer was lost on the way: then it was we who wrote it.
        answer = head(place, key)
        if not holds(answer, size_bytes, sha256, {}):
            raise somebody_else(place)
    return entry_of(name, name, answer, size_bytes, sha256)


def write_pointer(place: S3Place, pointer: Pointer, before: str | None, extra: Mapping[str, Any]) -> str:
    """Replace the pointer and return its ETag, unless it is not what it was.

    Args:
        place: The prefix.
        pointer: The new one.
        before: The ETag of the one that it replaces, None where there is none.
        extra: How it is encrypted.
    Raises:
        StoreError: Somebody else has replaced it, or S3 refuses.
    """
    condition = {"IfNoneMatch": "*"} if before is None else {"IfMatch": before}
    request = {"Key": place.location.key(POINTER_NAME), "Body": pointer.to_bytes(), "ContentType": "application/json"}
    answer = place.call("put_object", allow=_CLASH, ChecksumAlgorithm="SHA256", **condition, **request, **extra)
    if answer is not None:
        return str(answer["ETag"])
    found, etag = place.read_pointer()
    if found != pointer or etag is None:
        raise somebody_else(place)
    return etag


def check_conditions(place: S3Place, pointer: Pointer, extra: Mapping[str, Any]) -> None:
    """Check that the store refuses a write whose condition does not hold, by one that changes nothing.

    Raises:
        StoreError: It does not: two pushes could interleave.
    """
    request = {"Key": place.location.key(POINTER_NAME), "Body": pointer.to_bytes(), "ContentType": "application/json"}
    if place.call("put_object", allow=CHANGED, IfNoneMatch="*", **request, **extra) is not None:
        raise StoreError(
            f"{place.location} ignores the condition of a write: two pushes could mix there",
            hint="use a store that knows If-None-Match and If-Match, as S3, MinIO, Ceph and R2 do",
        )


def step_aside(
    place: S3Place, current: Save, touched: Collection[str], before: Mapping[str, Any], extra: Mapping[str, Any]
) -> Save:
    """Return the present version at keys that this push does not write.

    Objects whose versions the bucket keeps are there for good. Of others a copy is made, inside the store, if this
    push replaces or deletes them. One that something else than a push has replaced is lost already.

    Args:
        place: The prefix.
        current: The present version.
        touched: The names that this push replaces or deletes.
        before: What `head` returned for the canonical names when this push began.
        extra: How copies are encrypted.
    Raises:
        StoreError: Somebody else has replaced one of them, or S3 refuses.
    """
    entries = []
    for entry in current.entries:
        there = before.get(entry.name) if entry.key == entry.name else None
        lost = there is None or there["ETag"] != entry.etag
        if entry.version is not None or entry.name not in touched or lost:
            entries.append(entry)
            continue
        kept = f"{KEPT}{current.revision}/{entry.name}"
        key = place.location.key(kept)
        found = head(place, key)
        if not holds(found, entry.size_bytes, entry.sha256, extra):
            source = {"Key": place.location.key(entry.key)}
            place.copy(source, key, CopySourceIfMatch=entry.etag, ChecksumAlgorithm="SHA256", **extra)
            found = head(place, key)
        if found is None or found["ContentLength"] != entry.size_bytes:
            raise somebody_else(place)
        # The copy is unversioned like its source, or has a version of its own: either is named.
        entries.append(entry_of(entry.name, kept, found, entry.size_bytes, entry.sha256))
    return Save(revision=current.revision, entries=tuple(entries))


def remove_strays(place: S3Place, before: Mapping[str, Any]) -> list[str]:
    """Delete what earlier versions left under names that this one has not; return what could not be deleted.

    Args:
        place: The prefix.
        before: What `head` returned for each name when this push began.
    """
    left = []
    for name, found in before.items():
        if found is None:
            continue
        request = {"Key": place.location.key(name), "IfMatch": found["ETag"]}
        answer, code = place.ask("delete_object", allow=(*_DENIED, *CHANGED, *ABSENT), **request)
        if answer is None and code in _DENIED:
            left.append(name)
    return left


def clear_old(place: S3Place, mine: Pointer, uploads: Callable[[], Mapping[str, list[str]]]) -> list[str]:
    """Delete what nobody reads any more: copies of versions before the previous one, and parts of dead uploads.

    Returns:
        What could not be deleted, in words: the push is done, and this is no reason to say that it failed.
    """
    notes: list[str] = []
    try:
        _clear(place, mine, uploads, notes)
    except StoreError as error:
        notes.append(f"what is old was not cleared away: {error.message}")
    return notes


def _clear(place: S3Place, mine: Pointer, uploads: Callable[[], Mapping[str, list[str]]], notes: list[str]) -> None:
    for key, names in uploads().items():
        for upload_id in names:
            answer, code = place.ask(
                "abort_multipart_upload", allow=(*_DENIED, "NoSuchUpload", "404"), Key=key, UploadId=upload_id
            )
            if answer is None and code in _DENIED:
                notes.append(f"an unfinished upload of {key} could not be aborted: its parts cost storage")
    prefix = place.location.key(KEPT)
    keys = [one["Key"] for page in place.pages("list_objects_v2", Prefix=prefix) for one in page.get("Contents", ())]
    pointer, _ = place.read_pointer()
    if pointer != mine:
        # Somebody else is at work already, and knows better what is old.
        return
    kept = tuple(f"{prefix}{save.revision}/" for save in (pointer.current, pointer.previous) if save)
    old = [key for key in keys if not key.startswith(kept)]
    for start in range(0, len(old), _BATCH):
        objects = [{"Key": key} for key in old[start : start + _BATCH]]
        answer = place.call("delete_objects", allow=_DENIED, Delete={"Objects": objects, "Quiet": True})
        if answer is None or answer.get("Errors"):
            notes.append(f"earlier versions below {KEPT} could not be deleted")
            return
