"""Another host, to which a client can be sent: it remembers what reached it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request.

    Args:
        method: HTTP method.
        path: As sent.
        headers: By lower-case name.
    """

    method: str
    path: str
    headers: dict[str, str]


class Offsite:
    """The other host.

    Args:
        host: Its address, of loopback, and neither of the Hub's names.
        port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self.url = f"http://{host}:{port}"
        self.body = b"from another host"
        self._lock = threading.Lock()
        self._visits: list[Visit] = []

    @property
    def visits(self) -> list[Visit]:
        """What reached it."""
        with self._lock:
            return list(self._visits)

    @property
    def saw_authorization(self) -> bool:
        """Whether a token reached it."""
        return any("authorization" in visit.headers for visit in self.visits)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer everything with `body`."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        with self._lock:
            self._visits.append(Visit(method=scope["method"], path=scope["path"], headers=headers))
        length = (b"content-length", b"%d" % len(self.body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})
