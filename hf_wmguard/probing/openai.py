"""Ask an OpenAI-compatible server, chat or completions, by text alone.

The API key comes from the environment, goes into the client's header and nowhere else. What a server says is quoted in
an error only after the key was taken out of it, short and in ASCII.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from hf_wmguard.errors import ConfigError, EndpointError, MissingDependencyError, WmguardError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.calling import prompt_text
from hf_wmguard.watermark.answers import Answer, Prompt

OWN_KEY_ENV: Final = "OPENAI_API_KEY"
OWN_HOST: Final = "api.openai.com"
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
MAX_RETRIES: Final = 5
MAX_CONCURRENCY: Final = 64
TIMEOUT_S: Final = 120.0
# What the APIs take at most: 20 in a chat, 5 for completions.
_RANKED = {True: 20, False: 5}
_QUOTED = 200
_REFUSED_STATUS = (400, 422)
_FILTERS = ("content_filter", "content_policy_violation")
# What the client needs to see where a server needs no key.
_NO_KEY = "none"


class OpenAIAsker:
    """An `Asker` over an OpenAI-compatible server.

    A prompt with ``chat`` goes to ``/chat/completions``, one without to ``/completions``. The client waits and asks
    again by itself after 408, 409, 429, 5xx and a broken connection, as long as ``Retry-After`` says (up to the two
    minutes that it honours) or with growing pauses.

    Args:
        base_url: Up to and with ``/v1``. A user and password in it are sent as basic authentication, in place of a key.
        model: Name of the model there.
        api_key_env: Environment variable that holds the API key; none is sent where it is not set. By default
            `OWN_KEY_ENV` at `OWN_HOST`, and no key at any other server: it may be the thief's.
        logprobs: Ask for the likeliest first tokens, until the server refuses or ignores that.
        concurrency: Questions asked at once, 1 to `MAX_CONCURRENCY`. Answers come in order.
        max_retries: How often one question is asked again.
        timeout_s: How long a server may be silent.
    Attributes:
        endpoint: The URL as it is stored and shown.
        model: Name of the model.
        at_once: Questions asked at once.
        sends_key: Whether the server is sent the API key.
    Raises:
        ConfigError: The URL is none, the key cannot stand in a header, or a number is out of range.
        MissingDependencyError: The package ``openai`` is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        logprobs: bool = True,
        concurrency: int = 1,
        max_retries: int = MAX_RETRIES,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if not 1 <= concurrency <= MAX_CONCURRENCY:
            raise ConfigError(f"concurrency is {concurrency}, expected 1 to {MAX_CONCURRENCY}", hint="1 is usual")
        if not model:
            raise ConfigError("the name of the model is empty", hint="pass the name that the server knows it by")
        self.endpoint = endpoint_of(base_url)
        self.model = model
        self.at_once = concurrency
        self._logprobs = logprobs
        self._length = "max_tokens"
        own = OWN_KEY_ENV if urlsplit(base_url).hostname == OWN_HOST else None
        self._key_env = api_key_env or own
        self._key = _read_key(self._key_env) if self._key_env else ""
        self.sends_key = bool(self._key) and urlsplit(base_url).username is None
        self._client = _make_client(base_url, self._key, max_retries=max_retries, timeout_s=timeout_s)

    def __repr__(self) -> str:
        return f"OpenAIAsker({self.endpoint!r}, {self.model!r})"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """See `Asker`."""
        if self.at_once == 1:
            for prompt in prompts:
                yield self._ask_one(prompt, sampling)
            return
        running: list[_Call] = []
        for prompt in prompts:
            running.append(_Call(self, prompt, sampling))
            if len(running) == self.at_once:
                yield running.pop(0).answer()
        for call in running:
            yield call.answer()

    def _ask_one(self, prompt: Prompt, sampling: Sampling) -> Answer:
        import openai

        while True:
            ranked = self._logprobs
            try:
                answer = self._parse(self._send(prompt, sampling, ranked=ranked), chat=prompt.chat)
            except openai.APIStatusError as error:
                if _is_filtered(error):
                    return Answer(refused=True)
                if not self._can_do_without(error, ranked=ranked):
                    raise self._fault(error) from None
            except openai.OpenAIError as error:
                raise self._fault(error) from None
            else:
                # A server that ignores the wish is not asked again: others answer slower or differently for it.
                if ranked and answer.text and not answer.ranked:
                    self._logprobs = False
                return answer

    def _send(self, prompt: Prompt, sampling: Sampling, *, ranked: bool) -> Any:
        """Return the response of one request, its retries included, as the client has it before it is parsed."""
        values: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._length if prompt.chat else "max_tokens": sampling.max_tokens,
        }
        if not prompt.chat:
            logprobs = {"logprobs": _RANKED[False]} if ranked else {}
            return self._client.completions.with_raw_response.create(prompt=prompt_text(prompt), **values, **logprobs)
        messages = [{"role": "user", "content": prompt.text}]
        if prompt.system is not None:
            messages.insert(0, {"role": "system", "content": prompt.system})
        logprobs = {"logprobs": True, "top_logprobs": _RANKED[True]} if ranked else {}
        return self._client.chat.completions.with_raw_response.create(messages=messages, **values, **logprobs)

    def _can_do_without(self, error: Any, *, ranked: bool) -> bool:
        """Return whether something that not every server takes was asked for; the next request goes without it."""
        if error.status_code not in _REFUSED_STATUS:
            return False
        # Newer models of OpenAI know the length by another name only, and their error says so.
        if self._length == "max_tokens" and "max_completion_tokens" in str(error):
            self._length = "max_completion_tokens"
            return True
        self._logprobs = False
        return ranked

    def _parse(self, response: Any, *, chat: bool) -> Answer:
        """Return the answer in a body; the client's own types let through what is not of them."""
        try:
            body = json.loads(response.content)
        except (ValueError, RecursionError):
            kind = str(response.headers.get("content-type", "nothing named"))
            raise EndpointError(
                f"{self.endpoint} answered with {self._quoted(kind)}, not with JSON",
                hint="this is no OpenAI-compatible API, or a page in front of it: check --base-url, it ends in /v1",
            ) from None
        choices = body.get("choices") if isinstance(body, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            said = self._quoted(json.dumps(body.get("error", body) if isinstance(body, dict) else body))
            raise EndpointError(
                f"{self.endpoint} answered without choices: {said}",
                hint="this is no OpenAI-compatible API of this kind: check --base-url and --api",
            )
        answer = _answer_in(choices[0], chat=chat)
        # A server that says the key it was sent must not write it into a transcript.
        ranked = tuple(self._without_key(token) for token in answer.ranked)
        return replace(answer, text=self._without_key(answer.text), ranked=ranked)

    def _fault(self, error: Exception) -> EndpointError:
        """Return one of ours for an error of the client: what happened, and what to do."""
        import openai

        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            said = self._quoted(str(error.message))
            waits = error.response.headers.get("retry-after")
            message = f"{self.endpoint} answered {status}: {said}"
            if status == 429 and waits is not None:
                message = f"{self.endpoint} answered 429 and asks to wait (Retry-After: {self._quoted(waits)}): {said}"
            return EndpointError(message, hint=self._hint(status))
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{self.endpoint} did not answer in time", hint="ask later, or with less at once")
        if isinstance(error, openai.APIConnectionError):
            causes = _causes(error)
            if any(isinstance(cause, ssl.SSLError) for cause in causes):
                return EndpointError(
                    f"no TLS connection to {self.endpoint}: {self._quoted(str(causes[-1]))}",
                    hint="check http or https in --base-url; for an own certificate authority set SSL_CERT_FILE",
                )
            return EndpointError(
                f"cannot reach {self.endpoint}: {self._quoted(str(causes[-1]))}",
                hint="check --base-url, and that the server is up and not behind a proxy that cuts answers",
            )
        return EndpointError(f"{self.endpoint} cannot be asked: {type(error).__name__}", hint="check --base-url")

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            name = self._key_env or "NAME, named with --api-key-env,"
            return f"set the environment variable {name} to an API key that may use {self.model}"
        if status == 404:
            return f"check --model {self.model} and --base-url, which ends in /v1, and --api chat or completions"
        if status == 429:
            return "the limit of this API is reached: ask again later"
        if status >= 500:
            return "the server failed: ask again later"
        return "the server does not take this request: check --model, --api, --temperature and --system"

    def _quoted(self, text: str) -> str:
        return ascii(" ".join(self._without_key(text).split())[:_QUOTED])

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "<API key>") if self._key else text


