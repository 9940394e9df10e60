"""Big files on their way into S3, in parts of which nobody sees anything until all of them are there.

An upload that was interrupted is found again, and goes on: a part that lies there already is believed if it has the
size and the digest of the local bytes.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_wmguard.errors import ManifestError, NotFoundError
from hf_wmguard.stores.s3 import S3Place

PART_BYTES = 16 << 20
MIN_PART_BYTES = 5 << 20
_MAX_PARTS = 10_000
_MIB = 1 << 20
GONE = ("NoSuchUpload", "404")
Progress = Callable[[str, int], None]


@dataclass(kw_only=True, slots=True)
class Upload:
    """One file that is sent in parts: where from, where to, and what is there so far."""

    name: str
    path: Path
    key: str
    size_bytes: int
    sha256: str
    part_bytes: int
    upload_id: str = ""
    there: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    reused_bytes: int = 0


def part_size(size_bytes: int, least: int = PART_BYTES) -> int:
    """Return the bytes of a part of a file: the same for the same file, so that its parts are found again."""
    return max(least, -(-size_bytes // (_MAX_PARTS * _MIB)) * _MIB)


def encoded_sha256(data: bytes) -> str:
    """Return a digest as S3 writes it."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def unfinished(place: S3Place, prefix: str) -> dict[str, list[str]]:
    """Return the ids of unfinished uploads below a prefix, by key, the newest first."""
    found: dict[str, list[tuple[Any, str]]] = {}
    for page in place.pages("list_multipart_uploads", Prefix=prefix):
        for one in page.get("Uploads", ()):
            found.setdefault(one["Key"], []).append((one["Initiated"], one["UploadId"]))
    return {key: [name for _, name in sorted(uploads, reverse=True)] for key, uploads in found.items()}


def begin(place: S3Place, upload: Upload, candidates: Iterable[str], extra: Mapping[str, Any]) -> None:
    """Go on with an unfinished upload of the same bytes, or start one."""
    first = _read(upload.path, upload.part_bytes)
    for upload_id in candidates:
        there = {
            part["PartNumber"]: part
            for page in place.pages("list_parts", Key=upload.key, UploadId=upload_id)
            if page.get("ChecksumAlgorithm", "SHA256") == "SHA256"
            for part in page.get("Parts", ())
        }
        # The first part tells another save's upload from ours, and so do we from somebody who is still sending it.
        if 1 in there and _is_same(there[1], first):
            upload.upload_id, upload.there = upload_id, there
            return
    answer = place.call("create_multipart_upload", Key=upload.key, ChecksumAlgorithm="SHA256", **extra)
    upload.upload_id = answer["UploadId"]


def send_all(place: S3Place, uploads: Iterable[Upload], *, threads: int, progress: Progress | None) -> None:
    """Send every part that is not there yet.

    Raises:
        ManifestError: A file is not what it was when it was checked; its parts are thrown away.
        StoreError: S3 refuses or does not answer. What is there stays, for the next time.
    """
    room = threading.Semaphore(threads + 2)
    with ThreadPoolExecutor(threads, thread_name_prefix="wmguard-s3") as pool:
        waiting: dict[Future[int], Upload] = {}
        try:
            for upload in uploads:
                whole, number = hashlib.sha256(), 0
                with upload.path.open("rb", buffering=0) as file:
                    while data := _read_up_to(file, upload.part_bytes):
                        number += 1
                        # What is hashed is what is sent, whatever happens to the file meanwhile.
                        room.acquire()
                        task = pool.submit(_send, place, upload, number, data)
                        task.add_done_callback(lambda _: room.release())
                        waiting[task] = upload
                        whole.update(data)
                        _collect(waiting, progress, [task for task in waiting if task.done()])
                if whole.hexdigest() != upload.sha256:
                    wait(waiting)
                    place.call("abort_multipart_upload", allow=GONE, Key=upload.key, UploadId=upload.upload_id)
                    raise changed(upload.name)
            while waiting:
                _collect(waiting, progress, wait(waiting, return_when=FIRST_COMPLETED).done)
        except OSError as error:
            raise NotFoundError(f"cannot read a file to send: {error.strerror}", hint="check the disk") from None
        finally:
            for task in waiting:
                task.cancel()


def changed(name: str) -> ManifestError:
    """Return the error for a file that changed while it was sent."""
    return ManifestError(
        f"{name} was changed while it was being sent: nothing of this push is seen by readers",
        hint="wait until whatever writes there is done, then push again",
    )


def _collect(waiting: dict[Future[int], Upload], progress: Progress | None, done: Collection[Future[int]]) -> None:
    for task in done:
        upload = waiting.pop(task)
        size_bytes = task.result()
        if progress is not None:
            progress(upload.name, size_bytes)


def _send(place: S3Place, upload: Upload, number: int, data: bytes) -> int:
    digest, there = encoded_sha256(data), upload.there.get(number)
    if there is not None and _is_same(there, data, digest):
        upload.reused_bytes += len(data)
        upload.parts[number] = {"PartNumber": number, "ETag": there["ETag"], "ChecksumSHA256": digest}
        return len(data)
    answer = place.call(
        "upload_part",
        Key=upload.key,
        UploadId=upload.upload_id,
        PartNumber=number,
        Body=data,
        ChecksumSHA256=digest,
    )
    upload.parts[number] = {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": digest}
    return len(data)


def _is_same(part: Mapping[str, Any], data: bytes, digest: str | None = None) -> bool:
    if part.get("Size") != len(data):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == (digest or encoded_sha256(data)))
    # Stores that keep no checksum of a part: its ETag is the MD5, unless they encrypt, and then nothing is equal.
    return str(part.get("ETag", "")).strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()


def _read(path: Path, size_bytes: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            return _read_up_to(file, size_bytes)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from None


def _read_up_to(file: Any, size_bytes: int) -> bytes:
    data: bytes = file.read(size_bytes)
    while data and len(data) < size_bytes and (more := file.read(size_bytes - len(data))):
        data += more
    return data
