"""A protected folder becomes the model that was saved: lazily, in every way transformers loads, or not at all."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny import guarded_config, make_keys, make_model, save_protected
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    pipeline,
)

from hf_wmguard import load_protected
from hf_wmguard.config import WatermarkConfig
from hf_wmguard.container.files import ProtectedFile, write_protected
from hf_wmguard.container.recipients import load_identity
from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    ManifestError,
    NotFoundError,
    UnsupportedError,
    UsageError,
    WmguardError,
)
from hf_wmguard.evidence.manifest import read_manifest, write_manifest
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading import decrypt_folder
from hf_wmguard.loading.lazy import LazyTensor
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.suspects.protected import file_context, open_dek, open_folder
from hf_wmguard.suspects.tensors import encode

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Protected folders of models that were never trained, and the models."""

    root: Path
    config: WatermarkConfig
    models: dict[str, PreTrainedModel]

    @property
    def identity(self) -> str:
        return f"file:{self.root / 'keys' / 'inference.key'}"

    @property
    def signer(self) -> str:
        return f"file:{self.root / 'keys' / 'owner.key.pub'}"


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(1)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Saved:
    root = tmp_path_factory.mktemp("loading")
    make_keys(root / "keys")
    config = guarded_config(root)
    lm, classifier = make_model("causal_lm", len(tokenizer)), make_model("classification", len(tokenizer))
    lm.generation_config.max_new_tokens = 3
    save_protected(lm, root / "lm", config, tokenizer)
    save_protected(lm, root / "shards", config, tokenizer, max_shard_size="100KB")
    save_protected(classifier, root / "classifier", config, tokenizer)
    moe = mixtral()
    save_protected(moe, root / "moe", config, max_shard_size="50KB")
    torch.manual_seed(2)
    adapter = get_peft_model(
        make_model("classification", len(tokenizer)),
        LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"]),
    )
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_protected(adapter, root / "adapter", config)
    models = {"lm": lm, "shards": lm, "classifier": classifier, "moe": moe, "adapter": adapter}
    return Saved(root=root, config=config, models=models)


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved.root / name, tmp_path / name))


@pytest.fixture
def native(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_IDENTITY", saved.identity)
    monkeypatch.setenv("WMGUARD_SIGNER", saved.signer)


def same(left: nn.Module, right: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    state, other = left.state_dict(), right.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name].to(dtype), other[name]) for name in state)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# Lazily


def test_rows_decrypt_only_their_chunks(saved: Saved, copied: Callable[[str], Path]) -> None:
    folder = copied("lm")
    with open_folder(folder, (load_identity(saved.identity),)) as opened:
        dek = open_dek(folder, opened.manifest, (load_identity(saved.identity),))
        manifest = opened.manifest
    tensor = torch.arange(32.0).reshape(8, 4)
    path, context = folder / "model.safetensors", file_context(manifest, 1, 1)
    write_protected(
        path, {"a": encode("a", tensor), "b": encode("b", tensor)}, dek=dek, context=context, chunk_bytes=64
    )
    # The last byte is in the last chunk of b.
    flip(path, -1)
    with ProtectedFile(path, dek=dek, context=context) as file:
        failed: list[WmguardError] = []
        whole, torn = LazyTensor(file, "a", failed), LazyTensor(file, "b", failed)
        assert whole.get_shape() == [8, 4]
        assert (whole.get_dtype(), whole.dtype, whole.shape) == ("F32", torch.float32, tensor.shape)
        assert whole.is_floating_point()
        assert torch.equal(torn[:4], tensor[:4])
        assert torch.equal(torn[2:4, 1:], tensor[2:4, 1:])
        assert torch.equal(whole[..., 1], tensor[..., 1])
        assert torch.equal(whole[3], tensor[3])
        with pytest.raises(AuthenticationError):
            torn[...]
        # One failure ends the load: nothing is handed out any more, whatever a loader makes of the error.
        with pytest.raises(AuthenticationError, match="'b'"):
            whole[...]


