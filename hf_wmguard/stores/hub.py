"""Read one commit of a Hub repo: its files, and ranges of their bytes, without a download and without a cache."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from hf_wmguard.errors import NotFoundError, StoreError
from hf_wmguard.stores.hub_errors import TRANSPORT_ERRORS, hub_errors, of_status
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.store import StoredFile

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
MAX_FILES = 100_000
_TRIES = 5
_PAUSE_S = 0.5
_BLOCK_BYTES = 1 << 20
_ASK = "do not trust this server; check HF_ENDPOINT and proxies"
_PARTIAL, _OK = 206, 200
# A signed address of a file's storage that is no longer valid.
_EXPIRED = (401, 403, 404, 410)


class HubStore:
    """One commit of a Hub repo, or of a folder in it, as a `Store`.

    The client's own settings hold: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT. Nothing is cached on
    disk.

    Args:
        location: The repo; a branch or tag is looked up once, and everything is read from the commit it names then.
    Raises:
        NotFoundError: No such repo or revision, or none that the token may see.
        StoreError: The Hub refuses, does not answer, or answers nonsense.
    """

    def __init__(self, location: Location) -> None:
        with hub_errors(str(location)):
            info = HfApi().model_info(location.root, revision=location.revision, files_metadata=True)
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise StoreError(f"{location} names no commit", hint="check HF_ENDPOINT: this is not the Hub's protocol")
        self.location = location.at(info.sha)
        self._files = MappingProxyType(_files(info.siblings or [], self.location))
        # Where the bytes of a file are, once the Hub has said so; several ranges need not ask again.
        self._stored_at: dict[str, str] = {}
        self._lock = threading.Lock()

    def files(self) -> Mapping[str, StoredFile]:
        """Return every file of this commit below the location."""
        return self._files

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from an offset of a file; errors as `Store.read_into`.

        A connection that is cut is taken up again where it was.
        """
        if name not in self._files:
            raise NotFoundError(f"{self.location} has no file {name!r}", hint="see what it holds on its page")
        where = f"{self.location}: {name}"
        failed = 0
        while buffer:
            before = offset
            with hub_errors(where):
                offset, buffer = self._read_some(name, offset, buffer, where)
            # What goes on, however slowly, is not given up.
            failed = failed + 1 if offset == before else 0
            if failed == _TRIES:
                raise StoreError(
                    f"{where}: the connection is cut again and again",
                    hint="check the network, and run the same command again",
                )

    def _read_some(self, name: str, offset: int, buffer: memoryview, where: str) -> tuple[int, memoryview]:
        """Return what is left to read after one answer.

        Raises:
            StoreError: The answer is not the bytes that were asked for.
        """
        known = self._stored_at.get(name)
        url = known or hf_hub_url(self.location.root, self.location.key(name), revision=self.location.revision)
        # To where the Hub has sent us goes no token; the HTTP client drops it on the way there, too.
        headers = {} if known else build_hf_headers()
        headers |= {"Range": f"bytes={offset}-{offset + len(buffer) - 1}", "Accept-Encoding": "identity"}
        broken = None
        with http_stream_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            if known and answer.status_code in _EXPIRED:
                with self._lock:
                    self._stored_at.pop(name, None)
                return offset, buffer
            if answer.status_code >= 400:
                answer.read()
                hf_raise_for_status(answer)
            self._check(answer, offset, len(buffer), self._files[name].size_bytes, where)
            try:
                for block in answer.iter_raw(_BLOCK_BYTES):
                    if len(block) > len(buffer):
                        raise StoreError(f"{where}: more bytes than were asked for", hint="do not trust this server")
                    buffer[: len(block)] = block
                    offset, buffer = offset + len(block), buffer[len(block) :]
            except TRANSPORT_ERRORS as error:
                # Raised only outside: in here the client would take it for its own and ask again.
                broken = error
            if answer.history and str(answer.url) != url:
                with self._lock:
                    self._stored_at[name] = str(answer.url)
        if broken is not None and buffer:
            time.sleep(_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311
        return offset, buffer

    def _check(self, answer: Any, offset: int, count: int, size_bytes: int, where: str) -> None:
        if answer.url.scheme != "https" and constants.ENDPOINT.startswith("https"):
            raise StoreError(f"{where}: the Hub sends us to {answer.url.scheme}, which anybody can change", hint=_ASK)
        for one in (*answer.history, answer):
            commit = one.headers.get("X-Repo-Commit")
            if commit is not None and commit != self.location.revision:
                raise StoreError(f"{where}: the answer is of commit {commit[:60]!r}", hint=_ASK)
        if answer.status_code == _OK:
            # What it would send is the file from its begin: as good where that is what we want.
            if (offset, count) == (0, size_bytes):
                return
            raise StoreError(
                f"{where}: asked for a part, the server sends the whole file",
                hint="download it (hf download), and judge the folder",
            )
        if answer.status_code != _PARTIAL:
            raise of_status(where, answer.status_code)
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        expected = (offset, offset + count - 1, size_bytes)
        if found is None or tuple(map(int, found.groups())) != expected or "Content-Encoding" in answer.headers:
            raise StoreError(
                f"{where}: asked for bytes {offset} to {offset + count} of {size_bytes}, "
                f"got {answer.headers.get('Content-Range', 'no Content-Range')[:60]!r}",
                hint=_ASK,
            )

    def close(self) -> None:
        """Do nothing: the client keeps its connections for whoever comes next."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HubStore({str(self.location)!r})"


def _files(siblings: list[Any], location: Location) -> dict[str, StoredFile]:
    """Return the files below a location, by their names relative to it."""
    if len(siblings) > MAX_FILES:
        raise StoreError(f"{location} has {len(siblings)} files", hint=f"at most {MAX_FILES} are looked at")
    folder = f"{location.path}/" if location.path else ""
    found = {}
    for one in siblings:
        if not one.rfilename.startswith(folder):
            continue
        size_bytes = one.size
        if type(size_bytes) is not int or size_bytes < 0:
            raise StoreError(f"{location}: the Hub gives no size of {one.rfilename!r}", hint=_ASK)
        digest = one.lfs.sha256 if one.lfs is not None else None
        sha256 = digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None
        found[one.rfilename.removeprefix(folder)] = StoredFile(
            size_bytes=size_bytes, tag=str(sha256 or one.blob_id), sha256=sha256
        )
    if not found:
        raise NotFoundError(f"{location} holds no files", hint="check the revision, and the folder in the repo")
    return found
