"""Xet: tokens from the Hub, and the storage (CAS) that takes xorbs and shards, and says what files are made of.

Clients of today first ask for newer ways to send a xorb (a grant) and to read a file (v2); the storage answers 404, and
they fall back to the ways that are here.

Source: https://huggingface.co/docs/xet/api
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .accounts import Gate
from .blobs import write_json
from .contents import FileResponse, parse_range
from .errors import HubError
from .paths import Parameters, endpoint, other_host
from .storage import Repo, Storage
from .traffic import Traffic
from .uploads import receive_into
from .xorb import Chunk, ShardFile, Term, XetFormatError, read_chunks, read_shard, unpack_chunk

_HASH = re.compile(r"[0-9a-f]{64}")
_BLOCK_BYTES = 1 << 20


class Xet:
    """The routes of Xet.

    Args:
        storage: The repos; what is sent by Xet becomes an ordinary content too, for those who read without it.
        gate: Who may do what.
        traffic: Where the contents of xorbs are recorded: they are sent packed.
    """

    def __init__(self, storage: Storage, gate: Gate, traffic: Traffic) -> None:
        self._storage = storage
        self._gate = gate
        self._traffic = traffic
        self._folder = storage.folder / "xet"
        for name in ("xorbs", "files"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self._chunks = functools.lru_cache(maxsize=256)(read_chunks)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        model = "/api/models/{owner}/{name}"
        return [
            Route(model + "/xet-read-token/{revision}", self.read_token),
            Route(model + "/xet-write-token/{revision}", self.write_token),
            Route("/xet/v1/xorbs/default/{hash}", self.put_xorb, methods=["POST"]),
            Route("/xet/v1/shards", self.put_shard, methods=["POST"]),
            Route("/xet/v1/reconstructions/{hash}", self.reconstruction),
            Route("/xorbs/{hash}", self.get_xorb),
        ]

    async def read_token(self, request: Request) -> Response:
        """Give a token with which this repo's files are read."""
        return self._token(request, self._gate.readable(request, Parameters(request).repo), "read")

    async def write_token(self, request: Request) -> Response:
        """Give a token with which files of this repo are sent."""
        return self._token(request, self._gate.writable(request, Parameters(request).repo), "write")

    def _token(self, request: Request, repo: Repo, scope: str) -> Response:
        token, expires = self._gate.sign(f"xet/{scope}/{repo.name}"), int(time.time()) + 3000
        url = f"{other_host(request)}/xet"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"accessToken": token, "exp": expires, "casUrl": url}, headers=headers)

    def _repo(self, request: Request, *, write: bool) -> Repo:
        """Return the repo a token is for.

        Raises:
            HubError: 401, it is no token of this storage; 403, it may only read.
        """
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        path = self._gate.check_signed(token)
        if not path.startswith(("xet/read/", "xet/write/")):
            raise HubError(401, "Not a token of this storage")
        if write and not path.startswith("xet/write/"):
            raise HubError(403, "The token may only read")
        repo = self._storage.repo(path.split("/", 2)[2])
        if repo is None:
            raise HubError(404, "Repository not found", code="RepoNotFound")
        return repo

    async def put_xorb(self, request: Request) -> Response:
        """Take a xorb."""
        self._repo(request, write=True)
        path = self._path("xorbs", request)
        known = path.is_file()
        scratch = self._storage.blobs.scratch_file()
        try:
            with scratch.open("wb") as file:
                await receive_into(request, file.write)
            chunks = await to_thread.run_sync(read_chunks, scratch)
            await to_thread.run_sync(self._record, scratch, path.name, chunks)
            scratch.replace(path)
        except XetFormatError as error:
            raise HubError(400, f"Not a xorb: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)
        return JSONResponse({"was_inserted": not known})

    def _record(self, xorb: Path, name: str, chunks: list[Chunk]) -> None:
        def blocks() -> Iterator[bytes]:
            with xorb.open("rb") as file:
                for chunk in chunks:
                    yield unpack_chunk(file, chunk)

        if any(chunk.scheme for chunk in chunks):
            self._traffic.keep_decoded(f"xorb-{name}", blocks())

    async def put_shard(self, request: Request) -> Response:
        """Take a shard: its files are put together, and belong to the repo of the token from now on."""
        repo = self._repo(request, write=True)
        body = await request.body()
        try:
            for file in read_shard(body):
                await to_thread.run_sync(self._assemble, repo, file)
        except XetFormatError as error:
            raise HubError(400, f"Not a shard, or not of xorbs that are here: {error}") from error
        return JSONResponse({"result": 1})

    def _assemble(self, repo: Repo, file: ShardFile) -> None:
        with self._storage.blobs.writer() as writer:
            for block in _gather(self._unpacked(file.terms)):
                writer.write(block)
            if file.sha256 not in (None, writer.sha256):
                raise XetFormatError(f"the file is of SHA-256 {writer.sha256}, not {file.sha256}")
            sha256 = writer.keep()
        terms = [asdict(term) for term in file.terms]
        write_json(self._folder / "files" / file.name, {"terms": terms, "size": writer.size})
        repo.add_large(sha256, file.name)

    def _unpacked(self, terms: Iterable[Term]) -> Iterator[bytes]:
        for term in terms:
            path = self._folder / "xorbs" / term.xorb
            chunks = self._run(term)
            if sum(chunk.size for chunk in chunks) != term.size:
                raise XetFormatError("a term is not of the size it says")
            with path.open("rb") as file:
                for chunk in chunks:
                    yield unpack_chunk(file, chunk)

    def _run(self, term: Term) -> list[Chunk]:
        path = self._folder / "xorbs" / term.xorb
        if not path.is_file():
            raise XetFormatError(f"no such xorb: {term.xorb}")
        chunks = self._chunks(path)[term.start : term.end]
        if len(chunks) != term.end - term.start:
            raise XetFormatError("a term is of chunks the xorb does not have")
        return chunks

    async def reconstruction(self, request: Request) -> Response:
        """Say what a file, or a range of it, is made of, and where that is."""
        repo = self._repo(request, write=False)
        path = self._path("files", request)
        if not path.is_file() or not repo.has_xet(path.name):
            raise HubError(404, "File not found")
        about = json.loads(path.read_text())
        start, end = parse_range(request.headers.get("range"), about["size"]) or (0, about["size"])
        terms: list[dict[str, Any]] = []
        places: dict[str, list[dict[str, Any]]] = {}
        skipped, position = 0, 0
        for term in (Term(**value) for value in about["terms"]):
            # Of each run, the chunks that have something of the range.
            first, run = None, []
            for number, chunk in enumerate(self._run(term), term.start):
                if position < end and position + chunk.size > start:
                    if first is None:
                        first = number
                        skipped = start - position if not terms else skipped
                    run.append(chunk)
                position += chunk.size
            if first is None:
                continue
            chunks = {"start": first, "end": first + len(run)}
            size = sum(chunk.size for chunk in run)
            terms.append({"hash": term.xorb, "unpacked_length": size, "range": chunks})
            url = endpoint(request) + self._gate.sign(f"/xorbs/{term.xorb}")
            place = {"range": chunks, "url": url, "url_range": {"start": run[0].start, "end": run[-1].end - 1}}
            places.setdefault(term.xorb, []).append(place)
        return JSONResponse({"offset_into_first_range": skipped, "terms": terms, "fetch_info": places})

    async def get_xorb(self, request: Request) -> Response:
        """Serve a xorb, or a range of it, to whoever has a link."""
        self._gate.check_link(request)
        path = self._path("xorbs", request)
        headers = {"ETag": f'"{path.name}"', "Content-Type": "application/octet-stream"}
        return FileResponse(request, path, path.stat().st_size, headers)

    def _path(self, kind: str, request: Request) -> Path:
        name: str = request.path_params["hash"]
        if not _HASH.fullmatch(name):
            raise HubError(400, f"Not a hash: {name}")
        return self._folder / kind / name


def _gather(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in larger blocks."""
    held, size = [], 0
    for block in blocks:
        held.append(block)
        size += len(block)
        if size >= _BLOCK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)