@pytest.mark.parametrize("name", ["lm", "shards", "moe"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"device_map": "auto"}, {"dtype": torch.bfloat16}, {"dtype": "float16", "device_map": {"": "cpu"}}]
)
def test_loads_what_was_saved(saved: Saved, name: str, kwargs: dict[str, Any]) -> None:
    model = load_protected(
        saved.root / name, identity=saved.identity, signer=saved.signer, auto_class=AutoModelForCausalLM, **kwargs
    )
    dtype = {"float16": torch.float16}.get(kwargs.get("dtype"), kwargs.get("dtype", torch.float32))  # type: ignore[call-overload]
    assert same(saved.models[name], model, dtype)
    assert model.dtype == dtype
    assert model.name_or_path == str(saved.root / name)
    if name != "moe":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.generation_config.max_new_tokens == 3


def test_loading_info_and_config_are_passed_on(saved: Saved) -> None:
    config = AutoConfig.from_pretrained(saved.root / "classifier")
    config.problem_type = "single_label_classification"
    model, info = load_protected(
        saved.root / "classifier",
        identity=saved.identity,
        auto_class=AutoModelForSequenceClassification,
        config=config,
        output_loading_info=True,
    )
    assert model.config.problem_type == "single_label_classification"
    assert not any(info.values())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"device_map": {"": "disk"}},
        {"device_map": "auto", "offload_folder": "offload"},
        {"device_map": "auto", "max_memory": {"cpu": 200_000}},
    ],
)
@pytest.mark.parametrize("how", ["load_protected", "from_pretrained"])
def test_disk_offload_is_refused(
    saved: Saved, how: str, kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: None
) -> None:
    monkeypatch.chdir(tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    if how == "load_protected":
        load = functools.partial(load_protected, auto_class=AutoModelForCausalLM)
    with pytest.raises(UnsupportedError, match="disk offload") as caught:
        load(saved.root / "lm", **kwargs)
    assert "max_memory" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_signed_digests_catch_a_forging_recipient(saved: Saved, copied: Callable[[str], Path]) -> None:
    folder = copied("classifier")
    identity = load_identity(saved.identity)
    with open_folder(folder, (identity,)) as opened:
        manifest, dek = opened.manifest, open_dek(folder, opened.manifest, (identity,))
        tensors = {
            name: encode(name, torch.zeros(opened.files[0].info(name).shape)) for name in opened.files[0].names()
        }
        metadata = opened.files[0].metadata
    write_protected(
        folder / "model.safetensors", tensors, dek=dek, context=file_context(manifest, 1, 1), metadata=metadata
    )
    forged = load_protected(folder, identity=identity, auto_class=AutoModelForSequenceClassification)
    assert not forged.classifier.weight.any()
    with pytest.raises(ManifestError, match="SHA-256"):
        load_protected(folder, identity=identity, auto_class=AutoModelForSequenceClassification, check_digests=True)


# After an import, from_pretrained


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [
        ("lm", AutoModelForCausalLM),
        ("shards", AutoModelForCausalLM),
        ("shards", LlamaForCausalLM),
        ("moe", AutoModelForCausalLM),
        ("classifier", AutoModelForSequenceClassification),
    ],
)
def test_from_pretrained_opens_protected_folders(saved: Saved, native: None, name: str, auto_class: Any) -> None:
    model = auto_class.from_pretrained(saved.root / name)
    assert same(saved.models[name], model)
    assert not hasattr(model.config, "transformers_weights")
    assert model.name_or_path == str(saved.root / name)
    assert same(saved.models[name], auto_class.from_pretrained(str(saved.root), subfolder=name))


