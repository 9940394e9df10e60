"""Core dumps: off while keys are held, and as they were afterwards. Each case is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the switches are Linux's")

_START = """
import os, resource
from hf_wmguard.hardening import hold, no_core_dumps, release, switch_off_core_dumps
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
limit = lambda: resource.getrlimit(resource.RLIMIT_CORE)[0]
dumpable = lambda: __import__("ctypes").CDLL(None).prctl(3, 0, 0, 0, 0)
before = limit()
"""


def run(code: str, tmp_path: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Run code where a core would be written into a temporary folder."""
    environment = {name: value for name, value in os.environ.items() if name != "WMGUARD_CORE_DUMPS"}
    process = subprocess.Popen([sys.executable, "-c", _START + code], cwd=tmp_path, env=environment | variables)
    process.wait(60)
    return process


def dumped(process: subprocess.Popen[bytes], tmp_path: Path) -> bool:
    assert process.returncode == -signal.SIGABRT
    return any(tmp_path.iterdir())


def test_limit_and_back(tmp_path: Path) -> None:
    code = """
with no_core_dumps():
    assert limit() == min(1, hard) or hard == -1 and limit() == 1, limit()
    with no_core_dumps():
        pass
    assert limit() in (0, 1)
    assert dumpable() == 1
assert limit() == before
hold(); hold(); release()
assert limit() in (0, 1)
release(); release()
assert limit() == before
try:
    with no_core_dumps():
        raise KeyError
except KeyError:
    assert limit() == before
with no_core_dumps():
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
assert limit() == 0 or before == 0
"""
    assert run(code, tmp_path).returncode == 0


def test_opting_out(tmp_path: Path) -> None:
    code = """
with no_core_dumps():
    assert limit() == before
switch_off_core_dumps()
assert (limit(), dumpable()) == (before, 1)
"""
    assert run(code, tmp_path, WMGUARD_CORE_DUMPS="1").returncode == 0


def test_a_command_is_not_dumpable(tmp_path: Path) -> None:
    assert run("switch_off_core_dumps()\nassert dumpable() == 0 and limit() in (0, 1)", tmp_path).returncode == 0


def test_a_crash_leaves_no_core(tmp_path: Path) -> None:
    if not dumped(run("os.abort()", tmp_path), tmp_path):
        pytest.skip("this machine writes no core files into the working folder, guarded or not")
    for core in tmp_path.iterdir():
        core.unlink()
    assert not dumped(run("hold()\nos.abort()", tmp_path), tmp_path)
    assert not dumped(run("switch_off_core_dumps()\nos.abort()", tmp_path), tmp_path)


def test_threads_share_one_limit(tmp_path: Path) -> None:
    code = """
import threading
def work():
    for _ in range(200):
        with no_core_dumps():
            assert limit() in (0, 1)
threads = [threading.Thread(target=work) for _ in range(8)]
[one.start() for one in threads]
[one.join() for one in threads]
assert limit() == before
"""
    assert run(code, tmp_path).returncode == 0
