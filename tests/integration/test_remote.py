"""A suspect, or a protected model, that is kept on the Hub: judged and loaded without a download."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import largest_file, make_keys, make_marked, make_model, make_tokenizer, save_protected
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_wmguard.loading  # noqa: F401
from hf_wmguard import WatermarkConfig, load_protected, verify
from hf_wmguard.container.recipients import generate_identity
from hf_wmguard.delivery.pulling import PARTIAL_PREFIX, pull
from hf_wmguard.errors import (
    AuthenticationError,
    EnvironmentFault,
    FormatError,
    ManifestError,
    NotFoundError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from hf_wmguard.stores.hub import HubStore
from hf_wmguard.stores.location import parse_location
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.suspects.reader import open_suspect
from hf_wmguard.suspects.remote import open_remote

REPO = "acme/suspect"
WEIGHTS = r"GET .*(safetensors|gguf|/lfs/)"


@dataclass(frozen=True, kw_only=True)
class Marked:
    """A marked model, and what its owner has."""

    root: Path
    config: WatermarkConfig
    model: PreTrainedModel

    @property
    def where(self) -> dict[str, str]:
        return {"owner_key": self.config.owner_key, "registry": self.config.registry}

    @property
    def identity(self) -> str:
        return f"file:{self.root / 'inference.key'}"


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    root = tmp_path_factory.mktemp("remote")
    config, model = make_marked(root)
    return Marked(root=root, config=config, model=model)


@pytest.fixture
def api(hub: Hub) -> HfApi:
    api = HfApi()
    api.create_repo(REPO, private=True)
    return api


def upload(api: HfApi, folder: Path, **kwargs: Any) -> str:
    return str(api.upload_folder(repo_id=REPO, folder_path=folder, **kwargs).oid)


def test_a_sharded_suspect_is_judged_by_ranges(hub: Hub, api: HfApi, marked: Marked, tmp_path: Path) -> None:
    marked.model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    commit = upload(api, tmp_path / "model")
    local = verify(tmp_path / "model", **marked.where)
    seen: list[tuple[int, int, str]] = []
    report = verify(f"hub://{REPO}", **marked.where, progress=lambda *one: seen.append(one))
    assert report.verdict == "detected"
    assert (report.log10_p, report.signature) == (local.log10_p, local.signature)
    assert report.suspect["uri"] == f"hub://{REPO}@{commit}"
    assert report.suspect["revision"] == commit
    assert seen[-1][:2] == (len(seen), len(seen))
    read = report.suspect["read"]
    assert read["bytes"] == sum(size for _, _, size, _ in read["ranges"])
    for name, offset, size_bytes, sha256 in read["ranges"]:
        data = (tmp_path / "model" / name).read_bytes()[offset : offset + size_bytes]
        assert hashlib.sha256(data).hexdigest() == sha256
    names = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert set(report.suspect["sha256_stated"]) == names


def test_a_branch_a_folder_and_a_file_are_found(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    marked.model.save_pretrained(tmp_path / "model")
    upload(api, tmp_path / "model", path_in_repo="runs/last")
    api.create_tag(REPO, tag="v1")
    for suspect in (
        f"hub://{REPO}/runs/last",
        f"hub://{REPO}/runs/last@v1",
        f"hub://{REPO}/runs/last/model.safetensors@main",
    ):
        assert verify(suspect, **marked.where).verdict == "detected"
    with pytest.raises(NotFoundError, match="no weights"):
        verify(f"hub://{REPO}", **marked.where)
    with pytest.raises(NotFoundError, match="no such revision"):
        verify(f"hub://{REPO}@v2", **marked.where)
    with pytest.raises(NotFoundError, match=r"other\.safetensors"):
        verify(f"hub://{REPO}/runs/last/other.safetensors", **marked.where)


def test_an_innocent_is_not_detected(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    torch.manual_seed(7)
    innocent = type(marked.model)(marked.model.config)
    innocent.save_pretrained(tmp_path / "model")
    upload(api, tmp_path / "model")
    assert verify(f"hub://{REPO}", **marked.where).verdict == "not_detected"


def test_a_protected_suspect_is_judged_where_it_is(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config, max_shard_size="300KB")
    upload(api, tmp_path / "model")
    assert verify(f"hub://{REPO}", **marked.where).verdict == "detected"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's own use of it
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_is_read_where_it_is(api: HfApi, tmp_path: Path) -> None:
    model = get_peft_model(make_model("causal", 400), LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    upload(api, tmp_path / "adapter")
    with (
        open_suspect(tmp_path / "adapter") as here,
        open_remote(parse_location(f"hub://{REPO}")) as remote,
        open_suspect(remote) as there,
    ):
        assert there.is_delta
        assert there.shapes() == here.shapes()
        for name, (rows, *_) in here.shapes().items():
            assert torch.equal(there.rows(name, 0, rows), here.rows(name, 0, rows))


def test_a_pickle_is_refused(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save(marked.model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    upload(api, tmp_path / "model")
    with pytest.raises(UnsupportedError, match="pickle"):
        verify(f"hub://{REPO}", **marked.where)


def test_a_gguf_is_judged_where_it_is(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    (tmp_path / "model").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "model" / "model.gguf", "qwen2")
    # Longer than what is kept of a header, as vocabularies are.
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(100_000)])
    for name, tensor in marked.model.state_dict().items():
        if found := names.get_name(name, try_suffixes=(".weight",)):
            kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(found, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    upload(api, tmp_path / "model")
    local = verify(tmp_path / "model", **marked.where)
    report = verify(f"hub://{REPO}", **marked.where)
    assert (report.verdict, report.log10_p) == ("detected", local.log10_p)


def test_the_command_line_judges_a_repo(hub: Hub, api: HfApi, marked: Marked, tmp_path: Path) -> None:
    marked.model.save_pretrained(tmp_path / "model")
    upload(api, tmp_path / "model")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from hf_wmguard.cli.main import main; main()",
            "verify",
            f"hub://{REPO}",
            "--owner-key",
            marked.config.owner_key,
            "--registry",
            marked.config.registry,
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["suspect"]["read"]["requests"] > 0


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_a_protected_repo_is_loaded_without_a_download(
    hub: Hub, api: HfApi, marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config, make_tokenizer(), max_shard_size="300KB")
    commit = upload(api, tmp_path / "model")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    wanted = marked.model.state_dict()
    for where, more in ((REPO, {}), (f"hub://{REPO}@{commit}", {}), (REPO, {"revision": "main"})):
        model = load_protected(where, identity=marked.identity, auto_class=AutoModelForCausalLM, **more)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert model.name_or_path == REPO
    monkeypatch.setenv("WMGUARD_IDENTITY", marked.identity)
    native = AutoModelForCausalLM.from_pretrained(REPO)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in native.state_dict().items())
    finder = PlaintextFinder(wanted)
    cached = [path for path in (tmp_path / "hub-home").rglob("*") if path.is_file()]
    assert cached
    assert sum(finder.count(path.read_bytes()) for path in cached) == 0
    assert not [path for path in cached if path.suffix == ".safetensors"]
    with pytest.raises(UsageError):
        load_protected(REPO, identity=marked.identity, auto_class=AutoModelForCausalLM, base="x")
    with pytest.raises(UnsupportedError, match="check_digests"):
        load_protected(REPO, identity=marked.identity, auto_class=AutoModelForCausalLM, check_digests=True)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's own use of it
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_protected_adapter_is_loaded_from_its_repo(
    api: HfApi, marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model("causal", 400)
    adapter = get_peft_model(make_model("causal", 400), LoraConfig(r=8, target_modules=["q_proj"]))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wanted = get_peft_model_state_dict(adapter)
    save_protected(adapter, tmp_path / "adapter", marked.config)
    upload(api, tmp_path / "adapter")
    monkeypatch.setenv("WMGUARD_IDENTITY", marked.identity)
    loaded = load_protected(REPO, base=base, auto_class=AutoModelForCausalLM)
    assert all(torch.equal(one, wanted[name]) for name, one in get_peft_model_state_dict(loaded).items())
    native = PeftModel.from_pretrained(make_model("causal", 400), REPO)
    assert all(torch.equal(one, wanted[name]) for name, one in get_peft_model_state_dict(native).items())


def test_offline_the_cache_is_used(
    hub: Hub, api: HfApi, marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config)
    upload(api, tmp_path / "model")
    from huggingface_hub import constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="cache"):
        load_protected(REPO, identity=marked.identity, auto_class=AutoModelForCausalLM)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE"):
        verify(f"hub://{REPO}", **marked.where)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_protected(REPO, identity=marked.identity, auto_class=AutoModelForCausalLM)
    assert torch.equal(model.lm_head.weight, marked.model.lm_head.weight)


def test_changed_ciphertext_is_not_loaded(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config)
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    upload(api, tmp_path / "model")
    with pytest.raises(AuthenticationError):
        load_protected(REPO, identity=marked.identity, auto_class=AutoModelForCausalLM)


def test_a_plaintext_file_beside_stops_the_load(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config)
    torch.save({}, tmp_path / "model" / "extra.bin")
    upload(api, tmp_path / "model")
    with pytest.raises(ManifestError, match=r"extra\.bin"):
        load_protected(REPO, identity=marked.identity, auto_class=AutoModelForCausalLM)


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_a_pull_brings_the_folder(hub: Hub, api: HfApi, marked: Marked, tmp_path: Path) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config, make_tokenizer(), max_shard_size="300KB")
    (tmp_path / "model" / "code.py").write_text("print()")
    commit = upload(api, tmp_path / "model", path_in_repo="a/b")
    counted: list[int] = []
    total: list[int] = []
    pulled = pull(
        f"hub://{REPO}/a/b@main",
        tmp_path / "out",
        signer=f"{marked.config.owner_key}.pub",
        started=total.append,
        progress=lambda _, count: counted.append(count),
    )
    assert (pulled.uri, pulled.pinned, pulled.left_out) == (f"hub://{REPO}/a/b@{commit}", True, ("code.py",))
    assert total == [pulled.size_bytes]
    assert sum(counted) > 0
    sent = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.name != "code.py"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == sent
    assert not list(tmp_path.glob(f"{PARTIAL_PREFIX}*"))
    with pytest.raises(UsageError, match="not empty"):
        pull(f"hub://{REPO}/a/b", tmp_path / "out")


def test_a_folder_of_a_repo_may_be_called_like_one_in_it(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_protected(marked.model, folder, marked.config)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").write_text("{{ messages }}")
    # What nobody signed, under a name that is no name.
    (folder / "tokenizer\x1b[2J.json").write_text("{}")
    upload(api, folder, path_in_repo="additional_chat_templates")
    pulled = pull(f"hub://{REPO}/additional_chat_templates", tmp_path / "out")
    assert pulled.left_out == ("tokenizer\x1b[2J.json",)
    assert (tmp_path / "out" / "additional_chat_templates" / "a.jinja").read_text() == "{{ messages }}"
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == set(pulled.files)


def test_a_folder_that_is_not_here_is_named(hub: Hub) -> None:
    with pytest.raises(NotFoundError, match=r"no folder runs/typo, and hub://runs/typo does not exist"):
        load_protected("runs/typo", identity=generate_identity(), auto_class=AutoModelForCausalLM)


def test_a_pull_goes_on_where_it_was(hub: Hub, api: HfApi, marked: Marked, tmp_path: Path) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config, max_shard_size="300KB")
    upload(api, tmp_path / "model")

    class Stop(Exception):
        pass

    def stop(name: str, count: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        pull(f"hub://{REPO}", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(f"{PARTIAL_PREFIX}*"))
    pull(f"hub://{REPO}", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_a_pull_onto_a_full_disk(hub: Hub, api: HfApi, marked: Marked, tmp_path: Path) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config, max_shard_size="300KB")
    upload(api, tmp_path / "model")
    # What hf_xet says of it is not looked into.
    with largest_file(100_000), pytest.raises((EnvironmentFault, StoreError), match=r"too large|check free space"):
        pull(f"hub://{REPO}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # What has arrived is kept, and the same pull goes on with it.
    pull(f"hub://{REPO}", tmp_path / "out")
    assert not list(tmp_path.glob(f"{PARTIAL_PREFIX}*"))


def test_a_pull_of_more_than_the_disk_holds(
    hub: Hub, api: HfApi, marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_protected(marked.model, tmp_path / "model", marked.config)
    upload(api, tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    with pytest.raises(EnvironmentFault, match="has room for 300000 bytes"):
        pull(f"hub://{REPO}", tmp_path / "out")
    assert not hub.traffic.matching(r"^GET .*model\.safetensors")


def test_a_pull_refuses_what_does_not_verify(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_protected(marked.model, folder, marked.config)
    with pytest.raises(NotFoundError, match="no protected folder"):
        pull(f"hub://{REPO}", tmp_path / "out")
    manifest = folder / "wmguard_manifest.json"
    kept = manifest.read_bytes()
    manifest.write_bytes(kept.replace(b'"iteration":"1"', b'"iteration":"2"'))
    upload(api, folder)
    with pytest.raises(ManifestError):
        pull(f"hub://{REPO}", tmp_path / "out")
    manifest.write_bytes(kept)
    (folder / "config.json").write_text("{}\n")
    upload(api, folder)
    with pytest.raises(ManifestError, match=r"config\.json"):
        pull(f"hub://{REPO}", tmp_path / "out")
    with pytest.raises(ManifestError):
        pull(f"hub://{REPO}", tmp_path / "out", signer=f"file:{stranger(tmp_path)}")
    assert not (tmp_path / "out").exists()


def stranger(tmp_path: Path) -> Path:
    (tmp_path / "stranger").mkdir()
    make_keys(tmp_path / "stranger")
    return tmp_path / "stranger" / "owner.key.pub"


def test_a_store_reads_exactly_what_is_asked(api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    data = bytes(range(256)) * 4096
    (tmp_path / "f" / "x.gguf").write_bytes(data)
    upload(api, tmp_path / "f")
    with HubStore(parse_location(f"hub://{REPO}")) as store:
        assert store.files()["x.gguf"].size_bytes == len(data)
        for offset, size_bytes in ((0, 1), (0, len(data)), (1000, 70_000), (len(data) - 1, 1)):
            buffer = bytearray(size_bytes)
            store.read_into("x.gguf", offset, memoryview(buffer))
            assert buffer == data[offset : offset + size_bytes]
        with pytest.raises(NotFoundError):
            store.read_into("y.gguf", 0, memoryview(bytearray(1)))


def test_a_damaged_header_is_named(api: HfApi, marked: Marked, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    upload(api, tmp_path / "m")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        verify(f"hub://{REPO}", **marked.where)
