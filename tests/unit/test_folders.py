"""Folders that appear whole or not at all, and who may clear away what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_wmguard.errors import EnvironmentFault, NotFoundError, UsageError
from hf_wmguard.folders import check_new_folder, locked, new_folder, staging_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", ".stage-") as staging:
        (staging / "file").write_text("x")
        assert names(tmp_path) == [staging.name]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize(("error", "raised"), [(OSError(28, "full"), EnvironmentFault), (KeyError(), KeyError)])
def test_or_not_at_all(tmp_path: Path, error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised), new_folder(tmp_path / "out", ".stage-"):
        raise error
    assert names(tmp_path) == []


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not overwritten"), new_folder(tmp_path / "out", ".stage-"):
        (tmp_path / "out" / "theirs").mkdir(parents=True)
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_only_what_nobody_holds_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".stage-stale").mkdir()
    (tmp_path / ".stage-stale" / "file").touch()
    with staging_folder(tmp_path, ".stage-") as first, staging_folder(tmp_path, ".stage-") as second:
        assert names(tmp_path) == sorted([first.name, second.name])
    assert names(tmp_path) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_wmguard.folders import staging_folder\n"
        "with staging_folder(Path(sys.argv[1]), '.stage-'): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with staging_folder(tmp_path, ".stage-"):
            assert len(names(tmp_path)) == 2
        child.send_signal(signal.SIGKILL)
    with staging_folder(tmp_path, ".stage-"):
        assert len(names(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_holder_at_a_time(tmp_path: Path) -> None:
    entered: list[str] = []
    with locked(tmp_path):
        # A process that is forked meanwhile does not keep the lock.
        child = os.fork()
        if child == 0:
            signal.pause()
        thread = threading.Thread(target=lambda: enter(tmp_path, entered))
        thread.start()
        thread.join(0.2)
        assert entered == []
    thread.join()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert entered == ["in"]


def enter(folder: Path, entered: list[str]) -> None:
    with locked(folder):
        entered.append("in")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    long = tmp_path / ("x" * 300)
    for source, out, error in (
        ("none", "out", NotFoundError),
        ("in", "none/out", NotFoundError),
        ("in", "link", UsageError),
        ("in", "full", UsageError),
        ("in", "full/file", UsageError),
        ("in", "in/out", UsageError),
        ("in", long, EnvironmentFault),
        (long, "out", EnvironmentFault),
    ):
        with pytest.raises(error) as caught:
            check_new_folder(tmp_path / source, tmp_path / out)
        assert caught.value.hint
    with pytest.raises(NotFoundError), locked(tmp_path / "none"):
        pass
