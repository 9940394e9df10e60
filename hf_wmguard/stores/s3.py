"""S3 and what speaks like it, by boto3: one version of a folder under a prefix, and any range of its bytes.

Credentials, profile, region and endpoint are boto3's own (``AWS_PROFILE``, ``AWS_REGION``, ``AWS_ENDPOINT_URL_S3``,
shared files, instance roles), unless `S3Options` say otherwise.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from hf_wmguard.errors import ConfigError, MissingDependencyError, NotFoundError, StoreError
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.names import is_safe_name
from hf_wmguard.stores.s3_errors import code_of, failure, refusal, retry_after_s
from hf_wmguard.stores.s3_pointer import KEPT, MAX_POINTER_BYTES, POINTER_NAME, Entry, Pointer
from hf_wmguard.stores.store import StoredFile

MAX_OBJECTS = 10_000
MAX_THREADS = 16
MAX_WAIT_S = 60.0
ABSENT = ("NoSuchKey", "404", "NoSuchVersion")
CHANGED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "OperationAborted")
_PATIENCE = 4
_RANGE = re.compile(r"bytes (\d{1,16})-(\d{1,16})/(\d{1,16})")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """How S3 is asked, where boto3's own settings are not enough.

    Args:
        endpoint_url: Of an S3-compatible store.
        region: Of the bucket.
        profile: In the shared files of AWS.
        attempts: How often a request is made in all, 1 to 20.
        timeout_s: To connect, and until the next bytes of an answer, 0.1 to 3600.
    Raises:
        ConfigError: A value outside these bounds.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    attempts: int = 5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 20:
            raise ConfigError(f"S3 attempts: {self.attempts}", hint="1 to 20")
        if not 0.1 <= self.timeout_s <= 3600:
            raise ConfigError(f"S3 timeout_s: {self.timeout_s}", hint="0.1 to 3600 seconds")


