"""What the Hub answers when it says no."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class HubError(Exception):
    """An answer with an error in it.

    Args:
        status: HTTP status.
        message: For people; also in ``X-Error-Message``.
        code: For clients, in ``X-Error-Code``: RepoNotFound, RevisionNotFound, EntryNotFound.
        extra: More fields of the body.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        extra: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = extra or {}
        self.headers = headers or {}


def answer_error(request: Request, error: Exception) -> Response:
    """Return the response that says an error."""
    if not isinstance(error, HubError):
        raise error
    headers = {**error.headers, "X-Error-Message": error.message}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message, **error.extra}, status_code=error.status, headers=headers)
