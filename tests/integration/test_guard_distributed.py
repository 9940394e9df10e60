"""Own loops on two CPU processes: one mark, one writer, and failures that everybody hears of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_keys

from hf_wmguard import verify
from hf_wmguard.evidence.manifest import STAGING_PREFIX, check_files, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey

SLOW = pytest.mark.slow
TESTS = Path(__file__).parents[1]
TIMEOUT_S = 180


def start(root: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the driver on two processes, and return how it ended."""
    make_keys(root / "keys")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, str(TESTS / "distributed_loop.py"), str(root), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"bucket_views": True},
        pytest.param({"accelerated": False, "task": "causal_lm", "form": "decoupled"}, marks=SLOW),
    ],
    ids=["accelerate", "plain"],
)
def test_trains_saves_and_resumes_inside_the_marked_phase(tmp_path: Path, settings: dict[str, Any]) -> None:
    done = start(tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["exposed"] == []
    for rank in ranks:
        assert rank["world"] == 2
        assert rank["state"] == "complete"
        assert rank["resumed_at"] == 8
        # The same weights everywhere, and again after going back.
        assert rank["first"] == rank["second"] == ranks[0]["first"]

    state = read_manifest(tmp_path / "state")[0]
    assert state.state == "ramping"
    check_files(tmp_path / "state", state)
    where = {"owner_key": f"file:{tmp_path / 'keys' / 'owner.key'}", "registry": str(tmp_path / "registry")}
    signature = read_manifest(tmp_path / "final")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0
    assert verify(tmp_path / "final", **where).verdict == "detected"
    assert len(Registry(tmp_path / "registry", OwnerKey.load(where["owner_key"])).commitments()) == 1


@SLOW
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"disk_full": True}, ("cannot write", "state failed on another process: EnvironmentFault: cannot write")),
        ({"drift": True, "accelerated": False}, ("1 of 41 parameters differ between processes",)),
    ],
    ids=["disk full", "drift"],
)
def test_what_fails_on_one_process_stops_both(tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    done = start(tmp_path, **settings)
    assert done.returncode != 0
    for text in words:
        assert text in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(STAGING_PREFIX)] == []
    assert not (tmp_path / "state" / "model.safetensors").exists()
