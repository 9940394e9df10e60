"""Receiving files: preupload, Git LFS (whole and in parts), and the commit that makes them visible."""

from __future__ import annotations

import asyncio
import base64
import binascii
import fnmatch
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .accounts import Gate
from .blobs import BLOCK_BYTES, Parts
from .errors import HubError
from .paths import Parameters, check_path, endpoint, other_host
from .storage import GIT_ATTRIBUTES, Commit, Entry, Repo, Storage, now

_LARGE = [line.split()[0] for line in GIT_ATTRIBUTES.splitlines()]
_SHA256 = re.compile(r"[0-9a-f]{64}")


async def receive_into(request: Request, write: Callable[[bytearray], object]) -> int:
    """Hand the body to `write` in large blocks, in a thread of its own; return the number of bytes."""
    buffer, count = bytearray(), 0
    async for chunk in request.stream():
        buffer += chunk
        if len(buffer) >= BLOCK_BYTES:
            count += len(buffer)
            await to_thread.run_sync(write, buffer)
            buffer = bytearray()
    await to_thread.run_sync(write, buffer)
    return count + len(buffer)


class Uploads:
    """The routes that take files.

    Args:
        storage: Where they go.
        gate: Who may write.
        regular_bytes: A larger file goes to LFS, whatever it is.
        part_bytes: A larger LFS file goes in parts of this size.
    """

    def __init__(self, storage: Storage, gate: Gate, *, regular_bytes: int, part_bytes: int) -> None:
        self._storage = storage
        self._gate = gate
        self._regular_bytes = regular_bytes
        self._part_bytes = part_bytes
        self._finishing = asyncio.Lock()

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        api, lfs = "/api/models/{owner}/{name}", "/{owner}/{name}.git/info/lfs"
        return [
            Route(api + "/preupload/{revision}", self.preupload, methods=["POST"]),
            Route(api + "/commit/{revision}", self.commit, methods=["POST"]),
            Route(lfs + "/objects/batch", self.batch, methods=["POST"]),
            Route(lfs + "/verify", self.verify, methods=["POST"]),
            Route("/lfs/{owner}/{name}/{oid}", self.put_whole, methods=["PUT"]),
            Route("/lfs/{owner}/{name}/{oid}/{upload}", self.complete, methods=["POST"]),
            Route("/lfs/{owner}/{name}/{oid}/{upload}/{number}", self.put_part, methods=["PUT"]),
        ]

    async def preupload(self, request: Request) -> Response:
        """Say of each file how it is to come."""
        values = Parameters(request)
        repo = self._gate.writable(request, values.repo)
        files = repo.commit(values["revision"]).files
        body = await request.json()
        ignored = body.get("gitIgnore")
        if ignored is None and ".gitignore" in files:
            ignored = repo.blobs.path(files[".gitignore"].sha256).read_text()
        answers = []
        for file in body["files"]:
            path, known = file["path"], files.get(file["path"])
            large = self._is_large(path, file["size"], base64.b64decode(file["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = _is_ignored(path, ignored or "")
            answers.append(answer if known is None else {**answer, "oid": known.tag})
        return JSONResponse({"files": answers, "commitOid": repo.resolve(values["revision"])})

    def _is_large(self, path: str, size: int, sample: bytes) -> bool:
        """Return whether a file goes to LFS: weights by name, what is too large, what is not text."""
        name = path.rsplit("/", 1)[-1]
        return size > self._regular_bytes or b"\0" in sample or any(fnmatch.fnmatch(name, glob) for glob in _LARGE)

    async def batch(self, request: Request) -> Response:
        """Say of each LFS content where it is to be sent, or that it is there."""
        repo = self._gate.writable(request, Parameters(request).repo)
        body = await request.json()
        if body["operation"] != "upload":
            raise HubError(422, "Only uploads go through LFS here: files are read through /resolve/")
        multipart = "multipart" in body.get("transfers", ["basic"])
        objects = []
        for item in body["objects"]:
            known = {"oid": item["oid"], "size": item["size"]}
            if repo.has_large(item["oid"]):
                objects.append(known)
                continue
            verify = {"href": f"{endpoint(request)}/{repo.name}.git/info/lfs/verify"}
            objects.append({**known, "authenticated": True, "actions": {"upload": None, "verify": verify}})
            upload = self._plan(request, repo, item["oid"], item["size"], multipart=multipart)
            objects[-1]["actions"]["upload"] = upload
        return JSONResponse(
            {"transfer": "multipart" if multipart else "basic", "objects": objects},
            media_type="application/vnd.git-lfs+json",
        )

    def _plan(self, request: Request, repo: Repo, oid: str, size: int, *, multipart: bool) -> dict[str, Any]:
        if not _SHA256.fullmatch(oid):
            raise HubError(422, f"Not a SHA-256: {oid}")
        path = f"/lfs/{repo.name}/{oid}"
        if not multipart or size <= self._part_bytes:
            return {"href": other_host(request) + self._gate.sign(path, size=size)}
        upload = secrets.token_hex(8)
        parts = self._parts(upload)
        parts.start()
        header = {"chunk_size": str(self._part_bytes)}
        for number in range(1, math.ceil(size / self._part_bytes) + 1):
            length = min(self._part_bytes, size - (number - 1) * self._part_bytes)
            signed = self._gate.sign(f"{path}/{upload}/{number}", size=length, part=self._part_bytes)
            header[str(number)] = other_host(request) + signed
        return {"href": endpoint(request) + self._gate.sign(f"{path}/{upload}", size=size), "header": header}

    def _parts(self, upload: str) -> Parts:
        return Parts(self._storage.folder / "parts" / upload)

    async def put_whole(self, request: Request) -> Response:
        """Take an LFS content in one piece."""
        size, values = int(self._gate.check_link(request)["size"]), Parameters(request)
        with self._storage.blobs.writer() as writer:
            await receive_into(request, writer.write)
            if (writer.sha256, writer.size) != (values["oid"], size):
                raise HubError(400, f"BadDigest: got {writer.size} of {size} bytes of SHA-256 {writer.sha256}")
            writer.keep()
        self._uploaded(values)
        return Response(headers={"ETag": f'"{values["oid"]}"'})

    async def put_part(self, request: Request) -> Response:
        """Take one part of an LFS content."""
        link, values = self._gate.check_link(request), Parameters(request)
        parts, number, digest = self._parts(values["upload"]), int(values["number"]), hashlib.sha256()
        descriptor = parts.open((number - 1) * int(link["part"]))

        def write(data: bytearray) -> None:
            os.write(descriptor, data)
            digest.update(data)

        try:
            count = await receive_into(request, write)
        finally:
            os.close(descriptor)
        if count != int(link["size"]):
            raise HubError(400, f"IncompleteBody: got {count} of {link['size']} bytes")
        parts.finish(number, digest.hexdigest())
        return Response(headers={"ETag": f'"{digest.hexdigest()}"'})

    async def complete(self, request: Request) -> Response:
        """Put the parts of an LFS content together."""
        link, values, body = self._gate.check_link(request), Parameters(request), await request.json()
        parts = self._parts(values["upload"])
        repo = self._repo(values)
        # A client that did not get our answer asks again, perhaps while we are still at it.
        async with self._finishing:
            if not repo.has_large(values["oid"]):
                if any(parts.tag(part["partNumber"]) != part["etag"].strip('"') for part in body["parts"]):
                    raise HubError(400, "InvalidPart: a part is missing, or its tag is not the one given for it")
                if await to_thread.run_sync(parts.sha256) != (values["oid"], int(link["size"])):
                    raise HubError(400, "BadDigest: the parts do not make the content that was announced")
                self._storage.blobs.adopt(parts.data, values["oid"])
                self._uploaded(values)
                parts.remove()
        return JSONResponse({"success": True})

    def _repo(self, values: Parameters) -> Repo:
        repo = self._storage.repo(values.repo)
        if repo is None:
            raise HubError(404, "Repository not found", code="RepoNotFound")
        return repo

    def _uploaded(self, values: Parameters) -> None:
        self._repo(values).add_large(values["oid"])

    async def verify(self, request: Request) -> Response:
        """Say whether an LFS content has arrived."""
        repo, body = self._gate.writable(request, Parameters(request).repo), await request.json()
        if not repo.has_large(body["oid"]) or repo.large(body["oid"]).size != body["size"]:
            raise HubError(404, "Object not found")
        return JSONResponse({"message": "OK"})

    async def commit(self, request: Request) -> Response:
        """Make a commit, of everything that is asked for or of nothing."""
        values = Parameters(request)
        repo = self._gate.writable(request, values.repo)
        if request.query_params.get("create_pr"):
            raise HubError(400, "Pull requests are not part of this server")
        author = self._gate.user(request).user
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        name = await to_thread.run_sync(self._commit, repo, values["revision"], author, lines)
        url = f"{endpoint(request)}/{repo.name}/commit/{name}"
        return JSONResponse({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})

    def _commit(self, repo: Repo, branch: str, author: str, lines: list[dict[str, Any]]) -> str:
        header = next((line["value"] for line in lines if line["key"] == "header"), None)
        if header is None or not header.get("summary"):
            raise HubError(400, "A commit needs a summary")
        with repo.lock:
            head = repo.commit(branch)
            branch = branch.removeprefix("refs/heads/")
            if branch not in repo.refs["heads"]:
                raise HubError(400, f"Not a branch: {branch}")
            expected = header.get("parentCommit")
            if expected is not None and not (len(expected) >= 7 and head.id.startswith(expected)):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                self._apply(repo, files, line["key"], line["value"])
            _check_tree(files)
            commit = Commit(
                parent=head.id,
                title=header["summary"],
                message=header.get("description", ""),
                author=author,
                date=now(),
                files=files,
            )
            return repo.write_commit(branch, commit)

    def _apply(self, repo: Repo, files: dict[str, Entry], key: str, value: Mapping[str, Any]) -> None:
        """Apply one line of a commit to the tree."""
        if key == "file":
            try:
                data = base64.b64decode(value["content"]) if value.get("encoding") else value["content"].encode()
            except binascii.Error as error:
                raise HubError(400, "A file's content is not base64") from error
            if len(data) > self._regular_bytes:
                raise HubError(400, f"{value['path']} is too large for git: use LFS")
            repo.blobs.add(data)
            files[check_path(value["path"])] = Entry.regular(data)
        elif key == "lfsFile":
            entry = repo.large(value["oid"])
            if value.get("size", entry.size) != entry.size:
                raise HubError(400, f"{value['path']} is not of the size that was announced")
            files[check_path(value["path"])] = entry
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, f"A file does not exist: {value['path']}", code="EntryNotFound")
        elif key == "deletedFolder":
            inside = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
            if not inside:
                raise HubError(404, f"A folder does not exist: {value['path']}", code="EntryNotFound")
            for path in inside:
                del files[path]
        elif key != "header":
            raise HubError(400, f"Unknown operation: {key}")


def _check_tree(files: Mapping[str, Entry]) -> None:
    """Raise where a path is a file and a folder."""
    for path in files:
        if any(str(folder) in files for folder in Path(path).parents):
            raise HubError(400, f"A file's folder is a file: {path}")


def _is_ignored(path: str, gitignore: str) -> bool:
    """Return whether a `.gitignore` names a file: plain patterns, and folders by ``folder/``."""
    parts = path.split("/")
    for line in gitignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        names = parts[:-1] if pattern.endswith("/") else parts
        pattern = pattern.strip("/")
        if fnmatch.fnmatch(path, pattern) or any(fnmatch.fnmatch(name, pattern) for name in names):
            return True
    return False
