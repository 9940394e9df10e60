"""``protect``: files to files, for anybody's model, and what others make of the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_wmguard.container.inner import DTYPE_BITS
from hf_wmguard.container.plain import PlainFile
from hf_wmguard.container.recipients import generate_identity, load_identity
from hf_wmguard.container.suites import CHACHA20_POLY1305
from hf_wmguard.errors import (
    AuthenticationError,
    EnvironmentFault,
    FormatError,
    ManifestError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from hf_wmguard.evidence.manifest import check_files, read_manifest
from hf_wmguard.evidence.records import MAX_FILES
from hf_wmguard.keys import OwnerKey, write_key_pair
from hf_wmguard.loading import decrypt_folder, load_protected
from hf_wmguard.loading.protected import read_state_dict
from hf_wmguard.protection import STAGING_PREFIX, parse_size, protect_folder


@pytest.fixture
def identity(tmp_path: Path) -> str:
    """Reference to a recipient's private key; the public one is beside it."""
    key = generate_identity()
    write_key_pair(tmp_path / "reader.key", key.to_text().encode(), f"{key.recipient().to_text()}\n".encode())
    return f"file:{tmp_path / 'reader.key'}"


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    make_model("classification", len(tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("# model")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.json").write_text("{}")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hide_names": True},
        {"suite": CHACHA20_POLY1305},
        {"max_shard_bytes": 20_000},
        {"max_shard_bytes": 20_000, "hide_names": True, "threads": 1},
    ],
)
def test_what_is_protected_comes_back(
    model: Path, tmp_path: Path, identity: str, owner_file: Path, options: dict[str, object]
) -> None:
    out = tmp_path / "out"
    result = protect_folder(
        model, out, recipients=(f"{identity}.pub",), owner_key=f"file:{owner_file}", model_id="acme/tiny", **options
    )
    owner = OwnerKey.load(f"file:{owner_file}")
    manifest, signer = read_manifest(out, signer=owner.signing_key().public_key())
    check_files(out, manifest)
    assert signer == result.signer == owner.key_id()
    assert (manifest.model_id, manifest.iteration, manifest.commitment) == ("acme/tiny", "1", None)
    assert (len(result.files) > 1) == ("max_shard_bytes" in options)
    assert_same(read_state_dict(out, (load_identity(identity),)), weights_of(model))
    loaded = load_protected(out, identity=identity, auto_class=AutoModelForSequenceClassification)
    assert_same(loaded.state_dict(), AutoModelForSequenceClassification.from_pretrained(model).state_dict())
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "README.md", "extra/notes.json", *result.files} <= names
    has_index = "max_shard_bytes" in options and "hide_names" not in options
    assert ("model.safetensors.index.json" in names) == has_index
    covered = {entry.name for entry in manifest.files}
    assert {"config.json", "tokenizer.json"} <= covered
    assert "README.md" not in covered
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))


