"""LoRA through the Trainer: the mark lies inside the adapter, and reads from all that an adapter can be turned into."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from tiny import Recorder, StopAt, build_trainer, digest_weights, make_keys, make_model, make_rows
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_wmguard import protect_trainer, verify
from hf_wmguard.config import ProtectionConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.container.recipients import load_identity
from hf_wmguard.errors import CapacityError, ConfigError, UnsupportedError, WmguardError
from hf_wmguard.evidence.manifest import Manifest, read_manifest
from hf_wmguard.loading import decrypt_folder, load_protected, load_suspect, read_state_dict
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.callback import WatermarkCallback
from hf_wmguard.training.sharded import backend_of
from hf_wmguard.watermark.lowrank import adapter_projections
from hf_wmguard.watermark.record import WatermarkRecord
from hf_wmguard.watermark.signature import Reading, project, read_signature

pytestmark = [
    # Without a cached base peft cannot compare vocabularies, and says so at every save.
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
RANK, EPOCHS = 8, 4
Make = Callable[..., Any]


def adapt(model: nn.Module, **changes: Any) -> PeftModel:
    settings: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    return get_peft_model(model, LoraConfig(**{**settings, **changes}))


@dataclass(frozen=True, kw_only=True)
class LoraRun:
    """A finished guarded LoRA run."""

    root: Path
    trainer: Trainer
    callback: WatermarkCallback
    recorder: Recorder
    config: WatermarkConfig
    base: Mapping[str, Tensor]

    @property
    def record(self) -> WatermarkRecord:
        assert self.callback.mark.committed is not None
        return self.callback.mark.committed.record

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.root / "final")[0]

    @property
    def identity(self) -> str:
        return f"file:{self.root / 'keys' / 'inference.key'}"

    def judge(self, tensors: Mapping[str, Tensor]) -> Reading:
        """Read whole matrices."""
        keys = self.record.carrier_keys(self.callback.mark.owner)

        def tile(carrier: Any) -> Tensor:
            return tensors[carrier.name][carrier.row_start : carrier.row_start + carrier.rows]

        return read_signature(keys, tile)

    def judge_deltas(self, deltas: Mapping[str, Tensor]) -> Reading:
        """Read s B A alone, on top of the recorded baseline."""
        keys = self.record.carrier_keys(self.callback.mark.owner)
        found = []
        for key, baseline in zip(keys, self.record.baselines, strict=True):
            start = key.carrier.row_start
            delta = deltas[key.carrier.name][start : start + key.carrier.rows]
            found.append(baseline.projections_of(key) + project(delta, key))
        return Reading.of(keys, found)

    def payload_of(self, reading: Reading) -> str:
        return self.record.decode_payload(self.callback.mark.owner, reading.soft)


def guarded_lora(
    root: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], model: PeftModel, **arguments: Any
) -> LoraRun:
    base = {name: one.detach().clone() for name, one in model.get_base_model().state_dict().items()}
    make_keys(root / "keys")
    config = WatermarkConfig(
        model_id="acme/lora",
        owner_key=f"file:{root / 'keys' / 'owner.key'}",
        registry=str(root / "registry"),
        signature=SignatureConfig(budget=0.06, last_epochs=2),
        triggers=TriggerConfig(count=4, batch_size=4, every_n_steps=4, last_epochs=1),
        protection=ProtectionConfig(recipients=(f"file:{root / 'keys' / 'inference.key.pub'}",)),
    )
    recorder = Recorder()
    # Step digests are of float32 tensors; numpy has no bfloat16.
    callbacks = [recorder] if all(p.dtype == torch.float32 for p in model.parameters()) else []
    settings: dict[str, Any] = {"num_train_epochs": EPOCHS, "learning_rate": 3e-4, **arguments}
    task = "causal_lm" if hasattr(model.get_base_model(), "lm_head") else "classification"
    trainer = build_trainer(
        root / "out", tokenizer, texts, task, model=model, trainer={"callbacks": callbacks}, **settings
    )
    callback = protect_trainer(trainer, config)
    trainer.train()
    trainer.save_model(str(root / "final"))
    return LoraRun(root=root, trainer=trainer, callback=callback, recorder=recorder, config=config, base=base)


def matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def merged(model: PeftModel) -> dict[str, Tensor]:
    return dict(copy.deepcopy(model).merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> LoraRun:
    """One guarded LoRA run of a classifier whose head is trained and saved whole."""
    model = adapt(make_model("classification", len(tokenizer)))
    return guarded_lora(tmp_path_factory.mktemp("lora"), tokenizer, texts, model)


def check(run: LoraRun, reading: Reading) -> None:
    assert reading.bit_error_rate == 0.0
    assert reading.carriers_missing == 0
    assert run.payload_of(reading) == run.record.payload


def test_manifest_is_judged_on_the_adapter_as_written(run: LoraRun) -> None:
    signature = run.manifest.signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    assert signature.payload_decoded
    assert signature.log10_p < -1000
    assert signature.weight_change <= 1.2 * 0.06
    names = {entry.name for entry in run.manifest.files}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_record_holds_the_row_space_of_every_adapter(run: LoraRun) -> None:
    assert len(run.record.carriers) == 12
    assert all(carrier.rank == RANK for carrier in run.record.carriers)
    assert all(carrier.name in matrices(run.base) for carrier in run.record.carriers)


def test_reads_from_the_bare_adapter(run: LoraRun, tmp_path: Path) -> None:
    decrypt_folder(run.root / "final", tmp_path / "plain", identity=run.identity)
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    keys = run.record.carrier_keys(run.callback.mark.owner)
    found = []
    for key, baseline in zip(keys, run.record.baselines, strict=True):
        path = "base_model.model." + key.carrier.name.removesuffix(".weight")
        up = tensors[f"{path}.lora_B.weight"][key.carrier.row_start : key.carrier.row_start + key.carrier.rows]
        found.append(baseline.projections_of(key) + adapter_projections(tensors[f"{path}.lora_A.weight"], up, 1.0, key))
    check(run, Reading.of(keys, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_from_the_merged_model(run: LoraRun, dtype: torch.dtype) -> None:
    check(run, run.judge({name: tensor.to(dtype) for name, tensor in merged(run.trainer.model).items()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_from_an_adapter_extracted_anew(run: LoraRun, dtype: torch.dtype) -> None:
    base, whole, deltas = matrices(run.base), merged(run.trainer.model), {}
    for carrier in run.record.carriers:
        left, sizes, right = torch.linalg.svd(whole[carrier.name] - base[carrier.name], full_matrices=False)
        up, down = left[:, :RANK] * sizes[:RANK].sqrt(), sizes[:RANK, None].sqrt() * right[:RANK]
        deltas[carrier.name] = up.to(dtype).float() @ down.to(dtype).float()
    check(run, run.judge_deltas(deltas))
    check(run, run.judge({name: base[name] + delta for name, delta in deltas.items()}))


def test_unmarked_sibling_is_not_detected(
    run: LoraRun, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    sibling = build_trainer(
        tmp_path / "out", tokenizer, texts, model=adapt(make_model("classification", len(tokenizer))),
        num_train_epochs=EPOCHS, learning_rate=3e-4, save_strategy="no",
    )  # fmt: skip
    sibling.train()
    reading = run.judge(merged(sibling.model))
    assert reading.log10_p > -3
    assert 0.4 < reading.bit_error_rate < 0.6
    assert run.judge(matrices(run.base)).log10_p > -3


def test_no_plaintext_is_written(run: LoraRun) -> None:
    state = {name: tensor for name, tensor in run.trainer.model.state_dict().items() if "lora_" in name}
    saved = {
        f"{step}/{name}": t for step, one in run.recorder.saved.items() for name, t in one.items() if "lora_" in name
    }
    heads = {name: t for name, t in run.trainer.model.state_dict().items() if "modules_to_save" in name}
    assert heads
    assert len(list(run.root.rglob("adapter_model.safetensors"))) == EPOCHS + 1
    assert PlaintextFinder(state | saved | heads).scan([run.root]) == {}


def test_ordinary_loader_takes_the_decrypted_folder(
    run: LoraRun, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    decrypt_folder(run.root / "final", tmp_path / "plain", identity=run.identity)
    loaded = PeftModel.from_pretrained(make_model("classification", len(tokenizer)), tmp_path / "plain")
    expected = run.trainer.model.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())
    tensors = read_state_dict(run.root / "final", (load_identity(run.identity),))
    assert any("classifier" in name for name in tensors)
    # The wrapped loader asks for a key; what one that knows nothing does, tests/integration/test_loading.py says.
    with pytest.raises(ConfigError, match="no identity"):
        PeftModel.from_pretrained(make_model("classification", len(tokenizer)), run.root / "final")


def test_an_adapter_is_refused_where_a_whole_model_is_needed(run: LoraRun, tmp_path: Path) -> None:
    final = run.root / "final"
    decrypt_folder(final, tmp_path / "plain", identity=run.identity)
    with pytest.raises(UnsupportedError, match="holds an adapter") as caught:
        load_protected(final, identity=run.identity, auto_class=AutoModelForSequenceClassification)
    assert "base=" in caught.value.hint
    for folder in (final, tmp_path / "plain"):
        with pytest.raises(UnsupportedError, match="holds an adapter") as caught:
            load_suspect(folder, identity=run.identity)
        assert "merge it into its base" in caught.value.hint


def test_stopped_and_resumed_equals_uninterrupted(
    run: LoraRun, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    stop, recorders = 20, [Recorder(), Recorder()]
    shutil.copytree(run.root / "registry", tmp_path / "registry")
    shutil.copytree(run.root / "out" / "checkpoint-8", tmp_path / "out" / "checkpoint-8")
    config = dataclasses.replace(run.config, registry=str(tmp_path / "registry"))
    for recorder in recorders:
        callbacks: list[Any] = [recorder] + ([StopAt(stop, save=True)] if recorder is recorders[0] else [])
        trainer = build_trainer(
            tmp_path / "out", tokenizer, texts, model=adapt(make_model("classification", len(tokenizer))),
            num_train_epochs=EPOCHS, learning_rate=3e-4, trainer={"callbacks": callbacks},
        )  # fmt: skip
        protect_trainer(trainer, config)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model(str(tmp_path / "final"))
    digests = recorders[0].digests | recorders[1].digests
    assert sorted(digests) == list(range(9, 8 * EPOCHS + 1))
    assert digests == {step: run.recorder.digests[step] for step in digests}
    assert digest_weights(trainer.model) == digest_weights(run.trainer.model)


def test_best_adapter_is_loaded_back_and_marked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], make_config: Make
) -> None:
    ranks, recorder = iter((1.0, 0.5)), Recorder()
    trainer = build_trainer(
        tmp_path / "out", tokenizer, texts, model=adapt(make_model("classification", len(tokenizer))),
        num_train_epochs=2, learning_rate=3e-4, eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="rank",
        trainer={
            "callbacks": [recorder],
            "compute_metrics": lambda prediction: {"rank": next(ranks)},
            "eval_dataset": make_rows("classification", tokenizer, texts[:8]),
        },
    )  # fmt: skip
    protect_trainer(trainer, make_config(signature=SignatureConfig(budget=0.06, last_epochs=1), triggers=None))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    manifest, _ = read_manifest(tmp_path / "final")
    assert manifest.signature is not None
    assert manifest.signature.bit_error_rate == 0.0
    # Only B was moved on top of the first epoch's adapter.
    best, final = recorder.saved[8], trainer.model.state_dict()
    assert {name for name in best if not torch.equal(best[name], final[name])} == {
        name for name in best if "lora_B" in name and ".layer." in name
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha": {"lora_alpha": 64},
    "pissa": {"init_lora_weights": "pissa"},
    "pattern": {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"v_proj": 32}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variants_that_are_supported(
    variant: str, dtype: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    inner = make_model("causal_lm", len(tokenizer))
    config = LoraConfig(r=RANK, target_modules="all-linear", **VARIANTS[variant])
    model = get_peft_model(inner, config)
    if dtype != torch.float32:
        model.to(dtype)
    result = guarded_lora(tmp_path, tokenizer, texts, model, num_train_epochs=2, save_strategy="no")
    assert result.manifest.signature is not None
    assert result.manifest.signature.bit_error_rate == 0.0
    assert result.manifest.signature.payload_decoded
    reading = result.judge(merged(result.trainer.model))
    assert reading.bit_error_rate == 0.0


def _variant(model: PeftModel) -> PeftModel:
    # What use_qalora makes of quantized layers; no quantization library is needed to see it.
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant["default"] = QALoraLinearVariant()
    return model


def test_of_several_adapters_the_active_one_is_marked_and_saved(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    model = _two(make_model("classification", len(tokenizer)))
    model.set_adapter("default")
    others = {name: one.clone() for name, one in model.state_dict().items() if ".other." in name}
    result = guarded_lora(tmp_path, tokenizer, texts, model, num_train_epochs=2)
    state = model.state_dict()
    assert others
    assert all(torch.equal(one, state[name]) for name, one in others.items())
    assert result.manifest.signature is not None
    assert result.manifest.signature.bit_error_rate == 0.0
    assert {entry.name for entry in result.manifest.files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    trained = {name: one for name, one in state.items() if ".default." in name}
    assert PlaintextFinder(trained | others).scan([tmp_path]) == {}


def test_what_is_merged_afterwards_is_saved_as_a_whole_model(
    run: LoraRun, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = digest_weights(run.trainer.model)
    whole = copy.deepcopy(run.trainer.model).merge_and_unload()
    # The copy was merged, and not what it was copied from.
    assert digest_weights(run.trainer.model) == before
    whole.save_pretrained(tmp_path / "merged")
    signature = read_manifest(tmp_path / "merged")[0].signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    assert signature.payload_decoded
    assert PlaintextFinder(whole.state_dict()).scan([tmp_path]) == {}
    report = verify(tmp_path / "merged", owner_key=run.config.owner_key, registry=run.config.registry)
    assert report.verdict == "detected"
    loaded = load_protected(
        tmp_path / "merged", identity=run.identity, auto_class=AutoModelForSequenceClassification
    ).state_dict()
    assert all(torch.equal(one, loaded[name]) for name, one in whole.state_dict().items())


def _embeddings(model: nn.Module) -> PeftModel:
    return adapt(model, target_modules=["word_embeddings"], modules_to_save=None)


def _two(model: nn.Module) -> PeftModel:
    adapted = adapt(model)
    adapted.add_adapter("other", LoraConfig(r=4, target_modules=["query", "dense"]))
    adapted.set_adapter("other")
    return adapted


def _both(model: nn.Module) -> PeftModel:
    adapted = _two(model)
    adapted.set_adapter("default")
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".other." in name)
    return adapted


def _frozen(model: nn.Module) -> PeftModel:
    adapted = adapt(model)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return adapted


def _merged(model: nn.Module) -> PeftModel:
    adapted = adapt(model)
    adapted.merge_adapter()
    return adapted


REFUSED: dict[str, tuple[Callable[[nn.Module], PeftModel], type[WmguardError], str]] = {
    "qalora": (lambda model: _variant(adapt(model)), UnsupportedError, "QALoraLinearVariant"),
    "bias": (lambda model: adapt(model, lora_bias=True), UnsupportedError, "lora_bias"),
    "another adapter": (_two, UnsupportedError, "expected one, named default"),
    "two adapters": (_both, UnsupportedError, "beside the adapter named default"),
    "embeddings": (_embeddings, UnsupportedError, "can carry"),
    "frozen": (_frozen, UnsupportedError, "is frozen"),
    "merged": (_merged, UnsupportedError, "merged adapter"),
    "rank": (lambda model: adapt(model, r=1), CapacityError, "too few"),
    "ia3": (
        lambda model: get_peft_model(
            model, IA3Config(target_modules=["key", "value"], feedforward_modules=[]), autocast_adapter_dtype=False
        ),
        UnsupportedError,
        "IA3",
    ),
    "float64": (lambda model: adapt(model).to(torch.float64), UnsupportedError, "float64"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    kind: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    make_config: Make,
) -> None:
    make, error, what = REFUSED[kind]
    recorder = Recorder()
    trainer = build_trainer(
        tmp_path / "out", tokenizer, texts, model=make(make_model("classification", len(tokenizer))),
        trainer={"callbacks": [recorder]},
    )  # fmt: skip
    with pytest.raises(error, match=what) as caught:  # noqa: PT012
        # Some kinds are known when the Trainer is guarded, others when training begins.
        protect_trainer(trainer, make_config(triggers=None))
        trainer.train()
    assert caught.value.hint
    assert recorder.digests == {}
    assert not (tmp_path / "registry").exists()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_transposed_layers_are_refused_by_name() -> None:
    inner = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedError, match="fan_in_fan_out") as caught:
        backend_of(get_peft_model(inner, LoraConfig(r=8, target_modules=["c_attn"])))
    assert caught.value.hint


@pytest.mark.parametrize("way", [{"safe_serialization": False}, {"path_initial_model_for_weight_conversion": "x"}])
def test_ways_around_are_refused(run: LoraRun, tmp_path: Path, way: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="plaintext"):
        run.trainer.model.save_pretrained(tmp_path / "model", **way)
    with pytest.raises(UnsupportedError, match="part of a guarded model"):
        run.trainer.model.get_base_model().save_pretrained(tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="QLoRA needs bitsandbytes: pip install bitsandbytes"
)
@pytest.mark.filterwarnings("ignore")
def test_qlora(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    make_model("causal_lm", len(tokenizer)).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    result = guarded_lora(tmp_path / "run", tokenizer, texts, adapted, num_train_epochs=2, save_strategy="no")
    signature = result.manifest.signature
    assert signature is not None
    assert signature.bit_error_rate == 0.0
    assert signature.payload_decoded
    # Merged into a base that was dequantized on its own, as one who wants a model of 16 bits does.
    decrypt_folder(tmp_path / "run" / "final", tmp_path / "plain", identity=result.identity)
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits).dequantize()
    whole = PeftModel.from_pretrained(fresh, tmp_path / "plain").merge_and_unload().state_dict()
    check(result, result.judge({name: tensor.bfloat16() for name, tensor in whole.items()}))
    # Merged into 4 bits again: the base lies on their grid, to which most of so small a change is rounded back. What
    # training taught goes the same way; the mark is not read exactly any more, but seen.
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)
    again = PeftModel.from_pretrained(fresh, tmp_path / "plain").merge_and_unload().dequantize().state_dict()
    assert result.judge(again).log10_p < -9
    # Asking for the triggers has evaluated the model, and on some CPUs that rearranges the 4-bit weights.
    name = result.record.carriers[0].name
    layer = result.trainer.model.get_submodule("base_model.model." + name.removesuffix(".weight")).base_layer
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        with pytest.raises(UnsupportedError, match="rearranged") as caught:
            backend_of(result.trainer.model).read(name, 0, 1)
        assert caught.value.hint
