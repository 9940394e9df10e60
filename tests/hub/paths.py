"""Names in URLs."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.requests import Request

from .errors import HubError

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}")
_HOSTS = {"localhost": "127.0.0.1", "127.0.0.1": "localhost"}


def check_name(name: str) -> str:
    """Return a namespace or a repo's name.

    Raises:
        HubError: It is none.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise HubError(400, f"Invalid repo name: {name}")
    return name


def check_path(path: str) -> str:
    """Return a path of a file in a repo.

    Raises:
        HubError: It is none.
    """
    if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")) or "\0" in path:
        raise HubError(400, f"Invalid path: {path}")
    return path


class Parameters:
    """What the parts of a URL say.

    Routes match the path as it was sent: a revision ``a/b`` comes as ``a%2Fb`` and is one part of it.
    """

    def __init__(self, request: Request) -> None:
        self._values = {key: unquote(value) for key, value in request.path_params.items()}

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    @property
    def repo(self) -> str:
        """The repo's full name."""
        return f"{check_name(self['owner'])}/{check_name(self['name'])}"


def endpoint(request: Request) -> str:
    """Return the server's URL by the name the client has for it."""
    return f"http://{request.headers['host']}"


def other_host(request: Request) -> str:
    """Return the server's URL by its other name."""
    host, _, port = request.headers["host"].partition(":")
    return f"http://{_HOSTS.get(host, 'localhost')}:{port}"
