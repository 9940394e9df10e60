"""Who may do what: tokens, and the signatures of URLs that go without one."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request

from .errors import HubError
from .storage import Repo, Storage

LINK_SECONDS = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom a token stands for.

    Args:
        user: The user, and the one namespace it may write to.
        write: Whether the token may write there.
    """

    user: str
    write: bool = True


TOKENS: Mapping[str, Account] = {
    "hf_owner": Account(user="acme"),
    "hf_reader": Account(user="acme", write=False),
    "hf_stranger": Account(user="stranger"),
}


class Gate:
    """Decides who gets in.

    Args:
        storage: The repos.
        tokens: The accounts by token.
    """

    def __init__(self, storage: Storage, tokens: Mapping[str, Account]) -> None:
        self._storage = storage
        self._tokens = dict(tokens)
        self._secret = _load_secret(storage.folder / "secret")

    def account(self, request: Request) -> Account | None:
        """Return whose token a request carries, None without one.

        Raises:
            HubError: 401, nobody's.
        """
        header = request.headers.get("authorization")
        if header is None:
            return None
        account = self._tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def user(self, request: Request) -> Account:
        """Return whose token a request carries.

        Raises:
            HubError: 401, nobody's or none.
        """
        account = self.account(request)
        if account is None:
            raise HubError(401, "Invalid username or password.")
        return account

    def readable(self, request: Request, name: str) -> Repo:
        """Return a repo the request may read.

        Raises:
            HubError: 401 without a token and 404 with one: the Hub does not tell what is hidden from what is missing.
        """
        account = self.account(request)
        repo = self._storage.repo(name)
        if repo is not None and (not repo.private or (account and account.user == _namespace(name))):
            return repo
        if account is None:
            raise HubError(401, "Invalid username or password.", code="RepoNotFound")
        raise HubError(404, "Repository not found", code="RepoNotFound")

    def writable(self, request: Request, name: str) -> Repo:
        """Return a repo the request may write to.

        Raises:
            HubError: As `readable`; 403 if it may only read.
        """
        repo = self.readable(request, name)
        self.check_namespace(request, _namespace(name))
        return repo

    def check_namespace(self, request: Request, namespace: str) -> Account:
        """Return who writes to a namespace.

        Raises:
            HubError: 401 without a token, 403 if it may not.
        """
        account = self.user(request)
        if account.user != namespace:
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace}")
        if not account.write:
            raise HubError(403, "Forbidden: you must use a write token to do that")
        return account

    def sign(self, path: str, **fields: str | int) -> str:
        """Return path and query of a link that works without a token, for an hour."""
        values = {**{key: str(value) for key, value in fields.items()}, "expires": str(int(time.time()) + LINK_SECONDS)}
        return f"{path}?{urlencode({**values, 'signature': self._signature(path, values)})}"

    def check_link(self, request: Request) -> dict[str, str]:
        """Return the fields of a signed link.

        Raises:
            HubError: 403, not signed by this server, or too old.
        """
        values = dict(request.query_params)
        signature = values.pop("signature", "")
        if not hmac.compare_digest(signature, self._signature(request.url.path, values)):
            raise HubError(403, "SignatureDoesNotMatch")
        if int(values["expires"]) < time.time():
            raise HubError(403, "Request has expired")
        return values

    def _signature(self, path: str, values: Mapping[str, str]) -> str:
        text = f"{path}?{urlencode(sorted(values.items()))}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _namespace(name: str) -> str:
    return name.split("/")[0]


def _load_secret(path: Path) -> bytes:
    """Return the key of signed links: kept, so that they outlive a restart."""
    if not path.is_file():
        path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()
