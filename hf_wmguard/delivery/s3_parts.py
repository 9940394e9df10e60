"""Big files on their way into S3, in parts of which nobody sees anything until all of them are there.

An upload that was interrupted is found again, and goes on: a part that lies there already is believed if it has the
size and the digest of the local bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hf_wmguard.delivery.parcel import Stamp, stamp
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
    stamp: Stamp | None
    part_bytes: int
    upload_id: str = ""
    there: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    reused_bytes: int = 0


def part_size(size_bytes: int, least: int = PART_BYTES) -> int:
    """Return the bytes of a part of a file: the same for the same file, so that its parts are found again."""
    return max(least, -(-size_bytes // (_MAX_PARTS * _MIB)) * _MIB)


def encoded_sha256(data: bytearray) -> str:
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
    for upload_id in candidates:
        there = {
            part["PartNumber"]: part
            for page in place.pages("list_parts", Key=upload.key, UploadId=upload_id)
            if page.get("ChecksumAlgorithm", "SHA256") == "SHA256"
            for part in page.get("Parts", ())
        }
        # The first part tells another save's upload from ours, and so do we from somebody who is still sending it.
        if 1 in there and _is_same(there[1], _first_part(upload)):
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
    sending = _Sending(place, threads, progress)
    with ThreadPoolExecutor(threads, thread_name_prefix="wmguard-s3") as pool:
        try:
            for upload in uploads:
                sending.send(pool, upload)
            while sending.waiting:
                sending.collect(wait(sending.waiting, return_when=FIRST_COMPLETED).done)
        except OSError as error:
            raise NotFoundError(f"cannot read a file to send: {error.strerror}", hint="check the disk") from None
        finally:
            for task in sending.waiting:
                task.cancel()


class _Sending:
    """Parts on their way: so many at once, in buffers that are used again."""

    def __init__(self, place: S3Place, threads: int, progress: Progress | None) -> None:
        self._place, self._progress = place, progress
        self.waiting: dict[Future[int], Upload] = {}
        self._buffers: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(threads + 1):
            self._buffers.put(bytearray())

    def send(self, pool: ThreadPoolExecutor, upload: Upload) -> None:
        """Hand all parts of a file to the threads, and check that together they are what was signed."""
        with upload.path.open("rb", buffering=0) as file:
            # A file that nobody touched since it was checked, nor while it is read, is hashed by its parts only.
            whole = None if upload.stamp == stamp(file.fileno()) else hashlib.sha256()
            is_whole = True
            for number in range(1, -(-upload.size_bytes // upload.part_bytes) + 1):
                # What is hashed is what is sent, whatever happens to the file meanwhile.
                data = _read_part(file, upload, number, self._buffers.get())
                if data is None:
                    is_whole = False
                    break
                task = pool.submit(self._send_part, upload, number, data)
                self.waiting[task] = upload
                if whole is not None:
                    whole.update(data)
                self.collect([task for task in self.waiting if task.done()])
            if whole is None:
                is_whole = is_whole and upload.stamp == stamp(file.fileno())
            else:
                is_whole = is_whole and whole.hexdigest() == upload.sha256
        if not is_whole:
            wait(self.waiting)
            self._place.call("abort_multipart_upload", allow=GONE, Key=upload.key, UploadId=upload.upload_id)
            raise changed(upload.name)

    def _send_part(self, upload: Upload, number: int, data: bytearray) -> int:
        try:
            return _send(self._place, upload, number, data)
        finally:
            self._buffers.put(data)

    def collect(self, done: Collection[Future[int]]) -> None:
        """Raise what went wrong in a thread, and tell what went well."""
        for task in done:
            upload = self.waiting.pop(task)
            size_bytes = task.result()
            if self._progress is not None:
                self._progress(upload.name, size_bytes)


def changed(name: str) -> ManifestError:
    """Return the error for a file that changed while it was sent."""
    return ManifestError(
        f"{name} was changed while it was being sent: nothing of this push is seen by readers",
        hint="wait until whatever writes there is done, then push again",
    )


def _send(place: S3Place, upload: Upload, number: int, data: bytearray) -> int:
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


def _is_same(part: Mapping[str, Any], data: bytearray | None, digest: str | None = None) -> bool:
    if data is None or part.get("Size") != len(data):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == (digest or encoded_sha256(data)))
    # Stores that keep no checksum of a part: its ETag is the MD5, unless they encrypt, and then nothing is equal.
    return str(part.get("ETag", "")).strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()


def _first_part(upload: Upload) -> bytearray | None:
    try:
        with upload.path.open("rb", buffering=0) as file:
            return _read_part(file, upload, 1, bytearray())
    except OSError as error:
        raise NotFoundError(f"cannot read {upload.path}: {error.strerror}", hint="check its permissions") from None


def _read_part(file: FileIO, upload: Upload, number: int, buffer: bytearray) -> bytearray | None:
    """Return a buffer filled with a part of a file, the same one if it has the size; None where the file is shorter."""
    size_bytes = min(upload.part_bytes, upload.size_bytes - (number - 1) * upload.part_bytes)
    if len(buffer) != size_bytes:
        buffer = bytearray(size_bytes)
    view, done = memoryview(buffer), 0
    while done < size_bytes:
        got = file.readinto(view[done:])
        if not got:
            return None
        done += got
    return buffer
