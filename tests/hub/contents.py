"""Reading files: ``/{repo}/resolve/{revision}/{path}``, and the other host that large contents come from."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from .accounts import Gate
from .blobs import BLOCK_BYTES, Blobs
from .errors import HubError
from .paths import Parameters, endpoint, other_host

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return start and end (not included) of what is asked for, None for everything.

    More than one range, or what is no range, asks for everything, as HTTP allows (RFC 9110, sec. 14.2).

    Raises:
        HubError: 416, nothing of it is there.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size
        satisfiable = int(last) > 0 and size > 0
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
        satisfiable = start < size
    if not satisfiable:
        raise HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


class FileResponse(Response):
    """A file, or the range of it that was asked for, in large blocks."""

    def __init__(self, request: Request, path: Path, size: int, headers: dict[str, str]) -> None:
        asked = parse_range(request.headers.get("range"), size)
        if request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
            asked = None
        start, end = asked or (0, size)
        about = {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
        if asked is not None:
            about["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        super().__init__(status_code=200 if asked is None else 206, headers={**headers, **about})
        self._path, self._start, self._end = path, start, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] != "HEAD":
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                for offset in range(self._start, self._end, BLOCK_BYTES):
                    count = min(BLOCK_BYTES, self._end - offset)
                    block = await to_thread.run_sync(os.pread, descriptor, count, offset)
                    await send({"type": "http.response.body", "body": block, "more_body": True})
            finally:
                os.close(descriptor)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Contents:
    """The routes that serve files.

    Args:
        gate: Who may read what.
        blobs: The contents.
    """

    def __init__(self, gate: Gate, blobs: Blobs) -> None:
        self._gate = gate
        self._blobs = blobs

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve, methods=["GET", "HEAD"]),
            Route("/cdn/{sha256}", self.large, methods=["GET", "HEAD"]),
        ]

    async def resolve(self, request: Request) -> Response:
        """Answer a small file itself, and for a large one where it is."""
        values = Parameters(request)
        repo = self._gate.readable(request, values.repo)
        commit = repo.commit(values["revision"])
        headers = {"X-Repo-Commit": commit.id}
        entry = commit.files.get(values["path"])
        if entry is None:
            raise HubError(404, "Entry not found", code="EntryNotFound", headers=headers)
        name = quote(values["path"].rsplit("/", 1)[-1])
        headers |= {"ETag": f'"{entry.tag}"', "Content-Disposition": f"inline; filename*=UTF-8''{name}"}
        if not entry.lfs:
            headers["Content-Type"] = "text/plain; charset=utf-8"
            return FileResponse(request, self._blobs.path(entry.sha256), entry.size, headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size), "Accept-Ranges": "bytes"}
        if entry.xet is not None:
            token = f"{endpoint(request)}/api/models/{repo.name}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": entry.xet, "X-Xet-Refresh-Route": token, "Link": f'<{token}>; rel="xet-auth"'}
        # Another host name: clients follow a redirect within one host, and would look for the headers above there.
        headers["Location"] = other_host(request) + self._gate.sign(f"/cdn/{entry.sha256}", size=entry.size)
        return Response(b"Found. Redirecting", status_code=302, headers=headers)

    async def large(self, request: Request) -> Response:
        """Serve a large content to whoever has a link."""
        values = self._gate.check_link(request)
        sha256 = request.path_params["sha256"]
        headers = {"ETag": f'"{sha256}"', "Content-Type": "application/octet-stream"}
        return FileResponse(request, self._blobs.path(sha256), int(values["size"]), headers)