def s3_client(options: S3Options | None = None, *, service: str = "s3") -> Any:
    """Return a client of boto3 that several threads may share.

    Args:
        options: How S3 is asked.
        service: Another of AWS, asked in the same way.
    Raises:
        MissingDependencyError: boto3 is not installed.
        StoreError: There are no credentials to be had.
        ConfigError: A profile, region or endpoint that cannot be.
    """
    options = options or S3Options()
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise MissingDependencyError("S3 needs boto3", hint="run pip install 'hf-wmguard[s3]'") from None
    config = Config(
        connect_timeout=min(options.timeout_s, 20.0),
        read_timeout=options.timeout_s,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        max_pool_connections=MAX_THREADS + 4,
        # Digests of a whole folder are signed in its manifest, and checked there.
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(profile_name=options.profile)
        # boto3 itself reads AWS_DEFAULT_REGION only; every other tool of AWS reads both.
        region = options.region or os.environ.get("AWS_REGION") or session.region_name
        settings = {"region_name": region, "endpoint_url": options.endpoint_url}
        by_path = config.merge(Config(s3={"addressing_style": "path"}))
        told = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        # Bucket names before the host need DNS names, which an address and this machine do not have.
        is_local = service == "s3" and told is not None and _has_no_subdomains(told)
        client = session.client(service, config=by_path if is_local else config, **settings)
        if service == "s3" and not is_local and _has_no_subdomains(client.meta.endpoint_url):
            # The endpoint stands in a shared file.
            client.close()
            client = session.client(service, config=by_path, **settings)
    except BotoCoreError as error:
        raise failure("S3", error) from None
    except ValueError:
        raise ConfigError("S3: the endpoint is not an address", hint="write https://host or http://host:port") from None
    return client


def _has_no_subdomains(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if "." not in host:
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class S3Place:
    """A prefix in a bucket, and requests about it whose errors are ours."""

    def __init__(self, location: Location, options: S3Options | None = None) -> None:
        self.location, self.bucket, self.options = location, location.root, options or S3Options()
        self.client = s3_client(self.options)
        from botocore.exceptions import BotoCoreError, ClientError

        self.cut = (BotoCoreError, OSError)
        """What reading an answer raises when the connection is cut."""
        self._refused, self._failed = ClientError, BotoCoreError

    def call(self, operation: str, *, allow: Collection[str] = (), **request: Any) -> Any:
        """Return S3's parsed answer, or None where it is an error whose code is among ``allow``.

        Args:
            operation: A method of the client.
            allow: Codes of errors that are an answer to this question.
            request: Its arguments; the bucket is added.
        Raises:
            StoreError: S3 refuses, does not answer, or is busy for longer than is waited.
            NotFoundError: No such bucket, or no such object.
        """
        return self.ask(operation, allow=allow, **request)[0]

    def ask(self, operation: str, *, allow: Collection[str], **request: Any) -> tuple[Any, str]:
        """Return as `call`, and the code of the error where the answer is None, else an empty one."""
        method = getattr(self.client, operation)
        for attempt in range(_PATIENCE):
            try:
                return method(Bucket=self.bucket, **request), ""
            except self._refused as error:
                response: Mapping[str, Any] = error.response
                for code in (code_of(response), str(response.get("Error", {}).get("Code"))):
                    if code in allow:
                        return None, code
                # The client has tried again already; but it does not wait as long as it is asked to.
                wait_s = retry_after_s(response, MAX_WAIT_S)
                if wait_s is None or attempt == _PATIENCE - 1:
                    raise refusal(self._where(request), error.operation_name, response) from None
                time.sleep(wait_s)
            except (self._failed, RecursionError) as error:
                # The client asks again in the region that a redirection names, and again, where none is named: until
                # the stack ends, which it may report as a failure of its own.
                if isinstance(getattr(error, "kwargs", {}).get("error", error), RecursionError):
                    raise StoreError(
                        f"{self._where(request)} redirects without saying where the bucket is",
                        hint="check AWS_REGION and AWS_ENDPOINT_URL_S3: https and not http, and no other server",
                    ) from None
                raise failure(self._where(request), error) from None
        raise StoreError(f"{self.location} was not asked", hint="this is a mistake in hf-wmguard: report it")

    def pages(self, operation: str, **request: Any) -> Iterator[Any]:
        """Yield every page of a list; errors as `call`."""
        try:
            yield from self.client.get_paginator(operation).paginate(Bucket=self.bucket, **request)
        except self._refused as error:
            raise refusal(str(self.location), error.operation_name, error.response) from None
        except self._failed as error:
            raise failure(str(self.location), error) from None

    def copy(self, source: Mapping[str, Any], key: str, **extra: Any) -> None:
        """Copy an object within the store, of any size, errors as `call`; nothing passes through this machine."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=4 << 30, multipart_chunksize=256 << 20, max_concurrency=MAX_THREADS)
        try:
            self.client.copy({"Bucket": self.bucket, **source}, self.bucket, key, ExtraArgs=extra, Config=config)
        except self._refused as error:
            raise refusal(str(self.location), "CopyObject", error.response) from None
        except self._failed as error:
            raise failure(str(self.location), error) from None

    def read_pointer(self) -> tuple[Pointer | None, str | None]:
        """Return the pointer and its ETag; two times None where there is none.

        Raises:
            FormatError: Something else is in its place.
        """
        answer = self.call("get_object", allow=ABSENT, Key=self.location.key(POINTER_NAME))
        if answer is None:
            return None, None
        try:
            with closing(answer["Body"]) as body:
                data = body.read(MAX_POINTER_BYTES + 1)
        except self.cut as error:
            raise failure(str(self.location), error) from None
        return Pointer.from_bytes(data), str(answer["ETag"])

    def close(self) -> None:
        """Let go of connections."""
        self.client.close()

    def _where(self, request: Mapping[str, Any]) -> str:
        return f"s3://{self.bucket}/{request['Key']}" if "Key" in request else f"s3://{self.bucket}"


class S3Store:
    """A folder in S3, at the version that its pointer names when it is opened; a `Store`.

    Where there is no pointer, as in a folder that was not pushed by us, it is the objects as they are now, each only as
    long as nobody replaces it.

    Args:
        location: Bucket and prefix.
        options: How S3 is asked.
    Raises:
        NotFoundError: No such bucket, or nothing is there.
        StoreError: S3 refuses or does not answer.
        FormatError: The pointer is damaged.
        MissingDependencyError: boto3 is not installed.
    """

    def __init__(self, location: Location, *, options: S3Options | None = None) -> None:
        self.location = location
        self._place = S3Place(location, options)
        self._lock = threading.Lock()
        try:
            pointer, _ = self._place.read_pointer()
            if pointer is not None and pointer.current is None:
                raise NotFoundError(
                    f"nothing is at {location} yet: its first push is not done",
                    hint="wait for it; if it was interrupted, push again",
                )
            self.revision = pointer.current.revision if pointer and pointer.current else None
            """The version that is read, None where there is no pointer."""
            self._entries = pointer.current.files() if pointer and pointer.current else listed(self._place)
        except BaseException:
            self._place.close()
            raise
        self._files = {
            name: StoredFile(size_bytes=entry.size_bytes, tag=entry.etag, sha256=entry.sha256)
            for name, entry in self._entries.items()
        }

    def files(self) -> Mapping[str, StoredFile]:
        """Return every file, by its name relative to the prefix."""
        return self._files

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from an offset of a file; see `Store.read_into`."""
        stored = self._files.get(name)
        if stored is None:
            raise NotFoundError(f"{self.location} has no file {name}", hint="check the name")
        view, done, attempt = buffer.cast("B"), 0, 0
        if not 0 <= offset <= offset + len(view) <= stored.size_bytes:
            raise StoreError(
                f"{name} in {self.location} has {stored.size_bytes} bytes, asked for {offset} to {offset + len(view)}",
                hint="the file is shorter than its header says: get it again",
            )
        while done < len(view):
            got, error = self._read_some(name, offset + done, view[done:])
            done, attempt = done + got, 0 if got else attempt + 1
            if error is not None and attempt >= self._place.options.attempts:
                raise failure(f"{self.location}: {name}", error) from None
            if error is not None:
                time.sleep(min(0.1 * 2**attempt, 5.0))

    def _read_some(self, name: str, offset: int, view: memoryview) -> tuple[int, BaseException | None]:
        """Return how many bytes arrived, and what cut them off."""
        answer = self._open(name, offset, offset + len(view) - 1)
        size_bytes, done = self._files[name].size_bytes, 0
        with closing(answer["Body"]) as body:
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            match = _RANGE.fullmatch(answer.get("ContentRange", ""))
            expected = (offset, offset + len(view) - 1, size_bytes)
            if status != 206 or match is None or tuple(map(int, match.groups())) != expected:
                raise StoreError(
                    f"{self.location} answers a range of {name} with other bytes (status {status})",
                    hint="this store or a proxy before it does not do ranges: download the folder instead",
                )
            if answer["ContentLength"] != len(view):
                raise StoreError(
                    f"{self.location} sends {answer['ContentLength']} bytes of {name}, expected {len(view)}",
                    hint="look for a proxy between here and the store",
                )
            try:
                while done < len(view):
                    got = body.readinto(view[done:])
                    if not got:
                        raise EOFError
                    done += got
            except (*self._place.cut, EOFError) as error:
                return done, error
        return done, None

    def _open(self, name: str, first: int, last: int) -> Any:
        for _ in range(3):
            entry = self._entries[name]
            version = {"VersionId": entry.version} if entry.version else {}
            answer = self._place.call(
                "get_object",
                allow=(*ABSENT, *CHANGED),
                Key=self.location.key(entry.key),
                Range=f"bytes={first}-{last}",
                IfMatch=entry.etag,
                **version,
            )
            if answer is not None:
                return answer
            if not self._follow(name, entry):
                break
        raise StoreError(
            f"{name} in {self.location} was replaced or deleted meanwhile",
            hint="open the folder again: what is read is one version, never parts of two",
        )

    def _follow(self, name: str, lost: Entry) -> bool:
        """Return whether this version is somewhere else now: a push moves the one before it out of its way."""
        with self._lock:
            if self._entries[name] != lost:
                return True
            pointer, _ = self._place.read_pointer() if self.revision else (None, None)
            for save in (pointer.current, pointer.previous) if pointer else ():
                moved = save.files() if save and save.revision == self.revision else {}
                if name in moved and moved[name] != lost:
                    self._entries = moved
                    return True
            return False

    def close(self) -> None:
        """Let go of connections."""
        self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def listed(place: S3Place) -> dict[str, Entry]:
    """Return the objects below a prefix as they are now, by name, for a folder that has no pointer.

    Raises:
        NotFoundError: There is none.
        StoreError: There are more than a model's folder has, or S3 refuses.
    """
    prefix = place.location.key("")
    found: dict[str, Entry] = {}
    for page in place.pages("list_objects_v2", Prefix=prefix):
        for one in page.get("Contents", ()):
            name = one["Key"].removeprefix(prefix)
            # Consoles make objects for folders. A name that leads elsewhere is no file of a model.
            if name.startswith(KEPT) or name == POINTER_NAME or not is_safe_name(name):
                continue
            found[name] = Entry(
                name=name, key=name, etag=one["ETag"], version=None, size_bytes=one["Size"], sha256=None
            )
        if len(found) > MAX_OBJECTS:
            raise StoreError(f"{place.location} has more than {MAX_OBJECTS} objects", hint="write a longer prefix")
    if not found:
        raise NotFoundError(f"nothing is at {place.location}", hint="check the address and the endpoint")
    return found
