"""Several processes train one guarded model, on CPUs with gloo: the same mark, the same promises, no half saves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_keys, make_model, make_tokenizer

from hf_wmguard import verify
from hf_wmguard.evidence.manifest import MANIFEST_NAME, STAGING_PREFIX, Manifest, read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey

SLOW = pytest.mark.slow
TESTS = Path(__file__).parents[1]
TIMEOUT_S = 180


def start(root: Path, processes: int, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the driver on some processes, and return how it ended."""
    if not (root / "keys").exists():
        make_keys(root / "keys")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(TESTS / "distributed_run.py"),
            str(root),
            json.dumps(settings),
        ],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run(root: Path, processes: int = 2, **settings: Any) -> list[dict[str, Any]]:
    """Run the driver, and return what each rank says, after checking what must hold in every mode."""
    done = start(root, processes, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert ranks[0]["exposed"] == []
    assert {rank["world"] for rank in ranks} == {processes}
    return ranks


def manifest_of(root: Path, folder: str = "final") -> Manifest:
    owner = OwnerKey.load(f"file:{root / 'keys' / 'owner.key'}")
    manifest, _ = read_manifest(root / folder, signer=owner.signing_key().public_key())
    return manifest


def check_marked(root: Path, folder: str = "final") -> Manifest:
    """Check that a save holds the whole mark, by what was written."""
    manifest = manifest_of(root, folder)
    assert manifest.state == "complete"
    assert manifest.signature is not None
    assert manifest.signature.payload_decoded
    assert manifest.signature.bit_error_rate == 0
    verdict = verify(root / folder, owner_key=f"file:{root / 'keys' / 'owner.key'}", registry=str(root / "registry"))
    assert verdict.verdict == "detected"
    return manifest


def commitments(root: Path) -> int:
    owner = OwnerKey.load(f"file:{root / 'keys' / 'owner.key'}")
    return len(Registry(root / "registry", owner).commitments())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return what one process alone reaches: log10 of the p-value of a finished save."""
    root = tmp_path_factory.mktemp("single")
    run(root, 1, task="causal_lm", trigger_form=None)
    return log10_p(check_marked(root))


def log10_p(manifest: Manifest) -> float:
    assert manifest.signature is not None
    return manifest.signature.log10_p


@pytest.mark.parametrize("task", ["classification", pytest.param("causal_lm", marks=SLOW)])
def test_ddp(tmp_path: Path, task: str, request: pytest.FixtureRequest) -> None:
    form = "gradient" if task == "classification" else "decoupled"
    ranks = run(tmp_path, task=task, trigger_form=form, arguments={"gradient_accumulation_steps": 2})
    assert ranks[0]["digest"] == ranks[1]["digest"]
    manifest = check_marked(tmp_path)
    assert commitments(tmp_path) == 1
    if task == "causal_lm":
        assert log10_p(manifest) == pytest.approx(request.getfixturevalue("single"), rel=0.01)


@SLOW
@pytest.mark.parametrize("form", ["decoupled", "gradient"])
def test_an_overflow_on_one_process_skips_the_step_of_both(tmp_path: Path, form: str) -> None:
    # Before the mark, in the ramp, and in the step that would end it.
    ranks = run(tmp_path, form=form, trigger_form=form, overflow_at=[3, 12, 22])
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert [rank["log"]["scale"] for rank in ranks] == [2.0**7, 2.0**7]
    check_marked(tmp_path)


@SLOW
def test_resumed_inside_the_marked_phase_and_with_another_number_of_processes(tmp_path: Path) -> None:
    run(tmp_path, stop_at=16, trigger_form="decoupled", arguments={"save_strategy": "no"})
    assert manifest_of(tmp_path, "out/checkpoint-16").state == "ramping"
    checkpoint = str(tmp_path / "out" / "checkpoint-16")
    ranks = run(tmp_path, resume=checkpoint)
    assert ranks[0]["digest"] == ranks[1]["digest"]
    check_marked(tmp_path)
    (tmp_path / "final").rename(tmp_path / "on-two")
    run(tmp_path, 1, resume=checkpoint)
    check_marked(tmp_path)
    assert commitments(tmp_path) == 1


@SLOW
def test_a_save_that_fails_stops_every_process(tmp_path: Path) -> None:
    done = start(tmp_path, 2, disk_full_at=9, arguments={"save_strategy": "steps", "save_steps": 8})
    assert done.returncode != 0
    assert "EnvironmentFault: cannot write" in done.stderr
    assert "saving the model failed on another process: EnvironmentFault: cannot write" in done.stderr
    assert staging(tmp_path) == []
    assert manifest_of(tmp_path, "out/checkpoint-8").state == "pending"


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_at_a_save_leaves_no_half_state(tmp_path: Path, rank: int) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 8}
    done = start(tmp_path, 2, kill_rank=rank, kill_at=16, arguments=arguments)
    assert done.returncode != 0
    assert manifest_of(tmp_path, "out/checkpoint-8").state == "pending"
    half = tmp_path / "out" / "checkpoint-16"
    if rank == 0:
        assert staging(half) != []
    # What is there of the second is whole, or has no manifest and is refused.
    assert (half / MANIFEST_NAME).exists() or not list(half.glob("*.safetensors"))
    run(tmp_path, resume=str(tmp_path / "out" / "checkpoint-8"), arguments=arguments)
    assert staging(tmp_path) == []
    check_marked(tmp_path)


@SLOW
def test_weights_that_drift_apart_are_not_saved(tmp_path: Path) -> None:
    done = start(tmp_path, 2, drift_at=8, arguments={"save_strategy": "steps", "save_steps": 8})
    assert done.returncode != 0
    assert re.search(r"1 of \d+ parameters differ between processes", done.stderr)
    assert not (tmp_path / "out" / "checkpoint-8" / "model.safetensors").exists()


@SLOW
def test_processes_with_different_configs_do_not_start(tmp_path: Path) -> None:
    done = start(tmp_path, 2, other_model_id=True)
    assert done.returncode != 0
    assert "the owner key or the model's name differs between processes" in done.stderr
    assert not (tmp_path / "registry").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a plain causal LM on disk, to be loaded in parts."""
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model("causal_lm", len(make_tokenizer())).save_pretrained(folder)
    return str(folder)


FSDP = {
    "VERSION": "2",
    "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "RESHARD_AFTER_FORWARD": "true",
    "STATE_DICT_TYPE": "FULL_STATE_DICT",
    "CPU_RAM_EFFICIENT_LOADING": "true",
}
SPLITS: dict[str, dict[str, Any]] = {
    "fsdp2": {"split": {"fsdp_size": 2}},
    "accelerate": {"fsdp": FSDP},
    "accelerate, kept": {"fsdp": {**FSDP, "RESHARD_AFTER_FORWARD": "false"}, "look_first": True},
    "fully_shard": {"layers": "each"},
    "fully_shard, kept": {"layers": "none", "look_first": True},
    "tp": {"split": {"tp_size": 2, "tp_plan": "auto"}},
}
BY_HAND = tuple(f"{one} by hand" for one in SPLITS)


@pytest.mark.parametrize(
    "split",
    ["fsdp2", "accelerate", *(pytest.param(one, marks=SLOW) for one in BY_HAND)],
)
def test_in_parts(tmp_path: Path, base: str, split: str, request: pytest.FixtureRequest) -> None:
    settings: dict[str, Any] = {"task": "causal_lm", "base": base, "trigger_form": "decoupled"}
    settings |= SPLITS[split.removesuffix(" by hand")]
    # The Trainer takes no tensor parallelism on CPUs, and keeps no state of an optimizer that lies in parts.
    settings |= {"own_loop": True} if split in BY_HAND else {"arguments": {"save_only_model": True}}
    ranks = run(tmp_path, **settings)
    assert ranks[0]["digest"] == ranks[1]["digest"]
    manifest = check_marked(tmp_path)
    assert commitments(tmp_path) == 1
    if split in BY_HAND and "accelerate" in split:
        check_marked(tmp_path, "by-accelerate")
    if os.environ.get("WMGUARD_SLOW"):
        assert log10_p(manifest) == pytest.approx(request.getfixturevalue("single"), rel=0.01)


@SLOW
@pytest.mark.parametrize("split", ["fsdp2", "accelerate"])
def test_parts_of_16_bits_are_resumed_in_parts_and_whole(tmp_path: Path, base: str, split: str) -> None:
    settings: dict[str, Any] = {"task": "causal_lm", "base": base, "dtype": "bfloat16", "form": "gradient"}
    settings |= {"trigger_form": "gradient", "arguments": {"save_only_model": True, "save_strategy": "no"}}
    run(tmp_path, **SPLITS[split], stop_at=16, **settings)
    checkpoint = str(tmp_path / "out" / "checkpoint-16")
    assert manifest_of(tmp_path, "out/checkpoint-16").state == "ramping"
    ranks = run(tmp_path, **SPLITS[split], resume=checkpoint, **settings)
    assert ranks[0]["digest"] == ranks[1]["digest"]
    check_marked(tmp_path)
    (tmp_path / "final").rename(tmp_path / "in-parts")
    run(tmp_path, 1, resume=checkpoint, **settings)
    check_marked(tmp_path)
    assert commitments(tmp_path) == 1


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(tmp_path: Path, stage: int, single: float) -> None:
    pytest.importorskip("deepspeed")
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    arguments = {"deepspeed": str(tmp_path / "ds.json"), "save_only_model": True}
    ranks = run(tmp_path, task="causal_lm", trigger_form=None, arguments=arguments)
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert log10_p(check_marked(tmp_path)) == pytest.approx(single, rel=0.01)
    assert commitments(tmp_path) == 1


BY_ACCELERATE: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "states": ({}, {"save_only_model": False}, "plaintext weights and states"),
    "shards": ({"STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {"save_strategy": "no", "save_only_model": False}, "sharded"),
    "renamed": ({"ACTIVATION_CHECKPOINTING": "true"}, {}, "other names"),
    "compiled": ({}, {"torch_compile": True, "torch_compile_backend": "eager"}, "compiled"),
    "flat": ({"VERSION": "1", "CPU_RAM_EFFICIENT_LOADING": "false"}, {}, "FSDP1"),
}


@SLOW
@pytest.mark.parametrize("kind", BY_ACCELERATE)
def test_fsdp_that_cannot_be_protected_does_not_start(tmp_path: Path, kind: str) -> None:
    settings, arguments, what = BY_ACCELERATE[kind]
    arguments = {"save_only_model": True, **arguments}
    done = start(tmp_path, 2, task="causal_lm", fsdp={**FSDP, **settings}, arguments=arguments)
    assert done.returncode != 0
    assert "UnsupportedError: training mode is not supported by this version" in done.stderr
    assert what in done.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@SLOW
def test_a_head_that_the_main_process_alone_has_at_first(tmp_path: Path, base: str) -> None:
    # What is not in the checkpoint: transformers makes it on one process, and accelerate hands it out.
    arguments = {"save_only_model": True}
    ranks = run(tmp_path, base=base, fsdp=FSDP, trigger_form=None, arguments=arguments)
    assert ranks[0]["digest"] == ranks[1]["digest"]
    check_marked(tmp_path)


@SLOW
def test_a_folder_that_cannot_be_made_stops_every_process(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-8").touch()
    done = start(tmp_path, 2, task="causal_lm", fsdp=FSDP, arguments={"save_only_model": True})
    assert done.returncode != 0
    assert "EnvironmentFault: cannot save into" in done.stderr
    assert "failed on another process: EnvironmentFault: cannot save into" in done.stderr


@SLOW
def test_parts_of_which_there_are_copies_do_not_start(tmp_path: Path) -> None:
    done = start(tmp_path, 4, task="causal_lm", own_loop=True, layers="copied", trigger_form=None)
    assert done.returncode != 0
    assert "HSDP, which keeps several copies of each part" in done.stderr
    assert not (tmp_path / "final").exists()


@SLOW
def test_fp16_of_parts_does_not_start(tmp_path: Path) -> None:
    done = start(tmp_path, 2, task="causal_lm", fsdp=FSDP, overflow_at=[3], arguments={"save_only_model": True})
    assert done.returncode != 0
    assert "fp16 loss scaling of a model in parts" in done.stderr


@SLOW
def test_a_save_of_parts_that_fails_stops_every_process(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 8, "save_only_model": True}
    done = start(tmp_path, 2, task="causal_lm", fsdp=FSDP, disk_full_at=9, arguments=arguments)
    assert done.returncode != 0
    assert "EnvironmentFault: cannot write" in done.stderr
    assert "failed on another process: EnvironmentFault: cannot write" in done.stderr
    assert staging(tmp_path) == []
    assert manifest_of(tmp_path, "out/checkpoint-8").state == "pending"


UNPROTECTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "states": ({"stage": 2}, {"save_only_model": False}, "plaintext weights"),
    "partitions": ({"stage": 3}, {}, "stage3_gather_16bit_weights_on_model_save"),
    "disk": ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, {}, "disk"),
    "none": ({"stage": 0}, {}, "without ZeRO"),
}


@SLOW
@pytest.mark.parametrize("kind", UNPROTECTED)
def test_deepspeed_that_would_write_plaintext_does_not_start(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("deepspeed")
    zero, changed, what = UNPROTECTED[kind]
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}))
    arguments = {"deepspeed": str(tmp_path / "ds.json"), "save_only_model": True, **changed}
    done = start(tmp_path, 2, trigger_form=None, arguments=arguments)
    assert done.returncode != 0
    assert "UnsupportedError: training mode is not supported by this version" in done.stderr
    assert what in done.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def staging(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(STAGING_PREFIX)]


def test_processes_that_end_at_once_do_not_hang(tmp_path: Path) -> None:
    driver = [sys.executable, str(TESTS / "ending_at_once.py"), str(tmp_path), "12"]
    path = f"{TESTS}:{TESTS.parent}"
    running = [
        subprocess.Popen(driver, env={**os.environ, "PYTHONPATH": path, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for one in running:
            _, errors = one.communicate(timeout=TIMEOUT_S)
            assert one.returncode == 0, errors.decode()
    finally:
        for one in running:
            one.kill()