@pytest.mark.parametrize("options", [{}, {"hide_names": True}, {"max_shard_bytes": 20_000}])
def test_no_plaintext_and_no_noise(model: Path, tmp_path: Path, identity: str, options: dict[str, object]) -> None:
    out = tmp_path / "out"
    protect_folder(model, out, recipients=(f"{identity}.pub",), **options)
    plain = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in weights_of(model).values())
    runs = {plain[start : start + 12] for start in range(0, len(plain) - 12, 12)} - {bytes(12)}
    for path in out.rglob("*.*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not any(data[start : start + 12] in runs for start in range(len(data) - 12)), path
        if "hide_names" in options:
            assert b"classifier.weight" not in data, path
    # A loader that knows nothing of ours ends with an error, and never with other weights.
    unaware = "import sys, transformers; transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", unaware, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "protected--load-with-hf_wmguard" in done.stderr.splitlines()[-1]


def test_hidden_shards_are_plain_shards_again(model: Path, tmp_path: Path, identity: str) -> None:
    protect_folder(model, tmp_path / "out", recipients=(f"{identity}.pub",), max_shard_bytes=20_000, hide_names=True)
    done = decrypt_folder(tmp_path / "out", tmp_path / "plain", identity=identity)
    assert len(done.files) > 1
    assert_same(weights_of(tmp_path / "plain"), weights_of(model))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert_same(loaded.state_dict(), AutoModelForSequenceClassification.from_pretrained(model).state_dict())


def test_subfolders_are_signed_and_come_back(model: Path, tmp_path: Path, identity: str, owner_file: Path) -> None:
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    out = tmp_path / "out"
    protect_folder(model, out, recipients=(f"{identity}.pub",), owner_key=f"file:{owner_file}")
    assert "1_Pooling/config.json" in {entry.name for entry in read_manifest(out)[0].files}
    done = decrypt_folder(out, tmp_path / "plain", identity=identity, signer=f"file:{owner_file}.pub")
    assert (done.unsigned, done.left_out) == (("README.md",), ())
    names = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (model, tmp_path / "plain")
    ]
    assert names[0] == names[1]
    (out / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token":  false}')
    with pytest.raises(ManifestError, match="1_Pooling"):
        read_state_dict(out, (load_identity(identity),))


def test_folders_that_cannot_be_walked_are_refused(
    model: Path, tmp_path: Path, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "linked").symlink_to(tmp_path)
    with pytest.raises(UnsupportedError, match="linked"):
        protect_folder(model, tmp_path / "out", recipients=(f"{identity}.pub",))
    (model / "linked").unlink()
    scandir = os.scandir

    def closed(path: str) -> object:
        if Path(path).name == "extra":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(EnvironmentFault, match="cannot look into"):
        protect_folder(model, tmp_path / "out", recipients=(f"{identity}.pub",))
    assert not (tmp_path / "out").exists()


def test_without_an_owner(model: Path, tmp_path: Path, identity: str) -> None:
    result = protect_folder(model, tmp_path / "out", recipients=(f"{identity}.pub",))
    assert not result.pinned
    assert result.model_id == "model"
    assert len(read_state_dict(tmp_path / "out", (load_identity(identity),))) > 3
    with pytest.raises(AuthenticationError):
        read_state_dict(tmp_path / "out", (generate_identity(),))
    with pytest.raises(UsageError, match="nobody could open"):
        protect_folder(model, tmp_path / "more")


def test_bytes_of_any_dtype(tmp_path: Path, identity: str) -> None:
    folder = tmp_path / "quantized"
    folder.mkdir()
    tensors = {
        "packed": torch.arange(32, dtype=torch.int32).reshape(4, 8),
        "scale": torch.ones(4, dtype=torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    protect_folder(folder, tmp_path / "out", recipients=(f"{identity}.pub",))
    got = read_state_dict(tmp_path / "out", (load_identity(identity),))
    assert {name: t.double().tolist() for name, t in got.items()} == {
        n: t.double().tolist() for n, t in tensors.items()
    }


def test_every_dtype_comes_back_byte_for_byte(tmp_path: Path, identity: str) -> None:
    folder, entries, data = tmp_path / "model", {}, b""
    folder.mkdir()
    for number, (dtype, bits) in enumerate(sorted(DTYPE_BITS.items())):
        tensor = bytes(range(number, number + bits))
        span = [len(data), len(data) + bits]
        entries[dtype], data = {"dtype": dtype, "shape": [2, 4], "data_offsets": span}, data + tensor
    entries["empty"] = {"dtype": "F4", "shape": [0, 3], "data_offsets": [len(data), len(data)]}
    (folder / "model.safetensors").write_bytes(header({"__metadata__": {"made": "by hand"}, **entries}) + data)
    protect_folder(folder, tmp_path / "out", recipients=(f"{identity}.pub",), hide_names=True)
    decrypt_folder(tmp_path / "out", tmp_path / "plain", identity=identity)
    with PlainFile(tmp_path / "plain" / "model.safetensors") as file:
        assert file.metadata == {"made": "by hand"}
        assert file.tensors.keys() == entries.keys()
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            info = file.tensors[name].info()
            assert (info.dtype, list(info.shape)) == (entry["dtype"], entry["shape"])
            got = file.tensors[name].part(0, stop - start, memoryview(bytearray(64)))
            assert bytes(got) == data[start:stop]


def spoil(name: str, data: bytes = b"x") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def rename(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "pickle": (spoil("pytorch_model.bin"), UnsupportedError, "would stay plaintext"),
    "pickle of another name": (spoil("old.pt"), UnsupportedError, "would stay plaintext"),
    "gguf": (spoil("model.gguf"), UnsupportedError, "would stay plaintext"),
    "key": (spoil("owner.key"), UnsupportedError, "is a key"),
    "second copy": (spoil("consolidated.safetensors"), UnsupportedError, "not the shards"),
    "weights in a folder": (spoil("extra/model.safetensors"), UnsupportedError, "folder of its own"),
    "cut": (cut, FormatError, "header implies"),
    "garbage": (spoil("model.safetensors", b"\xff" * 100), FormatError, "header of"),
    "empty file": (spoil("model.safetensors", b""), FormatError, "0 bytes"),
    "a missing shard": (rename, NotFoundError, "1 of 2 shards"),
    "no weights": (remove, NotFoundError, "no safetensors"),
    "protected": (spoil("wmguard_manifest.json"), UnsupportedError, "protected already"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_and_nothing_is_left(model: Path, tmp_path: Path, identity: str, case: str) -> None:
    change, error, match = BAD_FOLDERS[case]
    change(model)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        protect_folder(model, tmp_path / "out", recipients=(f"{identity}.pub",))
    assert caught.value.hint  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        header([]),
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}) + b"123",
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}) + b"12345",
        header({"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 4]}}) + b"1234",
        header({"a": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}}) + b"1234",
        header({"a": {"dtype": "U8", "shape": ["4"], "data_offsets": [0, 4]}}) + b"1234",
        header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}) + b"1234",
        header({"a": {"dtype": "U8", "shape": [4]}}) + b"1234",
        header({"__metadata__": {"a": 1}}),
        header({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}) + b"1234",
        (13).to_bytes(8, "little") + b'{"a":1,"a":2}',
        (4 << 30).to_bytes(8, "little"),
    ],
)
def test_malformed_safetensors(tmp_path: Path, identity: str, data: bytes) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError):
        protect_folder(tmp_path / "model", tmp_path / "out", recipients=(f"{identity}.pub",))


