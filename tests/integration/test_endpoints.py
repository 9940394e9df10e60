"""The OpenAI client against a real server on loopback that misbehaves in every way that servers do."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint import Owned, Reply, failure, make_owned, serving

from hf_wmguard import probe
from hf_wmguard.errors import ConfigError, EndpointError, MissingDependencyError
from hf_wmguard.evidence.transcript import read_transcript
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.openai import MAX_BODY_BYTES, OpenAIAsker, endpoint_of
from hf_wmguard.watermark.answers import Answer, Prompt

KEY = "sk-very-secret-0123456789"
KEYED = {"api_key_env": "OPENAI_API_KEY"}


@pytest.fixture(autouse=True)
def _api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def owned(tmp_path: Path) -> Owned:
    return make_owned(tmp_path)


_open: list[OpenAIAsker] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def other(question: str) -> str:
    return f"Well, {question[-40:]}"


def asker(url: str, **changes: object) -> OpenAIAsker:
    _open.append(OpenAIAsker(url, "suspect", **{"max_retries": 1, "timeout_s": 5, **KEYED, **changes}))  # type: ignore[arg-type]
    return _open[-1]


def ask(url: str, *, chat: bool = True, system: str | None = None, **changes: object) -> Answer:
    (answer,) = asker(url, **changes).ask([Prompt(text="What is it?", chat=chat, system=system)], Sampling())
    return answer


def fault(reply: Reply) -> EndpointError:
    """The error that a server which always answers so ends in."""
    with serving(lambda question, before: reply) as server, pytest.raises(EndpointError) as caught:
        ask(server.url)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


def test_chat_and_completions_say_what_was_asked() -> None:
    with serving(lambda question, before: "Certainly.") as server:
        assert ask(server.url, system="Be kind.").text == "Certainly."
        assert ask(server.url, system="Be kind.", chat=False).text == "Certainly."
    chat, completion = server.requests[0], server.requests[-1]
    assert chat["path"] == "/v1/chat/completions"
    assert chat["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is it?"},
    ]
    assert completion["path"] == "/v1/completions"
    assert completion["prompt"] == "Be kind.\n\nWhat is it?"
    for one in (chat, completion):
        assert (one["model"], one["temperature"], one["top_p"], one["max_tokens"]) == ("suspect", 0.0, 1.0, 12)
        assert one["headers"]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_marked_server_is_detected_and_an_innocent_one_is_not(owned: Owned, concurrency: int) -> None:
    for table, verdict in ((owned.table, "detected"), ({}, "not_detected")):
        with serving(lambda question, before, table=table: table.get(question, other(question))) as server:
            report = probe(asker(server.url, concurrency=concurrency), **owned.where)
        assert report.verdict == verdict
        assert report.triggers.queries == len(server.requests) == len(set(server.asked))
        assert report.suspect == {"uri": server.url, "sha256": None, "model": "suspect"}


def test_answers_come_in_order_though_the_first_is_the_slowest() -> None:
    def slow(question: str, before: int) -> str:
        time.sleep(0.3 if question == "0" else 0.0)
        return f"answer {question}"

    with serving(slow) as server:
        prompts = [Prompt(text=str(i), chat=True) for i in range(9)]
        answers = list(asker(server.url, concurrency=3, logprobs=False).ask(prompts, Sampling()))
    assert [one.text for one in answers] == [f"answer {i}" for i in range(9)]


def test_a_rate_limit_is_waited_for() -> None:
    def limited(question: str, before: int) -> Reply | str:
        return "Yes." if before else failure(429, "slow down", **{"Retry-After": "1"})

    with serving(limited) as server:
        start = time.monotonic()
        assert ask(server.url).text == "Yes."
        assert 1.0 <= time.monotonic() - start < 4.0


def test_a_wait_longer_than_the_client_honours_ends_at_once() -> None:
    start = time.monotonic()
    error = fault(failure(429, "slow down", **{"Retry-After": "3600"}))
    assert "429" in error.message
    assert "Retry-After: '3600'" in error.message
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize(
    ("reply", "message", "hint"),
    [
        (failure(401, "no such key"), "401", "OPENAI_API_KEY"),
        (failure(403, "not for you"), "403", "OPENAI_API_KEY"),
        (failure(404, "no model of this name"), "404.*no model of this name", "--model suspect"),
        (failure(429, "quota"), "429", "later"),
        (failure(500, "oh no"), "500", "later"),
        (failure(400, "bad"), "400", "--temperature"),
        (Reply(body=b"<html>Sign in</html>", kind="text/html"), "'text/html', not with JSON", "/v1"),
        (Reply(body=b"<html>Sign in</html>"), "not with JSON", "/v1"),
        (Reply(body=b'{"choices": [{"mess'), "not with JSON", "/v1"),
        (Reply(body=b"\xff\xfe"), "not with JSON", "/v1"),
        (Reply(body=b"[" * 200_000), "not with JSON", "/v1"),
        (Reply(body=b"[]"), "without choices", "--api"),
        (Reply(body=b'{"choices": []}'), "without choices", "--api"),
        (Reply(body=b'{"error": "unknown"}'), "without choices.*unknown", "--api"),
        (Reply(body=b"x" * (MAX_BODY_BYTES + 1)), "more than", "/v1|--base-url"),
        (Reply(text="Yes.", headers={"Content-Encoding": "gzip"}), "compressed", "--base-url"),
        (Reply(text="Yes.", missing_bytes=5), "cannot reach", "--base-url"),
    ],
    ids=lambda value: "" if isinstance(value, Reply) else value,
)
def test_every_fault_has_a_name_and_a_hint(reply: Reply, message: str, hint: str) -> None:
    error = fault(reply)
    assert re.search(message, error.message)
    assert re.search(hint, error.hint)


def test_a_key_that_a_server_repeats_is_not_shown() -> None:
    for status in (400, 401, 500):
        assert "<API key>" in fault(failure(status, f"your key {KEY} is bad")).message
    assert "<API key>" in fault(Reply(body=f'{{"error": "{KEY}"}}'.encode())).message


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match="cannot reach http"):
        ask(f"http://127.0.0.1:{port}/v1", max_retries=0)
    with pytest.raises(EndpointError, match="cannot reach"):
        ask("http://no-such-host.invalid/v1", max_retries=0)


def test_a_server_that_hangs() -> None:
    def hang(question: str, before: int) -> str:
        time.sleep(1.0)
        return "late"

    with serving(hang) as server, pytest.raises(EndpointError, match="did not answer in time"):
        ask(server.url, timeout_s=0.2, max_retries=0)


def test_a_certificate_of_nobody_known(tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    pem = tmp_path / "both.pem"
    subprocess.run([*command.split(), "-keyout", pem, "-out", tmp_path / "c.pem"], check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "c.pem").read_bytes())
    with serving(lambda question, before: "Yes.", certificate=pem) as server:
        with pytest.raises(EndpointError, match="no TLS connection") as caught:
            ask(server.url, max_retries=0)
        assert "SSL_CERT_FILE" in caught.value.hint
    with serving(lambda question, before: "Yes.") as server, pytest.raises(EndpointError, match="no TLS connection"):
        ask(server.url.replace("http:", "https:"), max_retries=0)


def test_refusals_in_every_spelling() -> None:
    for reply in (
        Reply(text=None, message={"refusal": "I cannot."}),
        Reply(text="", choice={"finish_reason": "content_filter"}),
        Reply(text="half an ans", choice={"finish_reason": "content_filter"}),
        Reply(text=None),
        Reply(text=" \n"),
        Reply(body=b'{"choices": [{"message": null}]}'),
        Reply(status=400, body=b'{"error": {"message": "filtered", "code": "content_filter"}}'),
    ):
        with serving(lambda question, before, reply=reply: reply) as server:
            assert ask(server.url).refused
    with serving(lambda question, before: Reply(text=[{"type": "text", "text": "parts"}])) as server:  # type: ignore[arg-type]
        assert ask(server.url) == Answer(text="parts")


def test_likeliest_tokens_are_used_where_they_are_told() -> None:
    chat = {"content": [{"token": "b", "top_logprobs": [{"token": "b", "logprob": -2}, {"token": "a", "logprob": -1}]}]}
    legacy = {"tokens": ["b"], "top_logprobs": [{"b": -2.0, "a": -1.0}]}
    with serving(lambda question, before: Reply(text="b", choice={"logprobs": chat})) as server:
        assert ask(server.url).ranked == ("a", "b")
    with serving(lambda question, before: Reply(text="b", choice={"logprobs": legacy})) as server:
        assert ask(server.url, chat=False).ranked == ("a", "b")
    for odd in ({"content": None}, {"content": [3]}, {"content": [{"top_logprobs": [7, {"token": 1}]}]}, [], "x"):
        with serving(lambda question, before, odd=odd: Reply(text="b", choice={"logprobs": odd})) as server:
            assert ask(server.url).ranked == ()


def test_likeliest_tokens_are_wished_for_once_only() -> None:
    prompts = [Prompt(text=str(i), chat=True) for i in range(3)]
    with serving(lambda question, before: "Yes.") as server:
        list(asker(server.url).ask(prompts, Sampling()))
    assert ["logprobs" in one for one in server.requests] == [True, False, False]
    with serving(lambda question, before: "Yes." if before else failure(400, "no logprobs here")) as server:
        assert len(list(asker(server.url).ask(prompts, Sampling()))) == 3
    assert ["logprobs" in one for one in server.requests] == [True, False, False, False]
    with serving(lambda question, before: "Yes.") as server:
        list(asker(server.url, logprobs=False).ask(prompts, Sampling()))
    assert not any("logprobs" in one for one in server.requests)


def test_the_other_name_of_the_length_is_found() -> None:
    def newer(question: str, before: int) -> Reply | str:
        return failure(400, "Use 'max_completion_tokens' instead.") if "max_tokens" in server.requests[-1] else "Yes."

    with serving(newer) as server:
        assert ask(server.url).text == "Yes."
    assert server.requests[-1]["max_completion_tokens"] == 12


def test_blocked_after_some_questions_and_gone_on_with(owned: Owned, tmp_path: Path) -> None:
    open_again = False

    def blocking(question: str, before: int) -> Reply | str:
        if before >= 6 and not open_again:
            return failure(429, "enough for today", **{"Retry-After": "86400"})
        return owned.table.get(question, other(question))

    path = tmp_path / "transcript.jsonl"
    with serving(blocking) as server:
        report = probe(asker(server.url), **owned.where, transcript=path)
        assert report.verdict == "inconclusive"
        assert "stopped after 6 of 48 questions" in report.reason
        assert "Retry-After: '86400'" in report.reason
        answered = [one.prompt for one in read_transcript(path).asked]
        del server.requests[6:]
        open_again = True
        report = probe(asker(server.url), **owned.where, transcript=path)
    assert report.verdict == "detected"
    assert server.asked[:6] == answered
    assert len(set(server.asked)) == len(server.asked) == report.triggers.queries
    assert KEY not in path.read_text()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [("", "refused or empty"), ("I am only a calculator.", "the same text"), (Reply(text=None), "refused or empty")],
)
def test_a_server_that_says_nothing_is_inconclusive(owned: Owned, reply: Reply | str, reason: str) -> None:
    with serving(lambda question, before: reply) as server:
        report = probe(asker(server.url), **owned.where)
    assert report.verdict == "inconclusive"
    assert reason in report.reason


def test_secrets_of_the_address_are_neither_stored_nor_shown(owned: Owned, tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    with serving(lambda question, before: other(question)) as server:
        url = server.url.replace("http://", "http://me:pass%40word@") + "?token=hidd3n"
        one = asker(url)
        report = probe(one, **owned.where, transcript=path)
    shown = f"{one!r} {report} {path.read_text()}"
    assert [word for word in ("pass%40", "pass@", "hidd3n", "me:", KEY) if word in shown] == []
    assert server.requests[0]["path"] == "/v1/chat/completions?token=hidd3n"
    # user:password in place of the key
    assert server.requests[0]["headers"]["authorization"] == "Basic bWU6cGFzc0B3b3Jk"


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("http://u:p@[::1]:8000/v1?k=1#f", "http://[::1]:8000/v1"),
        ("https://u@Example.com", "https://example.com"),
    ],
)
def test_what_is_shown_of_an_address(url: str, endpoint: str) -> None:
    assert endpoint_of(url) == endpoint


@pytest.mark.parametrize("url", ["", "api.example.com/v1", "ftp://x", "http://", "http://u:pw@:80", "http://x:pw@y:z"])
def test_an_address_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAIAsker(url, "m")
    assert "pw" not in str(caught.value)


def test_a_key_that_is_none_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-\u043a\u043b\u044e\u0447")
    with pytest.raises(ConfigError, match="the API key in OTHER_KEY") as caught:
        OpenAIAsker("http://localhost/v1", "m", api_key_env="OTHER_KEY")
    assert "sk-" not in str(caught.value)
    for change in ({"concurrency": 0}, {"concurrency": 65}, {"model": ""}):
        with pytest.raises(ConfigError):
            OpenAIAsker(**{"base_url": "http://localhost/v1", "model": "m", **change})  # type: ignore[arg-type]


def test_a_key_that_is_not_named_goes_to_its_own_server_alone() -> None:
    with serving(lambda question, before: failure(401, "no key")) as server, pytest.raises(EndpointError) as caught:
        ask(server.url, api_key_env=None)
    assert KEY not in str(server.requests[0]["headers"])
    assert "--api-key-env" in caught.value.hint
    for url in (
        "https://api.openai.com.evil.example/v1",
        "https://evil.example/api.openai.com",
        "https://openai.com/v1",
    ):
        assert not asker(url, api_key_env=None).sends_key
    assert asker("https://api.openai.com/v1", api_key_env=None).sends_key


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(lambda question, before: "Yes.") as server:
        assert ask(server.url).text == "Yes."
    assert server.requests[0]["headers"].get("authorization") in (None, "Bearer none")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependencyError, match=r"hf-wmguard\[probe\]"):
        asker("http://localhost/v1")


def test_a_server_may_not_send_a_bomb() -> None:
    with serving(lambda question, before: "Yes.") as server:
        ask(server.url)
    assert server.requests[0]["headers"]["accept-encoding"] == "identity"
