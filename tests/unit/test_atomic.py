"""Files appear whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_wmguard.atomic import atomic_file, write_atomic
from hf_wmguard.errors import EnvironmentFault, NotFoundError

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from hf_wmguard.atomic import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def has_unnamed_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        return False
    return True


@pytest.fixture(params=["unnamed", "named"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not has_unnamed_files(tmp_path):
        pytest.skip("this file system has no unnamed files")


@pytest.mark.usefixtures("_way")
class TestBothWays:
    def test_writes_and_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write_atomic(path, b"old")
        write_atomic(path, b"new")
        assert path.read_bytes() == b"new"
        assert names_in(tmp_path) == ["file"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
    def test_exception_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, error: type[BaseException]) -> None:
        path = tmp_path / "file"
        write_atomic(path, b"old")
        expected = EnvironmentFault if error is OSError else error

        def write_half() -> None:
            with atomic_file(path) as file:
                file.write(b"half of it")
                file.flush()
                assert path.read_bytes() == b"old"
                raise error

        with pytest.raises(expected):
            write_half()
        assert path.read_bytes() == b"old"
        assert names_in(tmp_path) == ["file"]

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_mode_is_what_the_umask_gives(self, tmp_path: Path, umask: int, mode: int) -> None:
        path = tmp_path / "file"
        before = os.umask(umask)
        try:
            write_atomic(path, b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode

    def test_a_folder_in_the_way_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "file").mkdir()
        with pytest.raises(EnvironmentFault, match="file"):
            write_atomic(tmp_path / "file", b"x")
        assert names_in(tmp_path) == ["file"]

    def test_a_link_is_replaced_and_its_target_kept(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_bytes(b"target")
        (tmp_path / "link").symlink_to("target")
        write_atomic(tmp_path / "link", b"new")
        assert not (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_bytes() == b"target"

    def test_longest_name(self, tmp_path: Path) -> None:
        path = tmp_path / ("n" * 255)
        write_atomic(path, b"x")
        assert path.read_bytes() == b"x"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "file", b"x")


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomic(Path("file"), b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_killed_process_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    if not has_unnamed_files(tmp_path):
        pytest.skip("this file system has no unnamed files")
    path = tmp_path / "file"
    write_atomic(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]