def test_outputs_that_are_refused(model: Path, tmp_path: Path, identity: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out in (model, model / "out", tmp_path / "full", tmp_path / "link"):
        with pytest.raises(UsageError):
            protect_folder(model, out, recipients=(f"{identity}.pub",))
    for source, out in ((tmp_path / "nothing", tmp_path / "out"), (model, tmp_path / "no" / "out")):
        with pytest.raises(NotFoundError):
            protect_folder(source, out, recipients=(f"{identity}.pub",))
    (tmp_path / "empty").mkdir()
    protect_folder(model, tmp_path / "empty", recipients=(f"{identity}.pub",))


def test_the_trainers_state_is_left_out(model: Path, tmp_path: Path, identity: str) -> None:
    for name in ("training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(b"secret token")
    (model / ".env").write_bytes(b"secret token")
    result = protect_folder(model, tmp_path / "out", recipients=(f"{identity}.pub",))
    assert result.left_out == ("optimizer.pt", "training_args.bin")
    assert not any(b"secret token" in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_of_two_runs_at_once_one_wins(model: Path, tmp_path: Path, identity: str) -> None:
    out, to, won = tmp_path / "out", (f"{identity}.pub",), []

    def another(name: str, count: int) -> None:
        if not won:
            won.append(protect_folder(model, out, recipients=to, model_id="winner", max_shard_bytes=20_000))

    with pytest.raises(UsageError, match="not overwritten"):
        protect_folder(model, out, recipients=to, model_id="loser", progress=another)
    manifest, _ = read_manifest(out)
    check_files(out, manifest)
    assert manifest.set_id == won[0].set_id
    assert sorted(path.name for path in out.glob("*.safetensors")) == list(won[0].files)
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))


@pytest.mark.parametrize("change", [{"model_id": "\x1b[2J"}, {"iteration": "x" * 300}, {"max_shard_bytes": 4}])
def test_what_no_manifest_can_hold_is_refused_first(tmp_path: Path, identity: str, change: dict[str, object]) -> None:
    (tmp_path / "model").mkdir()
    tensors = {str(number): torch.zeros(1) for number in range(MAX_FILES + 1)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    seen: list[str] = []
    with pytest.raises(UsageError, match=r"model_id|iteration|10001 files") as caught:
        protect_folder(
            tmp_path / "model",
            tmp_path / "out",
            recipients=(f"{identity}.pub",),
            progress=lambda name, count: seen.append(name),
            **change,
        )
    assert caught.value.hint
    assert seen == []


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500 mb", "2GiB", "17")] == [5 * 10**9, 5 * 10**8, 2 << 30, 17]
    for text in ("", "5 elephants", "-1", "0", "1.5GB"):
        with pytest.raises(UsageError):
            parse_size(text)


RUN = """
import sys
from pathlib import Path
from hf_wmguard.protection import protect_folder
protect_folder(sys.argv[1], sys.argv[2], recipients=(sys.argv[3],), threads=2)
assert "torch" not in sys.modules
# Not ru_maxrss, which a process has from the one that started it.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def big(folder: Path, size_bytes: int) -> None:
    folder.mkdir()
    save_file({"t": torch.zeros(size_bytes, dtype=torch.uint8)}, folder / "model.safetensors")


def test_memory_does_not_grow_with_the_model(tmp_path: Path, identity: str) -> None:
    peaks = []
    for size_mib in (1, 256):
        big(tmp_path / f"m{size_mib}", size_mib << 20)
        where = [str(tmp_path / f"m{size_mib}"), str(tmp_path / f"o{size_mib}"), f"{identity}.pub"]
        done = subprocess.run([sys.executable, "-c", RUN, *where], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 30


def test_a_kill_leaves_ciphertext_only_and_the_next_run_clears_up(tmp_path: Path, identity: str) -> None:
    folder, out = tmp_path / "m", tmp_path / "out"
    big(folder, 128 << 20)
    command = [sys.executable, "-c", RUN, str(folder), str(out), f"{identity}.pub"]
    for delay in (0.4, 0.8, 1.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() or read_manifest(out)
        for path in tmp_path.glob(f"{STAGING_PREFIX}*/*.safetensors"):
            assert bytes(4096) not in path.read_bytes()
        if out.exists():
            break
    if not out.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))
    check_files(out, read_manifest(out)[0])
