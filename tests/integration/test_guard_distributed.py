"""Own loops on two CPU processes: one mark, one writer, and failures that everybody hears of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_loop import EPOCHS, STATE_AT
from loops import STEPS_PER_EPOCH
from tiny import make_keys

from hf_wmguard import verify
from hf_wmguard.evidence.manifest import STAGING_PREFIX, check_files, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.training.quality import BEFORE

SLOW = pytest.mark.slow
TESTS = Path(__file__).parents[1]
TIMEOUT_S = 180
STEPS = EPOCHS * STEPS_PER_EPOCH


def start(root: Path, processes: int = 2, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the driver on some processes, and return how it ended."""
    if not (root / "keys").exists():
        make_keys(root / "keys")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(TESTS / "distributed_loop.py"),
            str(root),
            json.dumps(settings),
        ],
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


def run(root: Path, processes: int, **settings: Any) -> list[dict[str, Any]]:
    """Run a part of a loop, and return what each process says of it."""
    done = start(root, processes, quality=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert ranks[0]["exposed"] == []
    for rank in ranks:
        assert rank["world"] == processes
        assert rank["digest"] == ranks[0]["digest"]
        # The main process's numbers count.
        assert rank["metrics"][BEFORE] == 1.0
    return ranks


@SLOW
@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerate", "plain"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["two to one", "one to two"])
def test_resumed_with_another_number_of_processes(tmp_path: Path, accelerated: bool, before: int, after: int) -> None:
    task, form = ("classification", "gradient") if accelerated else ("causal_lm", "decoupled")
    settings = {"accelerated": accelerated, "task": task, "form": form}
    run(tmp_path, before, only_until=STATE_AT, **settings)
    state = read_manifest(tmp_path / "state")[0]
    assert state.state == "ramping"
    where = {"owner_key": f"file:{tmp_path / 'keys' / 'owner.key'}", "registry": str(tmp_path / "registry")}
    ranks = run(tmp_path, after, resume=True, **settings)
    assert all(rank["resumed_at"] == STATE_AT for rank in ranks)
    assert all(rank["steps"] == STEPS - STATE_AT for rank in ranks)
    manifest = read_manifest(tmp_path / "final")[0]
    assert (manifest.state, manifest.step, manifest.commitment) == ("complete", STEPS, state.commitment)
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0
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