def test_from_pretrained_takes_its_usual_arguments(saved: Saved, native: None) -> None:
    model = LlamaForCausalLM.from_pretrained(saved.root / "shards", dtype=torch.bfloat16, attention_dropout=0.25)
    assert same(saved.models["lm"], model, torch.bfloat16)
    assert model.config.attention_dropout == 0.25
    assert model.generation_config.max_new_tokens == 3
    body = AutoModel.from_pretrained(saved.root / "classifier", add_pooling_layer=False)
    assert body.pooler is None


def test_pipelines_open_protected_folders(saved: Saved, native: None, texts: list[str]) -> None:
    pipe = pipeline("text-classification", model=str(saved.root / "classifier"), device="cpu")
    assert same(saved.models["classifier"], pipe.model)
    assert pipe(texts[0])[0]["label"].startswith("LABEL_")


def test_plain_folders_load_as_ever(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WMGUARD_IDENTITY", raising=False)
    saved.models["lm"].save_pretrained(tmp_path)
    assert same(saved.models["lm"], AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_model_loaded_natively_saves_as_any_other(saved: Saved, native: None, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved.root / "lm").save_pretrained(tmp_path)
    assert "transformers_weights" not in (tmp_path / "config.json").read_text()
    assert same(saved.models["lm"], AutoModelForCausalLM.from_pretrained(tmp_path))


def _no_identity(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("WMGUARD_IDENTITY")


def _wrong_identity(folder: Path, patch: pytest.MonkeyPatch) -> None:
    make_keys(folder.parent / "others")
    patch.setenv("WMGUARD_IDENTITY", f"file:{folder.parent / 'others' / 'inference.key'}")


def _wrong_signer(folder: Path, patch: pytest.MonkeyPatch) -> None:
    make_keys(folder.parent / "others")
    patch.setenv("WMGUARD_SIGNER", f"file:{folder.parent / 'others' / 'owner.key.pub'}")


def _changed_ciphertext(folder: Path, patch: pytest.MonkeyPatch) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    flip(path, -1)


def _changed_manifest(folder: Path, patch: pytest.MonkeyPatch) -> None:
    path = folder / "wmguard_manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"state":"pending"', b'"state":"ramping"'))


def _no_manifest(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "wmguard_manifest.json").unlink()


def _no_papers(folder: Path, patch: pytest.MonkeyPatch) -> None:
    for path in folder.glob("wmguard_*"):
        path.unlink()


def _plaintext_instead(folder: Path, patch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2, 2)}, sorted(folder.glob("*.safetensors"))[0])


NATIVE_FAULTS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], type[WmguardError]]] = {
    "no identity": (_no_identity, ConfigError),
    "wrong identity": (_wrong_identity, AuthenticationError),
    "wrong signer": (_wrong_signer, ManifestError),
    "changed ciphertext": (_changed_ciphertext, AuthenticationError),
    "changed manifest": (_changed_manifest, ManifestError),
    "no manifest": (_no_manifest, NotFoundError),
    "no papers at all": (_no_papers, NotFoundError),
    "plaintext instead": (_plaintext_instead, ManifestError),
}


@pytest.mark.parametrize("fault", NATIVE_FAULTS)
@pytest.mark.parametrize("name", ["classifier", "shards", "adapter"])
def test_native_loading_fails_closed(
    saved: Saved,
    native: None,
    copied: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    name: str,
) -> None:
    spoil, error = NATIVE_FAULTS[fault]
    folder = copied(name)
    load: Any = AutoModelForCausalLM.from_pretrained
    if name == "classifier":
        load = functools.partial(AutoModelForSequenceClassification.from_pretrained, ignore_mismatched_sizes=True)
    if name == "adapter":
        base = AutoModelForSequenceClassification.from_pretrained(saved.root / "classifier")
        load = functools.partial(PeftModel.from_pretrained, base)
    spoil(folder, monkeypatch)
    with pytest.raises(error) as caught:
        load(folder)
    assert caught.value.hint


# Quantized as it is loaded