class _Call:
    """One question in a thread of its own, that a process which ends does not wait for."""

    def __init__(self, asker: OpenAIAsker, prompt: Prompt, sampling: Sampling) -> None:
        self._answer: Answer | None = None
        self._error: WmguardError = EndpointError("a question ended without an answer", hint="ask again")
        self._thread = threading.Thread(target=self._run, args=(asker, prompt, sampling), daemon=True)
        self._thread.start()

    def _run(self, asker: OpenAIAsker, prompt: Prompt, sampling: Sampling) -> None:
        try:
            self._answer = asker._ask_one(prompt, sampling)
        except WmguardError as error:
            self._error = error

    def answer(self) -> Answer:
        self._thread.join()
        if self._answer is None:
            raise self._error
        return self._answer


def endpoint_of(base_url: str) -> str:
    """Return a URL without user, password, query and fragment: what is stored and shown of it.

    Raises:
        ConfigError: Not an http or https URL with a host.
    """
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme not in ("http", "https"):
        # The text is not repeated: it may hold a password.
        raise ConfigError("--base-url is no http or https URL", hint="for example https://api.example.com/v1")
    where = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, where if port is None else f"{where}:{port}", parts.path.rstrip("/"), "", ""))


def _read_key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    # httpx would quote a key that cannot stand in a header in its error.
    if not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"the API key in {name} has characters that no key has", hint=f"set {name} again")
    return key


