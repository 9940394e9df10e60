"""What a client asks about repos, and changes of them: everything but the files' contents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .accounts import Gate
from .errors import HubError
from .paths import Parameters, check_name, endpoint
from .storage import Commit, Entry, Repo, Storage

_REF = re.compile(r"[\w][\w./-]*")


def file_info(path: str, entry: Entry) -> dict[str, Any]:
    """Return a file as ``tree`` and ``paths-info`` show it."""
    info: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return info if entry.xet is None else {**info, "xetHash": entry.xet}


def folder_info(path: str, files: Mapping[str, Entry]) -> dict[str, Any]:
    """Return a folder as ``tree`` and ``paths-info`` show it."""
    inside = sorted((name, entry.oid) for name, entry in files.items() if name.startswith(path + "/"))
    oid = hashlib.sha1(repr(inside).encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def folders_of(path: str) -> list[str]:
    """Return the folders a path is in, the outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def is_true(value: object) -> bool:
    """Return whether a query says yes."""
    return str(value).lower() in ("1", "true")


class Api:
    """The routes about repos.

    Args:
        storage: The repos.
        gate: Who may do what.
    """

    def __init__(self, storage: Storage, gate: Gate) -> None:
        self._storage = storage
        self._gate = gate

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        model = "/api/models/{owner}/{name}"
        return [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/repos/delete", self.delete, methods=["DELETE"]),
            Route(model, self.info),
            Route(model + "/revision/{revision}", self.info),
            Route(model + "/settings", self.settings, methods=["PUT"]),
            Route(model + "/auth-check", self.check_read),
            Route(model + "/auth-check/write", self.check_write),
            Route(model + "/tree/{revision}", self.tree),
            Route(model + "/tree/{revision}/{path:path}", self.tree),
            Route(model + "/paths-info/{revision}", self.paths_info, methods=["POST"]),
            Route(model + "/refs", self.refs),
            Route(model + "/commits/{revision}", self.commits),
            Route(model + "/branch/{branch}", self.create_branch, methods=["POST"]),
            Route(model + "/branch/{branch}", self.delete_branch, methods=["DELETE"]),
            Route(model + "/tag/{revision}", self.create_tag, methods=["POST"]),
            Route(model + "/tag/{revision}", self.delete_tag, methods=["DELETE"]),
        ]

    async def whoami(self, request: Request) -> Response:
        """Say whose token it is."""
        account = self._gate.user(request)
        token = {"displayName": "test", "role": "write" if account.write else "read"}
        about = {"type": "user", "id": account.user, "name": account.user, "fullname": account.user, "orgs": []}
        return JSONResponse({**about, "isPro": False, "auth": {"type": "access_token", "accessToken": token}})

    async def validate_yaml(self, request: Request) -> Response:
        """Find nothing wrong with a card: clients ask before they send one."""
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request: Request) -> Response:
        """Make a repo."""
        body = await request.json()
        if body.get("type") not in (None, "model"):
            raise HubError(400, f"Only models are kept here, not a {body['type']}")
        owner = check_name(body.get("organization") or self._gate.user(request).user)
        account = self._gate.check_namespace(request, owner)
        name = f"{owner}/{check_name(body['name'])}"
        url = f"{endpoint(request)}/{name}"
        try:
            self._storage.create(name, private=_is_private(body), author=account.user)
        except HubError as error:
            error.extra["url"] = url
            raise
        return JSONResponse({"url": url, "name": name, "id": name})

    async def delete(self, request: Request) -> Response:
        """Remove a repo."""
        body = await request.json()
        owner = body.get("organization") or self._gate.user(request).user
        repo = self._gate.writable(request, f"{check_name(owner)}/{check_name(body['name'])}")
        self._storage.delete(repo.name)
        return Response("OK")

    async def settings(self, request: Request) -> Response:
        """Change who may read a repo."""
        repo = self._gate.writable(request, Parameters(request).repo)
        body = await request.json()
        if "visibility" in body or "private" in body:
            repo.update_settings(private=_is_private(body))
        if "gated" in body:
            repo.update_settings(gated=body["gated"])
        return JSONResponse(repo.settings)

    async def check_read(self, request: Request) -> Response:
        """Say whether the request may read."""
        self._gate.readable(request, Parameters(request).repo)
        return Response("OK")

    async def check_write(self, request: Request) -> Response:
        """Say whether the request may write."""
        self._gate.writable(request, Parameters(request).repo)
        return Response("OK")

    async def info(self, request: Request) -> Response:
        """Describe a repo at a revision."""
        values = Parameters(request)
        repo = self._gate.readable(request, values.repo)
        commit = repo.commit(values["revision"] if "revision" in request.path_params else "main")
        detailed = is_true(request.query_params.get("blobs"))
        settings = repo.settings
        about = {
            "_id": hashlib.sha256(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": values["owner"],
            "sha": commit.id,
            "lastModified": commit.date,
            "createdAt": settings["created"],
            "private": settings["private"],
            "gated": settings["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "usedStorage": sum(entry.size for entry in commit.files.values()),
            "siblings": [_sibling(path, entry, detailed=detailed) for path, entry in sorted(commit.files.items())],
        }
        return JSONResponse(about)

    async def tree(self, request: Request) -> Response:
        """List a folder, in one page."""
        values = Parameters(request)
        repo = self._gate.readable(request, values.repo)
        commit = repo.commit(values["revision"])
        root = values["path"].strip("/") if "path" in request.path_params else ""
        inside = {path: entry for path, entry in commit.files.items() if not root or path.startswith(root + "/")}
        if root and not inside:
            raise HubError(404, f"{root} does not exist on {values['revision']}", code="EntryNotFound")
        folders = {folder for path in inside for folder in folders_of(path) if len(folder) > len(root)}
        rows = [folder_info(folder, commit.files) for folder in sorted(folders)]
        rows += [file_info(path, entry) for path, entry in sorted(inside.items())]
        if not is_true(request.query_params.get("recursive")):
            depth = root.count("/") + 1 if root else 0
            rows = [row for row in rows if row["path"].count("/") == depth]
        if is_true(request.query_params.get("expand")):
            _add_last_commits(repo, commit, rows)
        return JSONResponse(rows)

    async def paths_info(self, request: Request) -> Response:
        """Describe some paths; those that are not there are left out."""
        values = Parameters(request)
        repo = self._gate.readable(request, values.repo)
        commit = repo.commit(values["revision"])
        if request.headers.get("content-type", "").startswith("application/json"):
            body = await request.json()
            paths, expand = body["paths"], body.get("expand")
        else:
            form = await _form(request)
            paths, expand = form.get("paths", []), form.get("expand", ["false"])[0]
        rows = []
        for path in (path.strip("/") for path in paths):
            if path in commit.files:
                rows.append(file_info(path, commit.files[path]))
            elif any(name.startswith(path + "/") for name in commit.files):
                rows.append(folder_info(path, commit.files))
        if is_true(expand):
            _add_last_commits(repo, commit, rows)
        return JSONResponse(rows)

    async def refs(self, request: Request) -> Response:
        """List branches and tags."""
        refs = self._gate.readable(request, Parameters(request).repo).refs

        def rows(kind: str) -> list[dict[str, str]]:
            items = refs[kind].items()
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in items]

        return JSONResponse({"branches": rows("heads"), "converts": [], "tags": rows("tags"), "pullRequests": []})

    async def commits(self, request: Request) -> Response:
        """List what led to a revision, the newest first."""
        values = Parameters(request)
        history = self._gate.readable(request, values.repo).history(values["revision"])
        rows = [
            {"id": one.id, "title": one.title, "message": one.message, "date": one.date, "authors": [_author(one)]}
            for one in history
        ]
        return JSONResponse(rows, headers={"X-Total-Count": str(len(rows))})

    async def create_branch(self, request: Request) -> Response:
        """Add a branch."""
        values = Parameters(request)
        repo, body = self._gate.writable(request, values.repo), await request.json()
        return _add_ref(repo, "heads", values["branch"], body.get("startingPoint") or "main")

    async def delete_branch(self, request: Request) -> Response:
        """Remove a branch, not the main one."""
        values = Parameters(request)
        repo = self._gate.writable(request, values.repo)
        if values["branch"] == "main":
            raise HubError(400, "Cannot delete the main branch")
        return _remove_ref(repo, "heads", values["branch"])

    async def create_tag(self, request: Request) -> Response:
        """Add a tag."""
        values = Parameters(request)
        repo, body = self._gate.writable(request, values.repo), await request.json()
        return _add_ref(repo, "tags", body["tag"], values["revision"])

    async def delete_tag(self, request: Request) -> Response:
        """Remove a tag."""
        values = Parameters(request)
        return _remove_ref(self._gate.writable(request, values.repo), "tags", values["revision"])


def _is_private(body: Mapping[str, Any]) -> bool:
    return body["visibility"] == "private" if "visibility" in body else bool(body.get("private"))


def _author(commit: Commit) -> dict[str, str]:
    return {"user": commit.author}


def _sibling(path: str, entry: Entry, *, detailed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path}
    if detailed:
        row |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            row["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return row


def _add_last_commits(repo: Repo, commit: Commit, rows: list[dict[str, Any]]) -> None:
    """Add to each row the commit that last changed it."""
    missing = {row["path"]: row for row in rows}
    newer = commit
    for older in repo.history(commit.id):
        changed = {path for path in newer.files | older.files if newer.files.get(path) != older.files.get(path)}
        _claim(missing, newer, changed)
        newer = older
    _claim(missing, newer, set(newer.files))


def _claim(missing: dict[str, dict[str, Any]], commit: Commit, changed: set[str]) -> None:
    for path in {name for one in changed for name in (one, *folders_of(one))} & missing.keys():
        missing.pop(path)["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}


def _add_ref(repo: Repo, kind: str, name: str, revision: str) -> Response:
    if not _REF.fullmatch(name) or name.startswith("refs/") or ".." in name:
        raise HubError(400, f"Invalid reference: {name}")
    with repo.lock:
        refs = repo.refs
        if name in refs[kind]:
            raise HubError(409, f"Reference already exists: {name}")
        refs[kind][name] = repo.resolve(revision)
        repo.write_refs(refs)
    return Response("OK", status_code=201)


def _remove_ref(repo: Repo, kind: str, name: str) -> Response:
    with repo.lock:
        refs = repo.refs
        if refs[kind].pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", code="RevisionNotFound")
        repo.write_refs(refs)
    return Response("OK")


async def _form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form, each with all its values."""
    return parse_qs((await request.body()).decode())
