"""Everything a client sends, on disk, and a line about every request."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .blobs import BLOCK_BYTES

_BASE64 = re.compile(rb'"(?:content|sample)":\s*"([A-Za-z0-9+/=]+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request and what became of it.

    Args:
        number: Counts from 1, in the order in which requests came.
        method: HTTP method.
        host: As the client names the server: which of its two names tells API and storage apart.
        path: As sent, without the query.
        query: Without the question mark.
        authorized: Whether a token was sent.
        range: The Range header.
        status: Of the answer; 0 if there was none.
        bytes_in: Of the request's body that arrived.
        bytes_out: Of the answer's body that were sent.
    """

    number: int
    method: str
    host: str
    path: str
    query: str
    authorized: bool
    range: str | None
    status: int
    bytes_in: int
    bytes_out: int


class Traffic:
    """The record of a server's traffic.

    Args:
        folder: ``log.jsonl`` has a line for each request; ``NUMBER-METHOD.request`` has its request line, headers and
            body; ``NUMBER-METHOD.decoded`` what was base64 in it, for a scan would not find plaintext in base64.
        bodies: Whether bodies are recorded: switch it off where gigabytes are sent.
    """

    def __init__(self, folder: Path, *, bodies: bool = True) -> None:
        self.folder = folder
        self._bodies = bodies
        self._lock = threading.Lock()
        self._exchanges: list[Exchange] = []
        self._started = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def exchanges(self) -> list[Exchange]:
        """The requests that were answered so far, in the order in which their answers ended."""
        with self._lock:
            return list(self._exchanges)

    def matching(self, pattern: str) -> list[Exchange]:
        """Return the requests whose ``METHOD PATH`` has a match for a regular expression."""
        return [one for one in self.exchanges if re.search(pattern, f"{one.method} {one.path}")]

    def bytes_in(self, pattern: str = "") -> int:
        """Return how many bytes of bodies came with such requests."""
        return sum(one.bytes_in for one in self.matching(pattern))

    def bytes_out(self, pattern: str = "") -> int:
        """Return how many bytes of bodies were served to such requests."""
        return sum(one.bytes_out for one in self.matching(pattern))

    def clear(self) -> None:
        """Forget the lines so far; the files stay."""
        with self._lock:
            self._exchanges.clear()

    def files(self) -> list[Path]:
        """Return what was recorded of requests."""
        return sorted(path for path in self.folder.iterdir() if path.suffix in (".request", ".decoded"))

    def holding(self, needle: bytes) -> list[Path]:
        """Return the recorded files that hold some bytes."""
        return [path for path in self.files() if _holds(path, needle)]

    def keep_decoded(self, name: str, blocks: Iterator[bytes]) -> None:
        """Record what a client sent in a form in which a scan would not find it."""
        if self._bodies:
            with (self.folder / f"{name}.decoded").open("wb") as file:
                file.writelines(blocks)

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return an app that records what reaches another one."""

        async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
            with self._lock:
                self._started += 1
                number = self._started
            stem = f"{number:06}-{scope['method']}"
            counts = {"in": 0, "out": 0, "status": 0, "done": 0}
            file = (self.folder / f"{stem}.request").open("wb", buffering=BLOCK_BYTES) if self._bodies else None

            async def receiving() -> Message:
                message = await receive()
                if message["type"] == "http.request":
                    counts["in"] += len(message["body"])
                    if file is not None and not counts["done"]:
                        file.write(message["body"])
                return message

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    counts["status"] = message["status"]
                else:
                    counts["out"] += len(message.get("body", b"")) if scope["method"] != "HEAD" else 0
                # Before a client has the end of the answer, and looks for what was recorded.
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    finish()
                await send(message)

            def finish() -> None:
                if counts["done"]:
                    return
                counts["done"] = 1
                self._log(scope, number, counts)
                if file is not None:
                    file.close()
                    self._decode(stem)

            try:
                if file is not None:
                    _write_head(file, scope)
                await app(scope, receiving, sending)
            finally:
                finish()

        return recorded

    def _log(self, scope: Scope, number: int, counts: dict[str, int]) -> None:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        exchange = Exchange(
            number=number,
            method=scope["method"],
            host=headers.get("host", ""),
            path=scope["raw_path"].decode("latin-1"),
            query=scope["query_string"].decode("latin-1"),
            authorized="authorization" in headers,
            range=headers.get("range"),
            status=counts["status"],
            bytes_in=counts["in"],
            bytes_out=counts["out"],
        )
        with self._lock:
            self._exchanges.append(exchange)
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(asdict(exchange)) + "\n")

    def _decode(self, stem: str) -> None:
        path = self.folder / f"{stem}.request"
        with path.open("rb") as file:
            if file.readline().startswith(b"PUT "):
                return
        found = _BASE64.findall(path.read_bytes())
        if found:
            self.keep_decoded(stem, (base64.b64decode(text) + b"\n" for text in found))


def _write_head(file: BinaryIO, scope: Scope) -> None:
    path = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    file.write(scope["method"].encode() + b" " + path + b" HTTP/" + scope["http_version"].encode() + b"\r\n")
    file.writelines(key + b": " + value + b"\r\n" for key, value in scope["headers"])
    file.write(b"\r\n")


def _holds(path: Path, needle: bytes) -> bool:
    """Return whether a file holds some bytes, also across blocks."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(8 * BLOCK_BYTES):
            if needle in rest + block:
                return True
            rest = (rest + block)[-len(needle) :]
    return False