def _make_client(base_url: str, key: str, *, max_retries: int, timeout_s: float) -> Any:
    try:
        import openai
    except ImportError:
        raise MissingDependencyError(
            "asking an API needs openai", hint="run: pip install 'hf-wmguard[probe]'"
        ) from None

    parts = urlsplit(base_url)
    headers = {"Accept-Encoding": "identity"}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode("ascii")
    return openai.OpenAI(
        base_url=endpoint_of(base_url),
        api_key=key or _NO_KEY,
        default_headers=headers,
        default_query=dict(parse_qsl(parts.query)),
        max_retries=max_retries,
        timeout=timeout_s,
        http_client=openai.DefaultHttpxClient(event_hooks={"response": [_limit_body]}, timeout=timeout_s),
    )


def _limit_body(response: Any) -> None:
    """Bound what is read of a response before any of it is."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        # Not asked for; and a few kilobytes of it can unpack to gigabytes.
        raise EndpointError("the server answered compressed, which was not asked for", hint="check --base-url")
    response.stream = _bounded(response.stream)


def _bounded(stream: Any) -> Any:
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for part in stream:
                count += len(part)
                if count > MAX_BODY_BYTES:
                    raise EndpointError(
                        f"the server answered with more than {MAX_BODY_BYTES} bytes", hint="check --base-url"
                    )
                yield part

        def close(self) -> None:
            stream.close()

    return Bounded()


def _is_filtered(error: Any) -> bool:
    """Whether a refused request is a filter's answer to this one question (Azure says so with a 400)."""
    return error.status_code == 400 and getattr(error, "code", None) in _FILTERS


def _answer_in(choice: Mapping[str, Any], *, chat: bool) -> Answer:
    message = choice.get("message") if chat else choice
    message = message if isinstance(message, dict) else {}
    text = message.get("content" if chat else "text")
    if isinstance(text, list):
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    text = text if isinstance(text, str) else ""
    refused = choice.get("finish_reason") == "content_filter" or bool(message.get("refusal")) or not text.strip()
    return Answer(text=text, ranked=() if refused else _ranked(choice.get("logprobs")), refused=refused)


def _ranked(logprobs: object) -> tuple[str, ...]:
    """Return the likeliest tokens at the first position: of a chat a list of objects, of completions an object."""
    if not isinstance(logprobs, dict):
        return ()
    content, tops = logprobs.get("content"), logprobs.get("top_logprobs")
    found: list[tuple[Any, Any]] = []
    if isinstance(content, list) and content and isinstance(content[0], dict):
        listed = content[0].get("top_logprobs")
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, dict):
                found.append((one.get("token"), one.get("logprob")))
    elif isinstance(tops, list) and tops and isinstance(tops[0], dict):
        found = list(tops[0].items())
    usable = [pair for pair in found if isinstance(pair[0], str) and isinstance(pair[1], int | float)]
    return tuple(token for token, _ in sorted(usable, key=lambda pair: -pair[1])[: _RANKED[True]])


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it came from, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain
