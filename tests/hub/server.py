"""The server: in a thread (`Hub`), or as a process of its own (``python -m tests.hub.server --folder F --port 0``)."""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .accounts import TOKENS, Account, Gate
from .api import Api
from .contents import Contents
from .errors import HubError, answer_error
from .storage import Storage
from .traffic import Traffic
from .uploads import Uploads

BUFFER_BYTES = 4 << 20
REGULAR_BYTES = 10 << 20
PART_BYTES = 64 << 20
START_SECONDS = 20.0


class _Protocol(H11Protocol):
    """Uvicorn's HTTP/1.1 with larger buffers: it is made for small answers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


class Hub:
    """A Hugging Face Hub on this machine.

    Speaks what huggingface_hub 2.4 speaks about models: repos, commits, branches and tags, LFS in one piece and in
    parts, reads with ranges, private repos. Its API is at `endpoint`; large contents are sent to and come from the same
    port by its other name (`127.0.0.1`), by signed links without a token, as from the Hub's storage.

    Args:
        folder: Where repos are kept (``hub``) and traffic is recorded (``traffic``). May be one of an earlier server.
        tokens: Accounts by token: by default ``hf_owner`` (writes to ``acme/``), ``hf_reader`` (acme's, read only) and
            ``hf_stranger`` (another user's).
        port: 0 takes a free one.
        regular_bytes: Files above this size go to LFS (so do binary ones, and weights by name).
        part_bytes: LFS contents above this size go in parts of this size.
        record_bodies: Whether requests are recorded: switch it off where gigabytes are sent.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokens: Mapping[str, Account] = TOKENS,
        port: int = 0,
        regular_bytes: int = REGULAR_BYTES,
        part_bytes: int = PART_BYTES,
        record_bodies: bool = True,
    ) -> None:
        self.storage = Storage(folder / "hub")
        self.traffic = Traffic(folder / "traffic", bodies=record_bodies)
        gate = Gate(self.storage, tokens)
        uploads = Uploads(self.storage, gate, regular_bytes=regular_bytes, part_bytes=part_bytes)
        routes = [
            *Api(self.storage, gate).routes(),
            *uploads.routes(),
            *Contents(gate, self.storage.blobs).routes(),
        ]
        app = Starlette(routes=routes, exception_handlers={HubError: answer_error})
        self._socket = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            _quoted(self.traffic.wrap(app)),
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://localhost:{self.port}"

    def serve(self) -> None:
        """Serve in this thread until a signal comes."""
        self._server.run(sockets=[self._socket])

    def start(self) -> None:
        """Serve in another thread."""
        self._thread = threading.Thread(target=self.serve, name="hub", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if time.monotonic() > deadline:
                raise TimeoutError("the hub did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop serving; connections that are still busy are cut."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> Hub:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _quoted(app: ASGIApp) -> ASGIApp:
    """Return an app whose routes see paths as they were sent (see `paths.Parameters`)."""

    async def quoted(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app({**scope, "path": scope["raw_path"].decode("latin-1")}, receive, send)
        except ClientDisconnect:
            # Whoever sent half a body has gone: there is nobody to tell.
            return

    return quoted


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a Hugging Face Hub on this machine.")
    parser.add_argument("--folder", type=Path, required=True, help="where repos are kept")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES, help="LFS contents above this go in parts")
    parser.add_argument("--no-record", action="store_true", help="do not record what clients send")
    return parser.parse_args()


def main() -> None:
    """Serve until SIGINT or SIGTERM, the endpoint printed as the first line."""
    options: Any = _parse()
    hub = Hub(options.folder, port=options.port, part_bytes=options.part_bytes, record_bodies=not options.no_record)
    print(hub.endpoint, flush=True)
    hub.serve()


if __name__ == "__main__":
    main()
