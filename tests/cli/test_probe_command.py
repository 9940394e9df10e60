"""``wmguard probe`` against servers: exit codes, what is printed, and what never is."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint import Owned, Reply, failure, make_owned, serving

from hf_wmguard.evidence.transcript import read_transcript

README = Path(__file__).parents[2] / "README.md"
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def owned(tmp_path: Path) -> Owned:
    return make_owned(tmp_path)


def other(question: str) -> str:
    return f"Well, {question[-40:]}"


def options(owned: Owned, url: str, *more: object) -> list[object]:
    where = ["--owner-key", owned.owner_key, "--registry", owned.registry]
    return ["probe", "--base-url", url, "--model", "suspect", *where, *more]


def test_detected_with_json_and_a_transcript(wmguard, owned: Owned, tmp_path: Path) -> None:
    with serving(lambda question, before: owned.table.get(question, other(question))) as server:
        done = wmguard(*options(owned, server.url, "--json", "--transcript", tmp_path / "t", "--api", "completions"))
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert value["verdict"] == "detected"
    assert value["triggers"]["queries"] == len(server.requests)
    assert value["suspect"]["model"] == "suspect"
    assert read_transcript(tmp_path / "t").report == value
    assert {one["path"] for one in server.requests} == {"/v1/completions"}


def test_what_the_readme_says(wmguard, owned: Owned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```bash\n(wmguard probe .*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with serving(lambda question, before: owned.table.get(question, other(question))) as server:
        command = block.replace("\\\n", " ").replace("http://localhost:8000/v1", server.url)
        assert wmguard(*shlex.split(command)[1:]).code == 0
    assert read_transcript(tmp_path / "suspect.jsonl").report is not None


def test_every_option_reaches_the_server(wmguard, owned: Owned) -> None:
    with serving(lambda question, before: other(question)) as server:
        settings = "--temperature 0.7 --top-p 0.9 --max-tokens 5 --tries 2 --budget 60 --no-decoys --no-logprobs"
        more = ["--method", "fixed", "--system", "Be kind.", "--concurrency", "3", "--alpha-log10", "-6"]
        done = wmguard(*options(owned, server.url, *settings.split(), *more, "--json"))
    value = json.loads(done.out)
    assert (done.code, value["verdict"]) == (1, "not_detected")
    assert (value["triggers"]["method"], value["triggers"]["tries"], value["triggers"]["decoys"]) == ("fixed", 2, 0)
    assert value["triggers"]["queries"] == len(server.requests) == 48
    one = server.requests[0]
    assert (one["temperature"], one["top_p"], one["max_tokens"]) == (0.7, 0.9, 5)
    assert one["messages"][0] == {"role": "system", "content": "Be kind."}
    assert "logprobs" not in one


def test_the_key_is_named_and_never_shown(
    wmguard, owned: Owned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUSPECT_KEY", KEY)
    said = [Reply(text=f"{KEY}"), failure(401, f"bad key {KEY}")]
    for reply in said:
        with serving(lambda question, before, reply=reply: reply if before else "Yes.") as server:
            path = tmp_path / f"t{reply.status}"
            done = wmguard(*options(owned, server.url, "--api-key-env", "SUSPECT_KEY", "--transcript", path))
        assert server.requests[0]["headers"]["authorization"] == f"Bearer {KEY}"
        assert done.code == 1
        assert "is sent the API key" in done.err
        assert "inconclusive" in done.out
        assert KEY not in done.out + done.err
        assert KEY not in path.read_text()


def test_a_server_that_is_no_api_is_exit_4(wmguard, owned: Owned, tmp_path: Path) -> None:
    with serving(lambda question, before: failure(404, "no such model")) as server:
        done = wmguard(*options(owned, server.url, "--transcript", tmp_path / "t"))
    assert done.code == 4
    assert done.out == ""
    error, hint = done.err.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert "404" in error
    assert hint.startswith("hint: ")
    # The same file serves the next try, with the right name.
    with serving(lambda question, before: owned.table.get(question, other(question))) as server:
        assert wmguard(*options(owned, server.url, "--transcript", tmp_path / "t")).code == 0


@pytest.mark.parametrize(
    "arguments",
    [["--base-url", "http://x/v1"], ["--model", "m"], ["--local", "x", "--model", "m"], []],
    ids=" ".join,
)
def test_whom_to_ask_must_be_clear(wmguard, owned: Owned, arguments: list[str]) -> None:
    done = wmguard("probe", *arguments, "--owner-key", owned.owner_key, "--registry", owned.registry)
    assert done.code == 2
    assert "Usage" in done.err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_it_says_how_to_go_on_and_asks_nothing_twice(
    wmguard, owned: Owned, tmp_path: Path, how: signal.Signals
) -> None:
    path = tmp_path / "t"

    def slow(question: str, before: int) -> str:
        time.sleep(0.1)
        return other(question)

    with serving(slow) as server:
        arguments = [str(one) for one in options(owned, server.url, "--transcript", path)]
        script = "from hf_wmguard.cli.main import main; main()"
        with subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True) as process:
            try:
                while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 5):
                    time.sleep(0.05)
                process.send_signal(how)
                _, said = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), said
        if how is signal.SIGINT:
            assert "goes on where this one stopped" in said
            assert "Traceback" not in said
        kept = path.read_bytes()[: path.read_bytes().rindex(b"\n")].count(b"\n")
        assert kept >= 4
        done = wmguard(*arguments, "--json")
    value = json.loads(done.out)
    assert (done.code, value["verdict"], value["triggers"]["queries"]) == (1, "not_detected", 48)
    # What was being answered when the process ended is asked again, and nothing else.
    assert len(server.requests) - len(set(server.asked)) <= 1
