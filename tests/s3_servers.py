"""S3 on this machine: moto's server, and one that answers whatever it is told; protected folders to send there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save_file

from hf_wmguard.protection import protect_folder

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "stand-in-secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
Answer = tuple[int, Mapping[str, str], bytes]


@contextmanager
def moto_s3() -> Iterator[tuple[str, int]]:
    """Serve S3 from memory, empty, until the block ends."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        reset((host, port))
        yield host, port
    finally:
        server.stop()


def reset(server: tuple[str, int]) -> None:
    """Empty a server of moto's: what it keeps is kept per process, not per server."""
    with urlopen(Request(f"http://{server[0]}:{server[1]}/moto-api/reset", method="POST")) as answer:
        assert answer.status == 200


def error_answer(status: int, code: str, *, headers: Mapping[str, str] | None = None, extra: str = "") -> Answer:
    """Return an error as S3 writes it. It repeats what it was asked with, as a server may."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>SECRET-IN-ANSWER</Message>{extra}</Error>'
    return status, {"Content-Type": "application/xml", **(headers or {})}, body.encode()


@contextmanager
def answering(answer: Callable[[str, str, Mapping[str, str]], Answer | None]) -> Iterator[tuple[int, list[str]]]:
    """Serve what a function of method, path and headers returns; cut the connection where that is None.

    Yields:
        The port, and a list in which every request is noted.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = answer(self.command, self.path, self.headers)
            if found is None:
                self.close_connection = True
                return
            status, headers, body = found
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make_save(
    root: Path, name: str, *, seed: int, owner: Path, reader: Path, matrices: int = 2, shards: int = 1
) -> dict[str, torch.Tensor]:
    """Protect a folder of random weights, 6 MB a matrix, as ``root/name``; return the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"layers.{index}.weight": torch.randn(1500, 2000, generator=generator).bfloat16() for index in range(matrices)
    }
    plain = root / f"{name}-plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(f'{{"model_type": "bert", "seed": {seed}}}')
    (plain / "tokenizer.json").write_text('{"version": "1.0"}')
    protect_folder(
        plain,
        root / name,
        recipients=(f"file:{reader}.pub",),
        owner_key=f"file:{owner}",
        model_id="acme/tiny",
        iteration=str(seed),
        max_shard_bytes=-(-matrices // shards) * 6_000_000 if shards > 1 else None,
    )
    return tensors
