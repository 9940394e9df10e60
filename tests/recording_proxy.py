"""A TCP proxy on the loopback that writes down what passes, and can cut the connection in the middle."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BLOCK_BYTES = 1 << 16


class RecordingProxy:
    """What passed, in both directions; started by `recording`.

    Args:
        target: Host and port that is passed on to.
        cuts: After so many bytes of the client or the server a connection is cut, once for each number.
    """

    def __init__(self, target: tuple[str, int], cuts: dict[str, list[int]]) -> None:
        self._target, self._cuts = target, cuts
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.streams: list[bytearray] = []
        self.cut = 0
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)

    @property
    def size_bytes(self) -> int:
        """Of everything that passed."""
        return sum(map(len, self.streams))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with suppress(OSError):
            # Closing alone does not wake a thread that accepts.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            with self._lock:
                self._connections |= {client, server}
            for source, sink, who in ((client, server, "client"), (server, client, "server")):
                thread = threading.Thread(target=self._pass_on, args=(source, sink, who))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, who: str) -> None:
        seen = bytearray()
        with self._lock:
            self.streams.append(seen)
        with suppress(OSError):
            while block := source.recv(_BLOCK_BYTES):
                seen += block
                with self._lock:
                    cuts = self._cuts.get(who, [])
                    due = bool(cuts) and len(seen) > cuts[0]
                    if due:
                        cuts.pop(0)
                        self.cut += 1
                if due:
                    break
                sink.sendall(block)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def recording(target: tuple[str, int], cuts: dict[str, list[int]] | None = None) -> Iterator[RecordingProxy]:
    """Pass connections on until the block ends."""
    proxy = RecordingProxy(target, cuts or {})
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