def bitsandbytes_config(bits: int) -> Any:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def torchao_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZERS = [
    pytest.param("bitsandbytes", functools.partial(bitsandbytes_config, 4), id="nf4"),
    pytest.param("bitsandbytes", functools.partial(bitsandbytes_config, 8), id="int8"),
    pytest.param("torchao", torchao_config, id="torchao int8"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("package", "make"), QUANTIZERS)
def test_quantized_on_load_as_a_plain_folder_is(
    saved: Saved, native: None, tmp_path: Path, package: str, make: Callable[[], Any]
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    saved.models["lm"].save_pretrained(tmp_path / "plain")
    ids = torch.arange(4, 12)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=make())
    explicit = load_protected(saved.root / "shards", auto_class=AutoModelForCausalLM, quantization_config=make())
    native_one = AutoModelForCausalLM.from_pretrained(saved.root / "lm", quantization_config=make())
    expected = plain(ids).logits
    assert not torch.allclose(expected, saved.models["lm"](ids).logits, atol=1e-6)
    for model in (explicit, native_one):
        assert model.is_quantized
        assert torch.equal(expected, model(ids).logits)


# Without the import

# Nothing of this project is imported here. One process for all: transformers takes seconds to import.
_UNAWARE = """
import json, sys, warnings
from pathlib import Path
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          BertForSequenceClassification, LlamaForCausalLM, pipeline)

warnings.simplefilter("ignore")
root, plain = Path(sys.argv[1]), sys.argv[2]
loads = {}
for name, classes in {"lm": (AutoModel, AutoModelForCausalLM, LlamaForCausalLM),
                      "shards": (AutoModel, AutoModelForCausalLM, LlamaForCausalLM),
                      "classifier": (AutoModelForSequenceClassification, BertForSequenceClassification)}.items():
    for one in classes:
        for kwargs in ({}, {"ignore_mismatched_sizes": True}, {"device_map": "auto", "offload_folder": "offload"}):
            label = f"{name} {one.__name__} {list(kwargs)}"
            loads[label] = lambda n=name, o=one, k=kwargs: o.from_pretrained(root / n, **k)
loads["pipeline lm"] = lambda: pipeline("text-generation", model=str(root / "lm"))
loads["pipeline classifier"] = lambda: pipeline("text-classification", model=str(root / "classifier"))
loads["adapter"] = lambda: PeftModel.from_pretrained(
    AutoModelForSequenceClassification.from_pretrained(plain), root / "adapter")
loads["adapter AutoPeftModel"] = lambda: AutoPeftModelForSequenceClassification.from_pretrained(root / "adapter")
loads["adapter AutoModel"] = lambda: AutoModelForSequenceClassification.from_pretrained(root / "adapter")
loads["adapter ignore"] = lambda: PeftModel.from_pretrained(
    AutoModelForSequenceClassification.from_pretrained(plain), root / "adapter", ignore_mismatched_sizes=True)
found = {}
for name, load in loads.items():
    try:
        model = load()
    except Exception as error:
        found[name] = type(error).__name__
    else:
        base = AutoModelForSequenceClassification.from_pretrained(plain).eval()
        ids = torch.arange(8)[None]
        same = name == "adapter ignore" and torch.equal(base(ids).logits, model.eval()(ids).logits)
        found[name] = "the base alone" if same else "LOADED"
assert not any(name.startswith("hf_wmguard") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.mark.timeout(900)
def test_loaders_that_know_nothing_of_it_fail(saved: Saved, tmp_path: Path) -> None:
    make_model("classification", saved.models["classifier"].config.vocab_size).save_pretrained(tmp_path / "plain")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WMGUARD")}
    done = subprocess.run(
        [sys.executable, "-c", _UNAWARE, str(saved.root), str(tmp_path / "plain")],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # peft drops what does not fit if it is told to, with a warning: an adapter without effect, and no noise.
    assert found.pop("adapter ignore") == "the base alone"
    assert len(found) == 29
    assert set(found.values()) <= {"RuntimeError", "OSError", "FileNotFoundError", "ValueError"}
    assert found["lm AutoModel ['ignore_mismatched_sizes']"] == "FileNotFoundError"


# Adapters


def test_an_adapter_loads_on_its_base(saved: Saved, native: None) -> None:
    adapter = saved.models["adapter"]
    for base in (make_model("classification", adapter.config.vocab_size), saved.root / "classifier"):
        model = load_protected(saved.root / "adapter", base=base, auto_class=AutoModelForSequenceClassification)
        assert isinstance(model, PeftModel)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert same(adapter, model)
    base = AutoModelForSequenceClassification.from_pretrained(saved.root / "classifier")
    assert same(adapter, PeftModel.from_pretrained(base, saved.root / "adapter"))


def test_an_adapter_without_or_with_another_base_is_refused(
    saved: Saved, native: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = saved.root / "adapter"
    with pytest.raises(UnsupportedError, match="adapter") as caught:
        load_protected(folder, auto_class=AutoModelForSequenceClassification)
    assert "base=" in caught.value.hint
    with pytest.raises(UnsupportedError, match="adapter"):
        LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(UsageError, match="needs no base"):
        load_protected(saved.root / "lm", base=saved.models["lm"], auto_class=AutoModelForCausalLM)
    base = make_model("classification", len(tokenizer))
    with pytest.raises(UsageError, match="loaded already"):
        load_protected(folder, base=base, auto_class=AutoModelForSequenceClassification, dtype=torch.bfloat16)
    with pytest.raises(WmguardError):
        load_protected(folder, base=make_model("causal_lm", len(tokenizer)), auto_class=AutoModelForCausalLM)


# What is left of it


def test_a_decrypted_folder_is_plain_again(saved: Saved, tmp_path: Path) -> None:
    saved.models["lm"].save_pretrained(tmp_path / "plain")
    decrypt_folder(saved.root / "lm", tmp_path / "out", identity=saved.identity)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert same(saved.models["lm"], AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_nothing_unsigned_steers_the_model(
    saved: Saved, copied: Callable[[str], Path], native: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("classifier")
    make_model("causal_lm", 100).save_pretrained(tmp_path / "other")
    lm = tmp_path / "bare"
    model = make_model("causal_lm", 100)
    save_protected(model, lm, saved.config)
    owner = OwnerKey.load(saved.config.owner_key)
    manifest, _ = read_manifest(lm)
    entries = tuple(entry for entry in manifest.files if entry.name != "generation_config.json")
    write_manifest(lm, dataclasses.replace(manifest, files=entries), owner)
    (lm / "generation_config.json").write_text('{"max_new_tokens": 7}')
    for load in (AutoModelForCausalLM.from_pretrained, functools.partial(load_protected, auto_class=LlamaForCausalLM)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="hf_wmguard"):
            assert load(lm).generation_config.max_new_tokens is None
        assert "the manifest does not list it" in caplog.text
    for name in ("modeling.py", ".env", "generation_config.json", "notes.txt"):
        (folder / name).write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    done = decrypt_folder(folder, tmp_path / "out", identity=saved.identity, signer=saved.signer)
    assert done.left_out == ("sub/", ".env", "generation_config.json", "modeling.py")
    assert {"notes.txt", "tokenizer.json"} <= set(done.unsigned)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", *done.unsigned} == names


def test_loading_writes_nothing(saved: Saved, native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in saved.root.rglob("*")}
    load_protected(saved.root / "shards", auto_class=AutoModelForCausalLM, device_map="auto")
    AutoModelForCausalLM.from_pretrained(saved.root / "moe")
    assert {path: path.stat().st_mtime_ns for path in saved.root.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []
    assert PlaintextFinder(dict(saved.models["lm"].state_dict())).scan([saved.root]) == {}


def test_a_manifest_covers_the_config_as_it_lies(saved: Saved) -> None:
    assert read_manifest(saved.root / "lm")[0].files
    assert "protected--load-with-hf_wmguard" in (saved.root / "lm" / "config.json").read_text()
