"""``wmguard storage``: what it prints, what it asks, how it ends; and the examples in ``configs/storage``."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hcl2
import pytest
from s3_server import ACCOUNT, MotoServer, moto_server

from hf_wmguard.storage.findings import Audit, Finding, make_audit

CONFIGS = Path(__file__).parents[2] / "configs" / "storage"
ADDRESS = "s3://acme-models/triage"
# As docs/storage.md has it.
NAMES = (
    ("--reader", f"arn:aws:iam::{ACCOUNT}:role/inference"),
    ("--writer", f"arn:aws:iam::{ACCOUNT}:role/trainer"),
    ("--admin", f"arn:aws:iam::{ACCOUNT}:role/break-glass"),
)
COMMAND = ("storage", "lockdown", ADDRESS, *(word for pair in NAMES for word in pair))


@pytest.fixture
def moto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    """A server with a bucket, and us in the role break-glass."""
    with moto_server(tmp_path, monkeypatch) as server:
        with closing(server.client()) as client:
            client.create_bucket(Bucket="acme-models")
        server.assume("break-glass")
        yield server


def test_the_examples_are_what_the_command_gives(wmguard: Any, moto: MotoServer, tmp_path: Path) -> None:
    """``WMGUARD_WRITE_CONFIGS=1`` writes them anew."""
    terraform = tmp_path / "lockdown.tf"
    done = wmguard(*COMMAND, "--dry-run", "--json", "--terraform", terraform)
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    if os.environ.get("WMGUARD_WRITE_CONFIGS"):
        CONFIGS.mkdir(exist_ok=True)
        (CONFIGS / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
        (CONFIGS / "policy.json").write_text(json.dumps(plan["desired"]["policy"], indent=2) + "\n")
        (CONFIGS / "lockdown.tf").write_text(terraform.read_text())
    assert json.loads((CONFIGS / "plan.json").read_text()) == plan
    assert json.loads((CONFIGS / "policy.json").read_text()) == plan["desired"]["policy"]
    assert (CONFIGS / "lockdown.tf").read_text() == terraform.read_text()


def test_the_terraform_is_well_formed() -> None:
    parsed = hcl2.loads((CONFIGS / "lockdown.tf").read_text())
    kinds = {kind.strip('"') for resource in parsed["resource"] for kind in resource}
    assert kinds == {
        "aws_s3_bucket_versioning",
        "aws_s3_bucket_ownership_controls",
        "aws_s3_bucket_server_side_encryption_configuration",
        "aws_s3_bucket_lifecycle_configuration",
        "aws_s3_bucket_public_access_block",
        "aws_s3_bucket_policy",
    }


def test_plan_yes_and_again(wmguard: Any, moto: MotoServer) -> None:
    done = wmguard(*COMMAND, "--dry-run")
    assert done.code == 0
    assert "+++ policy (after)" in done.out
    assert '+  "BlockPublicAcls": true,' in done.out
    # Not a terminal: nothing is asked, nothing is done.
    done = wmguard(*COMMAND)
    assert done.code == 2
    assert "--yes" in done.err
    done = wmguard("storage", "audit", ADDRESS)
    assert done.code == 1
    assert "BlockPublicAcls" in done.out
    done = wmguard(*COMMAND, "--yes", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["applied"][-1] == "policy"
    done = wmguard(*COMMAND, "--yes")
    assert done.code == 0
    assert "nothing to change" in done.out
    done = wmguard("storage", "audit", ADDRESS, "--json")
    assert done.code == 0
    assert json.loads(done.out)["open"] is False


@pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("\n", 1), ("y\n", 0)])
def test_on_a_terminal_it_asks(
    wmguard: Any, moto: MotoServer, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    done = wmguard(*COMMAND)
    assert done.code == code
    assert "Apply these" in done.err
    assert ("nothing was changed" in done.err) is (code == 1)


def test_who_would_be_locked_out_is_told(wmguard: Any, moto: MotoServer) -> None:
    moto.patch.delenv("AWS_SESSION_TOKEN")
    moto.become("alice")
    assert "LOCKS YOU OUT" in wmguard(*COMMAND, "--dry-run").err
    done = wmguard(*COMMAND, "--yes")
    assert done.code == 2
    assert "user/alice" in done.err
    assert "--lock-me-out" in done.err
    assert wmguard(*COMMAND, "--yes", "--lock-me-out").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lockdown", "hub://acme/triage", "--admin", NAMES[0][1]), 2, "no policies"),
        (("lockdown", ADDRESS, "--admin", "*"), 2, "names no role"),
        (("lockdown", ADDRESS, "--admin", ACCOUNT), 2, "everybody in it"),
        (("lockdown", "s3://nobodys-bucket", "--admin", NAMES[0][1]), 4, "no bucket"),
        (("lockdown", "acme-models", "--admin", NAMES[0][1]), 2, "not an address"),
        (("lockdown", ADDRESS), 2, ""),
        (("audit", "s3://nobodys-bucket"), 4, "no bucket"),
        (("audit", "folder"), 2, "not an address"),
    ],
)
def test_bad_input(wmguard: Any, moto: MotoServer, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = wmguard("storage", *arguments)
    assert done.code == code, done.err
    assert message in done.err


def test_an_endpoint_that_is_none(wmguard: Any, moto: MotoServer) -> None:
    done = wmguard("storage", "audit", ADDRESS, "--endpoint-url", "nowhere")
    assert done.code == 2
    done = wmguard("storage", "audit", ADDRESS, "--endpoint-url", "https://127.0.0.1:9")
    assert done.code == 4
    assert "Traceback" not in done.err


def test_the_worst_comes_first() -> None:
    low = Finding(severity="low", what="logging", where="x", detail="")
    high = Finding(severity="high", what="plaintext", where="y", detail="")
    report = make_audit("s3://b", [low, high, low])
    assert report.findings == (high, low)
    assert report.is_open
    assert not Audit(uri="s3://b", findings=(low,)).is_open
