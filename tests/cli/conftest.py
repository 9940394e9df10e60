"""Run the command line in this process, as the console script does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hf_wmguard.cli.main import main


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def wmguard(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run ``wmguard`` with arguments."""

    # The command's process is its own; here it is the tests', which may be debugged.
    monkeypatch.setenv("WMGUARD_CORE_DUMPS", "1")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["wmguard", *map(str, arguments)])
        capfd.readouterr()
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        assert isinstance(code, int | None)
        out, err = capfd.readouterr()
        return Done(code=code or 0, out=out, err=err)

    return run
