"""The command line: what it prints where, how it ends, and that errors are two lines and no traceback."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Run, make_keys, make_model
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_wmguard.cli.main import main
from hf_wmguard.container.recipients import load_identity, load_recipient
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey

Command = Callable[..., object]
REPORT = {
    "verdict",
    "log10_p",
    "alpha_log10",
    "tests_corrected_for",
    "model_id",
    "iteration",
    "slot",
    "signature",
    "triggers",
    "commitment",
    "suspect",
    "transcript",
    "reason",
}
SIGNATURE = {
    "log10_p",
    "correlation",
    "projections",
    "bit_error_rate",
    "payload",
    "payload_decoded",
    "carriers_read",
    "carriers_missing",
    "bytes_read",
    "alignment",
}
TRIGGERS = {"log10_p", "matches", "asked", "null_rate", "queries", "method", "tries", "unusable", "decoys"}


def _where(run: Run) -> list[str]:
    return ["--owner-key", run.where["owner_key"], "--registry", run.where["registry"]]


def _is_error(done, code: int) -> None:  # type: ignore[no-untyped-def]
    assert done.code == code
    assert done.out == ""
    assert [line.split(" ")[0] for line in done.err.splitlines()] == ["error:", "hint:"]


def _text(table: str, *, column: int) -> str:
    """Return the text of one column of a printed table, unfolded."""
    cells = [line.split("│")[1 + column] for line in table.splitlines() if line.count("│") == 3]
    return "".join("".join(cells).split())


@pytest.fixture
def unmarked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A plain folder of the same architecture that was never marked."""
    folder = tmp_path / "unmarked"
    make_model("classification", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def plaintext(guarded: Run, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The guarded model as a plain folder, the way a thief has it."""
    folder = tmp_path / "plain"
    type(guarded.trainer.model).save_pretrained(guarded.trainer.model, folder)
    tokenizer.save_pretrained(folder)
    return folder


# keygen


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["owner", "recipient"])
def test_keygen(kind: str, as_json: bool, wmguard: Command, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.key"
    done = wmguard("keygen", kind, "--out", path, *(["--json"] if as_json else []))
    assert (done.code, done.err) == (0, "")
    public = path.with_name(path.name + ".pub")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    if kind == "owner":
        name = OwnerKey.load(f"file:{path}").key_id()
        secrets = [path.read_bytes().hex(), base64.b64encode(path.read_bytes()).decode()]
    else:
        name = load_identity(f"file:{path}").recipient().to_text().strip()
        assert load_recipient(f"file:{public}").to_text().strip() == name
        secrets = [path.read_text().split()[-1]]
    assert not any(secret in done.out for secret in secrets)
    if as_json:
        assert len(done.out.splitlines()) == 1
        assert json.loads(done.out) == {"kind": kind, "private": str(path), "public": str(public), "id": name}
    else:
        assert str(path) in done.out
        assert name in done.out


@pytest.mark.parametrize("kind", ["owner", "recipient"])
@pytest.mark.parametrize("which", ["", ".pub"])
def test_keygen_overwrites_nothing(kind: str, which: str, wmguard: Command, tmp_path: Path) -> None:
    (tmp_path / f"a.key{which}").write_text("precious")
    done = wmguard("keygen", kind, "--out", tmp_path / "a.key")
    _is_error(done, 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {f"a.key{which}": "precious"}


def test_keygen_without_a_folder(wmguard: Command, tmp_path: Path) -> None:
    _is_error(wmguard("keygen", "owner", "--out", tmp_path / "none" / "a.key"), 4)


# verify


@pytest.mark.parametrize("suspect", ["protected", "plain", "file"])
def test_verify_finds_the_mark(suspect: str, wmguard: Command, guarded: Run, plaintext: Path) -> None:
    path = {"protected": guarded.final, "plain": plaintext, "file": plaintext / "model.safetensors"}[suspect]
    done = wmguard("verify", path, *_where(guarded), "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    report = json.loads(done.out)
    assert set(report) == REPORT
    assert set(report["signature"]) == SIGNATURE
    assert set(report["commitment"]) == {"time", "entry", "timestamped"}
    assert set(report["suspect"]) == {"uri", "sha256"}
    assert report["verdict"] == "detected"
    assert report["log10_p"] <= report["alpha_log10"] == -9
    assert report["triggers"] is None
    assert report["model_id"] == "acme/tiny"
    assert report["signature"]["bit_error_rate"] == 0
    assert report["signature"]["payload_decoded"] is True
    assert report["commitment"]["entry"] == read_manifest(guarded.final)[0].commitment
    assert report["suspect"]["uri"] == str(path)


def test_verify_by_identity_alone_reads_what_the_owner_key_reads(wmguard: Command, guarded: Run) -> None:
    done = wmguard("verify", guarded.root / "own", *_where(guarded), "--identity", guarded.identity, "--json")
    assert done.code == 0
    assert json.loads(done.out)["verdict"] == "detected"


def test_verify_of_another_model(wmguard: Command, guarded: Run, unmarked: Path) -> None:
    done = wmguard("verify", unmarked, *_where(guarded), "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["verdict"] == "not_detected"
    assert report["log10_p"] > -3
    assert report["signature"]["payload_decoded"] is False


def test_verify_of_which_too_little_can_be_read(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    done = wmguard("verify", tmp_path, *_where(guarded), "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["verdict"] == "inconclusive"
    assert report["reason"].startswith("0 of 12 carriers could be read")
    assert "0 of 12 carriers" in " ".join(wmguard("verify", tmp_path, *_where(guarded)).out.split())


def test_level_decides_the_verdict(wmguard: Command, guarded: Run) -> None:
    done = wmguard("verify", guarded.final, *_where(guarded), "--json", "--alpha-log10", -100000)
    assert done.code == 1
    assert json.loads(done.out)["verdict"] == "not_detected"


def test_verify_for_people(wmguard: Command, guarded: Run) -> None:
    done = wmguard("verify", guarded.final, *_where(guarded))
    assert done.code == 0
    assert "detected" in done.out
    # Nothing is cut off, however narrow the terminal: a hash that lacks its end is of no use.
    assert "…" not in done.out
    assert "signature.bit_error_rate" in done.out
    assert _text(done.out, column=1).count(str(read_manifest(guarded.final)[0].commitment)) == 1


def test_a_payload_that_did_not_decode_is_for_machines_only(wmguard: Command, guarded: Run, unmarked: Path) -> None:
    digits = json.loads(wmguard("verify", unmarked, *_where(guarded), "--json").out)["signature"]["payload"]
    assert len(digits) == 64
    assert digits not in _text(wmguard("verify", unmarked, *_where(guarded)).out, column=1)
    marked = json.loads(wmguard("verify", guarded.final, *_where(guarded), "--json").out)["signature"]["payload"]
    assert marked in _text(wmguard("verify", guarded.final, *_where(guarded)).out, column=1)


def test_verify_of_a_run_without_a_save(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    done = wmguard("verify", tmp_path, *_where(guarded))
    _is_error(done, 4)
    assert "trainer.save_model()" in done.err


@pytest.mark.parametrize("key", ["missing", "open", "other", "not a reference"])
def test_verify_with_a_wrong_key(key: str, wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    make_keys(tmp_path)
    path = tmp_path / "owner.key"
    reference = f"file:{path}"
    code = 3
    if key == "missing":
        path.unlink()
        code = 4
    elif key == "open":
        path.chmod(0o644)
    elif key == "not a reference":
        reference = base64.b64encode(path.read_bytes()).decode()
        code = 2
    done = wmguard("verify", guarded.final, "--owner-key", reference, "--registry", guarded.where["registry"])
    _is_error(done, code)
    if key == "not a reference":
        assert reference not in done.err


# probe


def test_probe_of_a_protected_folder(wmguard: Command, guarded: Run) -> None:
    done = wmguard("probe", "--local", guarded.final, *_where(guarded), "--identity", guarded.identity, "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    report = json.loads(done.out)
    assert set(report) == REPORT
    assert set(report["triggers"]) == TRIGGERS
    assert report["signature"] is None
    assert report["verdict"] == "detected"
    assert report["suspect"] == {"uri": str(guarded.final), "sha256": None}


def test_probe_of_a_plain_folder(wmguard: Command, guarded: Run, plaintext: Path) -> None:
    done = wmguard("probe", "--local", plaintext, *_where(guarded))
    assert done.code == 0
    assert "detected" in done.out
    assert "triggers.matches" in done.out


def test_probe_of_another_model(wmguard: Command, guarded: Run, unmarked: Path) -> None:
    done = wmguard("probe", "--local", unmarked, *_where(guarded), "--json")
    assert done.code == 1
    assert json.loads(done.out)["verdict"] == "not_detected"


def test_verify_with_the_answers_of_a_probe(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    path = tmp_path / "t"
    asked = wmguard(
        "probe", "--local", guarded.final, *_where(guarded), "--identity", guarded.identity, "--transcript", path
    )
    assert asked.code == 0
    done = wmguard("verify", guarded.final, *_where(guarded), "--transcript", path, "--json")
    report = json.loads(done.out)
    assert (done.code, report["verdict"]) == (0, "detected")
    assert report["triggers"]["matches"] > 0
    assert report["signature"]["payload_decoded"]
    assert report["transcript"]["uri"] == str(guarded.final)
    assert "answersof" in _text(wmguard("verify", guarded.final, *_where(guarded), "--transcript", path).out, column=0)
    # Without its last line it is no evidence of anything.
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    _is_error(wmguard("verify", guarded.final, *_where(guarded), "--transcript", path), 3)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _wrong_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


def _code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("raise SystemExit('their code has run')")


def _other_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Trainer"]}))


def _cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch exploded'\ntR.")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_no_config, 4),
        (_broken_config, 3),
        (_wrong_type, 3),
        (_code_of_its_own, 3),
        (_other_class, 2),
        (_cut_weights, 3),
        (_pickled_weights, 3),
    ],
)
def test_probe_of_a_folder_that_cannot_be_loaded(
    spoil: Callable[[Path], None],
    code: int,
    wmguard: Command,
    guarded: Run,
    plaintext: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(plaintext)
    done = wmguard("probe", "--local", plaintext, *_where(guarded))
    _is_error(done, code)
    assert "weights_only" not in done.err
    assert "Re-running" not in done.err
    assert "their code has run" not in done.err
    assert not (tmp_path / "exploded").exists()


def test_probe_of_a_protected_folder_without_an_identity(
    wmguard: Command, guarded: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WMGUARD_IDENTITY", raising=False)
    _is_error(wmguard("probe", "--local", guarded.final, *_where(guarded)), 2)
    monkeypatch.setenv("WMGUARD_IDENTITY", guarded.identity)
    assert wmguard("probe", "--local", guarded.final, *_where(guarded)).code == 0


# inspect


@pytest.mark.parametrize("pinned", [False, True])
def test_inspect_needs_no_key(pinned: bool, wmguard: Command, guarded: Run) -> None:
    signer = ["--signer", f"{guarded.where['owner_key']}.pub"] if pinned else []
    done = wmguard("inspect", guarded.root / "own", "--json", *signer)
    assert done.code == 0
    assert done.out.count("\n") == 1
    value = json.loads(done.out)
    manifest, key_id = read_manifest(guarded.root / "own")
    assert value["model_id"] == "acme/tiny"
    assert value["state"] == "complete"
    assert (value["signer"], value["signer_pinned"]) == (key_id, pinned)
    assert value["signature"]["bit_error_rate"] == 0
    assert set(value["headers"]) == {e.name for e in manifest.files if e.name.endswith(".safetensors")}
    assert value["sealed_state"] is True


def test_inspect_for_people(wmguard: Command, guarded: Run) -> None:
    done = wmguard("inspect", guarded.final)
    assert done.code == 0
    manifest, key_id = read_manifest(guarded.final)
    text = _text(done.out, column=1)
    assert str(manifest.commitment) in text
    assert key_id in text
    assert "self-asserted" in text


def test_inspect_notices_every_change(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "wmguard_manifest.json", "wmguard_manifest.sig.json"):
        folder = tmp_path / name
        shutil.copytree(guarded.final, folder)
        data = bytearray((folder / name).read_bytes())
        data[-100] ^= 1
        (folder / name).write_bytes(data)
        _is_error(wmguard("inspect", folder), 3)


def test_inspect_of_what_is_not_protected(wmguard: Command, plaintext: Path, tmp_path: Path) -> None:
    _is_error(wmguard("inspect", plaintext), 4)
    _is_error(wmguard("inspect", tmp_path / "none"), 4)


def test_inspect_with_another_signer(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    make_keys(tmp_path)
    _is_error(wmguard("inspect", guarded.final, "--signer", f"file:{tmp_path / 'owner.key.pub'}"), 3)


# decrypt


@pytest.mark.parametrize("folder", ["final", "own"])
def test_decrypt_gives_the_trained_weights(folder: str, wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = wmguard("decrypt", guarded.root / folder, out, "--identity", guarded.identity)
    assert done.code == 0
    assert "plaintext weights are now in" in " ".join(done.err.split())
    files = [Path(line) for line in done.out.splitlines()]
    assert files
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    trained = guarded.trainer.model.state_dict()
    assert weights.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights.items())
    model = BertForSequenceClassification.from_pretrained(out)
    assert torch.equal(model.classifier.weight, guarded.trainer.model.classifier.weight)
    assert not list(out.glob("wmguard_*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_decrypt_as_json_into_an_empty_folder(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = wmguard("decrypt", guarded.final, tmp_path / "out", "--identity", guarded.identity, "--json")
    assert done.code == 0
    value = json.loads(done.out)
    assert (value["out"], value["files"]) == (str(tmp_path / "out"), ["model.safetensors"])
    assert "tokenizer.json" in value["unsigned"]
    assert value["left_out"] == []


def test_decrypt_names_what_nobody_signed(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    shutil.copytree(guarded.final, tmp_path / "model")
    (tmp_path / "model" / "modeling_\x1b[2J.py").touch()
    done = wmguard("decrypt", tmp_path / "model", tmp_path / "out", "--identity", guarded.identity)
    assert done.code == 0
    copied, left = (line for line in done.err.splitlines() if "signed by nobody" in line)
    assert "tokenizer.json" in copied
    assert left == "signed by nobody, left out: modeling_\\x1b[2J.py"


@pytest.mark.parametrize("moment", ["hf_wmguard.decryption.shutil.copyfile", "hf_wmguard.decryption.write_plain"])
def test_decrypt_on_a_full_disk(
    moment: str, wmguard: Command, guarded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moment, full)
    done = wmguard("decrypt", guarded.final, tmp_path / "out", "--identity", guarded.identity)
    _is_error(done, 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["not empty", "a file", "inside", "itself", "a link"])
def test_decrypt_refuses_the_folder(where: str, wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    shutil.copytree(guarded.final, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    out = {"not empty": "full", "a file": "file", "inside": "model/out", "itself": "model", "a link": "link"}[where]
    before = sorted(tmp_path.rglob("*"))
    done = wmguard("decrypt", tmp_path / "model", tmp_path / out, "--identity", guarded.identity)
    _is_error(done, 2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fault", ["wrong identity", "flipped", "wrong signer", "no identity file"])
def test_decrypt_that_fails_leaves_nothing(fault: str, wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    shutil.copytree(guarded.root / "own", tmp_path / "model")
    identity, more, code = guarded.identity, [], 3
    if fault == "wrong identity":
        identity = f"file:{tmp_path / 'keys' / 'inference.key'}"
    elif fault == "no identity file":
        identity, code = f"file:{tmp_path / 'none'}", 4
    elif fault == "wrong signer":
        more = ["--signer", f"file:{tmp_path / 'keys' / 'owner.key.pub'}"]
    else:
        # In the last of several files, after plaintext of the first has been written.
        last = max((tmp_path / "model").glob("*.safetensors"))
        data = bytearray(last.read_bytes())
        data[-1] ^= 1
        last.write_bytes(data)
    done = wmguard("decrypt", tmp_path / "model", tmp_path / "out", "--identity", identity, *more)
    _is_error(done, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "model"]


# all of them


def _closed(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "some/file")


@pytest.mark.parametrize("command", ["verify", "inspect", "decrypt", "rewrap", "protect"])
def test_what_the_system_refuses_is_one_line(
    command: str, wmguard: Command, guarded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "verify": _where(guarded),
        "inspect": [],
        "decrypt": [tmp_path / "out", "--identity", guarded.identity],
        "rewrap": ["--identity", guarded.identity, "--remove", "x"],
        "protect": [tmp_path / "out", "--recipient", f"{guarded.identity}.pub"],
    }[command]
    _is_error(wmguard(command, "x" * 300, *more), 4)
    # The tests may run as root, whom no permission stops.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", _closed)
        patch.setattr(Path, "is_dir", _closed)
        _is_error(wmguard(command, guarded.final, *more), 4)
    assert list(tmp_path.iterdir()) == []


def test_names_of_strangers_do_not_move_the_cursor(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    for number in range(2):
        save_file({"a\x1b[2J\nhint: b": torch.ones(2, 2)}, tmp_path / f"{number}.safetensors")
    done = wmguard("verify", tmp_path, *_where(guarded))
    _is_error(done, 3)
    assert "a\\x1b[2J\\nhint: b" in done.err


def test_a_home_that_is_none(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    done = wmguard("decrypt", guarded.final, tmp_path / "out", "--identity", "file:~nosuchuser/x")
    _is_error(done, 4)
    assert "~nosuchuser" in done.err


def test_names_are_not_markup(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    # Somebody else names the suspect: [/red] would end a style that never began, which is an exception in rich.
    folder, out, key = tmp_path / "a[/red]", tmp_path / "b[/red]", tmp_path / "c[/red]"
    shutil.copytree(guarded.final, folder)
    out.parent.mkdir()
    key.parent.mkdir()
    for arguments in (
        ["verify", folder, *_where(guarded)],
        ["probe", "--local", folder, *_where(guarded), "--identity", guarded.identity],
        ["inspect", folder],
        ["decrypt", folder, out, "--identity", guarded.identity],
        ["keygen", "owner", "--out", key],
    ):
        done = wmguard(*arguments)
        assert done.code == 0, done.err
        assert "[/red]" in "".join((done.out + done.err).split())
    _is_error(wmguard("verify", tmp_path / "d[/red]", *_where(guarded)), 4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["keygen"],
        ["keygen", "admin", "--out", "x"],
        ["verify", "x"],
        ["verify", "x", "--owner-key", "file:a", "--registry", "r", "--alpha-log10", "x"],
        ["verify", "x", "--owner-key", "file:a", "--registry", "r", "--unknown"],
        ["probe", "--owner-key", "file:a", "--registry", "r"],
        ["decrypt", "x", "y"],
        ["inspect"],
    ],
)
def test_usage_errors(arguments: list[str], wmguard: Command) -> None:
    done = wmguard(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "Usage" in done.err


def test_no_command_prints_a_secret(wmguard: Command, guarded: Run, tmp_path: Path) -> None:
    owner = (guarded.root / "keys" / "owner.key").read_bytes()
    identity = (guarded.root / "keys" / "inference.key").read_text().split()[-1]
    record = Registry(Path(guarded.where["registry"]), OwnerKey(owner)).commitments()[0].body["record"]
    secrets = [owner.hex(), base64.b64encode(owner).decode(), identity, record["salt"], record["triggers"]["texts"][0]]
    for arguments in (
        ["verify", guarded.final, *_where(guarded), "--identity", guarded.identity],
        ["probe", "--local", guarded.final, *_where(guarded), "--identity", guarded.identity],
        ["inspect", guarded.final],
        ["decrypt", guarded.final, tmp_path / "out", "--identity", guarded.identity],
    ):
        for more in ([], ["--json"]):
            done = wmguard(*arguments, *more)
            assert not any(secret in done.out + done.err for secret in secrets)


def test_help_is_quick_and_the_console_script_is_main() -> None:
    script = (
        "import sys\n"
        "from hf_wmguard.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'cryptography'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "--help"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("keygen", "verify", "probe", "inspect", "decrypt"):
        assert command in done.stdout
    (script_of_ours,) = entry_points(group="console_scripts", name="wmguard")
    assert script_of_ours.load() is main


def test_a_fault_of_our_own_is_no_verdict(tmp_path: Path) -> None:
    program = "import sys; from hf_wmguard.cli import main as cli; cli.app = lambda: 1 / 0; cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (70, "")
    assert "ZeroDivisionError" in done.stderr
