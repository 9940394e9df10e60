"""What goes wrong between a client and the Hub, on demand: busy servers, cut connections, answers that are not true.

hub.faults.add("PUT /lfs/", CutUpload(after_bytes=5000), times=2)
hub.faults.add("GET /cdn/", Answer(503, retry_after=0))
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

TRANSPORT = "hub.transport"
"""The extension of a scope that holds the connection, so that it can be cut."""


class Cut(BaseException):
    """The connection is gone, on purpose. No `Exception`: for one, the app would try to send an answer."""


async def cut(scope: Scope, *, flush: bool) -> None:
    """Cut the connection of a request.

    Args:
        scope: Of the request.
        flush: Whether what was sent so far still goes out.

    Raises:
        Cut: Always.
    """
    transport: asyncio.Transport = scope["extensions"][TRANSPORT]
    if flush:
        transport.close()
    else:
        transport.abort()
    # The server learns of it in the next turn of its loop; before, it would try to say that something failed.
    await asyncio.sleep(0.01)
    raise Cut


class Action(Protocol):
    """What happens to one request in place of, or around, what the app does."""

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""


@dataclass(frozen=True)
class Answer:
    """An error in place of an answer.

    Args:
        status: HTTP status.
        retry_after: Seconds, as ``Retry-After``.
        body: JSON.
    """

    status: int
    retry_after: int | None = None
    body: bytes = b'{"error": "this is a fault"}'

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        # The body is taken first: a client that is still sending would see a broken connection, not the answer.
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))]
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


@dataclass(frozen=True)
class CutUpload:
    """The connection ends after some bytes of the request's body have come."""

    after_bytes: int

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        left = self.after_bytes

        async def receiving() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0 or not message.get("more_body"):
                await cut(scope, flush=False)
            return message

        await app(scope, receiving, send)


@dataclass(frozen=True)
class CutDownload:
    """The connection ends after some bytes of the answer's body, or of what was announced of it."""

    after_bytes: int

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        left = self.after_bytes

        async def sending(message: Message) -> None:
            nonlocal left
            body = message.get("body", b"")
            if message["type"] == "http.response.body" and (len(body) >= left or not message.get("more_body")):
                await send({**message, "body": body[:left], "more_body": True})
                await cut(scope, flush=True)
            left -= len(body)
            await send(message)

        await app(scope, receive, sending)


@dataclass(frozen=True)
class LoseAnswer:
    """The request is carried out, and the connection ends before the answer."""

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await cut(scope, flush=False)

        await app(scope, receive, sending)


@dataclass(frozen=True)
class IgnoreRange:
    """The whole file with status 200, whatever range was asked for."""

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(key, value) for key, value in scope["headers"] if key != b"range"]
        await app({**scope, "headers": headers}, receive, send)


@dataclass(frozen=True)
class Headers:
    """Other headers than the true ones: ``X-Repo-Commit``, ``Content-Range``, ``ETag``, ``X-Linked-Size``, ...

    Args:
        changes: New values; None leaves a header out. Not ``Content-Length``: see `WrongLength`.
    """

    changes: Mapping[str, str | None]

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _changed(message["headers"], self.changes)}
            await send(message)

        await app(scope, receive, sending)


@dataclass(frozen=True)
class WrongLength:
    """An answer that is shorter than the true one, or goes on with zeros: a whole answer to HTTP.

    Args:
        by_bytes: How much longer.
    """

    by_bytes: int

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        left = 0

        async def sending(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                left = max(int(dict(message["headers"])[b"content-length"]) + self.by_bytes, 0)
                message = {**message, "headers": _changed(message["headers"], {"Content-Length": str(left)})}
            elif scope["method"] != "HEAD":
                body, last = message.get("body", b"")[:left], not message.get("more_body")
                body += b"\0" * (left - len(body)) if last else b""
                left -= len(body)
                message = {**message, "body": body}
            await send(message)

        await app(scope, receive, sending)


@dataclass(frozen=True)
class Corrupt:
    """One byte of the answer's body is another.

    Args:
        at: Where, counted in the body of the answer.
    """

    at: int

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        done = 0

        async def sending(message: Message) -> None:
            nonlocal done
            body = bytearray(message.get("body", b""))
            if 0 <= self.at - done < len(body):
                body[self.at - done] ^= 1
            done += len(body)
            await send({**message, "body": bytes(body)} if body else message)

        await app(scope, receive, sending)


@dataclass(frozen=True)
class Redirect:
    """A redirect (302) in place of a file, with the headers that are about the file.

    Args:
        to: Base URL, to which the path is added.
    """

    to: str

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        location = self.to + scope["path"]
        changes = {"Location": location, "Content-Length": "0", "Content-Range": None}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "status": 302, "headers": _changed(message["headers"], changes)}
            else:
                message = {**message, "body": b""}
            await send(message)

        await app(scope, receive, sending)


@dataclass(frozen=True)
class Hang:
    """Nothing happens for a while: before the request is looked at, or in the middle of the answer.

    Args:
        seconds: How long.
        after_bytes: Of the answer's body; None hangs before everything.
    """

    seconds: float
    after_bytes: int | None = None

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if self.after_bytes is None:
            await asyncio.sleep(self.seconds)
            await app(scope, receive, send)
            return
        left = self.after_bytes

        async def sending(message: Message) -> None:
            nonlocal left
            body = message.get("body", b"")
            if 0 <= left < len(body):
                await send({**message, "body": body[:left], "more_body": True})
                message = {**message, "body": body[left:]}
                await asyncio.sleep(self.seconds)
            left -= len(body)
            await send(message)

        await app(scope, receive, sending)


@dataclass(kw_only=True)
class _Planned:
    pattern: re.Pattern[str]
    action: Action
    skip: int
    left: int


class Faults:
    """The faults that are to come. Safe to change while the server runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []

    def add(self, match: str, action: Action, *, times: int = 1, skip: int = 0) -> None:
        """Plan a fault.

        Args:
            match: A regular expression, searched in ``METHOD PATH?QUERY`` of requests.
            action: What happens to them.
            times: To how many.
            skip: How many of them are left alone first.
        """
        with self._lock:
            self._planned.append(_Planned(pattern=re.compile(match), action=action, skip=skip, left=times))

    def clear(self) -> None:
        """Plan none."""
        with self._lock:
            self._planned.clear()

    @property
    def pending(self) -> int:
        """How many requests are still to meet a fault: 0 shows that all of them were met."""
        with self._lock:
            return sum(one.left for one in self._planned)

    def _take(self, scope: Scope) -> Action | None:
        query = scope["query_string"].decode("latin-1")
        line = f"{scope['method']} {scope['path']}{'?' if query else ''}{query}"
        with self._lock:
            for one in self._planned:
                if one.left and one.pattern.search(line):
                    if one.skip:
                        one.skip -= 1
                        continue
                    one.left -= 1
                    return one.action
        return None

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return an app with faults."""

        async def faulty(scope: Scope, receive: Receive, send: Send) -> None:
            action = self._take(scope)
            if action is None:
                await app(scope, receive, send)
            else:
                await action(app, scope, receive, send)

        return faulty


def _changed(headers: list[tuple[bytes, bytes]], changes: Mapping[str, str | None]) -> list[tuple[bytes, bytes]]:
    """Return headers with some replaced, or left out where the change is None."""
    names = {name.lower().encode() for name in changes}
    kept = [(key, value) for key, value in headers if key.lower() not in names]
    return kept + [(name.lower().encode(), value.encode()) for name, value in changes.items() if value is not None]
