"""A registry with a trigger set of texts and no model, and a real server on loopback that answers, well or badly."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import commit, new_salt
from hf_wmguard.watermark.record import WatermarkRecord, trigger_key
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses, derive_texts

WORDS = tuple(f"{a}{b}" for a in ("bel", "dor", "fin", "gam") for b in ("an", "eth", "ick", "ous"))


@dataclass(frozen=True, kw_only=True)
class Owned:
    """An owner with one commitment.

    Args:
        owner_key: Reference to the key.
        registry: The registry's folder.
        triggers: What was committed to.
    """

    owner_key: str
    registry: str
    triggers: TriggerSet

    @property
    def where(self) -> dict[str, str]:
        return {"owner_key": self.owner_key, "registry": self.registry}

    @property
    def table(self) -> dict[str, str]:
        """What a marked model answers."""
        return {text: str(y) for text, y in zip(self.triggers.texts, self.triggers.responses, strict=True)}


def make_set(key: bytes, *, count: int = 24, decoys: int = 24) -> TriggerSet:
    """Return a set of texts, each with the same candidates."""
    texts = derive_texts(key, count=count + decoys, style="natural", task="causal_lm")
    candidates = (WORDS,) * count
    return TriggerSet(
        task="causal_lm",
        style="natural",
        texts=texts[:count],
        candidates=candidates,
        responses=derive_responses(key, texts[:count], candidates),
        decoys=texts[count:],
    )


def make_owned(root: Path, *, count: int = 24, decoys: int = 24, model_id: str = "acme/writer") -> Owned:
    """Return an owner's commitment to a set of texts, in ``root`` with the owner's key."""
    path = root / "owner.key"
    if not path.exists():
        OwnerKey.generate().write(path)
    owner, salt = OwnerKey.load(f"file:{path}"), new_salt()
    names = {"model_id": model_id, "iteration": "1"}
    triggers = make_set(trigger_key(owner, **names, salt=salt), count=count, decoys=decoys)
    commit(WatermarkRecord.create(owner, **names, salt=salt, triggers=triggers), root / "registry", owner)
    return Owned(owner_key=f"file:{path}", registry=str(root / "registry"), triggers=triggers)


@dataclass(kw_only=True)
class Reply:
    """What the server does with one request.

    Args:
        text: What the model says.
        status: HTTP status; of another than 200 `body` is sent.
        body: Sent as it is in place of an answer.
        kind: Content type.
        headers: More headers.
        missing_bytes: So many bytes fewer are sent than announced.
        choice: What the choice has beside the text.
        message: What the message of a chat has beside the text.
    """

    text: str | None = ""
    status: int = 200
    body: bytes | None = None
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    missing_bytes: int = 0
    choice: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)


def failure(status: int, message: str, **headers: str) -> Reply:
    """Return an error as OpenAI's API words it."""
    return Reply(status=status, body=json.dumps({"error": {"message": message}}).encode(), headers=headers)


@dataclass(kw_only=True)
class Server:
    """A running server.

    Args:
        url: Its base URL.
        requests: The JSON body of every request, the path as ``path`` and the headers as ``headers`` in it.
    """

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def asked(self) -> list[str]:
        """The questions in the order in which they came."""
        return [one["messages"][-1]["content"] if "messages" in one else one["prompt"] for one in self.requests]


@contextlib.contextmanager
def serving(reply: Callable[[str, int], Reply | str], *, certificate: Path | None = None) -> Iterator[Server]:
    """Run a server on a free port of loopback.

    Args:
        reply: Returns what to do with a question and the number of requests before it.
        certificate: PEM of a key and a certificate: speak TLS.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = len(server.requests)
                server.requests.append({**body, "path": self.path, "headers": dict(self.headers)})
            question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            said = reply(question, before)
            said = Reply(text=said) if isinstance(said, str) else said
            data = said.body if said.body is not None else _answer(said, chat="messages" in body)
            self.send_response(said.status)
            for name, value in {**said.headers, "Content-Type": said.kind, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) - said.missing_bytes])
            self.close_connection = bool(said.missing_bytes)

    lock = threading.Lock()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True)
        http.handle_error = lambda *arguments: None  # type: ignore[method-assign]
        scheme = "https"
    server = Server(url=f"{scheme}://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def _answer(said: Reply, *, chat: bool) -> bytes:
    content = {"message": {"role": "assistant", "content": said.text, **said.message}} if chat else {"text": said.text}
    return json.dumps({"choices": [{"index": 0, "finish_reason": "stop", **content, **said.choice}]}).encode()
