"""The attack suite on real tiny models."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Run, make_model, make_rows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_wmguard import WatermarkConfig, embed, verify
from hf_wmguard.config import SignatureConfig
from hf_wmguard.errors import ConfigError, FormatError, NotFoundError, RegistryError, UsageError
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading import load_suspect
from hf_wmguard.metrics import load_metric
from hf_wmguard.robustness.attacks import relative_change
from hf_wmguard.robustness.catalogue import ATTACKS
from hf_wmguard.robustness.finetuning import distill, finetune, finetune_lora
from hf_wmguard.robustness.overwriting import overwrite
from hf_wmguard.robustness.report import write_report
from hf_wmguard.robustness.results import STREAM_NAME, Outcome
from hf_wmguard.robustness.structure import drop_layers
from hf_wmguard.robustness.suite import run_suite
from hf_wmguard.robustness.utility import Corpus, measure, with_weights

CHEAP = (
    *("bf16", "rename", "transpose", "int8", "prune-magnitude", "overwrite", "drop-layers", "merge-linear", "finetune"),
    *("permute-residual", "rotate-residual", "scale-neurons", "permute-heads", "all-symmetries"),
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Path:
    """The classifier's own rows."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = make_rows("classification", tokenizer, texts)
    path.write_text(
        "".join(json.dumps({"text": t, "label": r["labels"]}) + "\n" for t, r in zip(texts, rows, strict=True))
    )
    return path


@pytest.fixture(scope="module")
def outcome(guarded: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("stress") / "out"
    return run_suite(guarded.final, out, **_where(guarded), data=data, names=CHEAP, quick=True), out


def _where(run: Run) -> dict[str, Any]:
    return {"owner_key": run.where["owner_key"], "registry": Path(run.where["registry"])}


def test_utility_is_that_of_the_rows_held_out(
    outcome: tuple[Outcome, Path], guarded: Run, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Computed here by hand: how well so small a run learns differs from one fresh key to the next."""
    rows = make_rows("classification", tokenizer, texts)[::5]
    model = guarded.trainer.model.eval()
    with torch.no_grad():
        inputs = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
        answers = model(**inputs).logits.argmax(dim=1)
    right = sum(int(answer) == row["labels"] for answer, row in zip(answers, rows, strict=True))
    baseline = next(result for result in outcome[0].results if result.attack == "none")
    assert baseline.utility is not None
    assert baseline.utility.value == pytest.approx(right / len(rows))


def test_the_suite_judges_every_attack(outcome: tuple[Outcome, Path]) -> None:
    by_name = {(result.attack, result.strength): result for result in outcome[0].results}
    baseline = by_name["none", 0]
    assert (baseline.verdict, baseline.bit_error_rate, baseline.weight_change) == ("detected", 0, 0)
    assert baseline.utility is not None
    assert (baseline.utility.loss, baseline.utility.value) == (0, baseline.utility_before)
    for attack in ("bf16", "int8", "finetune"):
        results = [result for result in outcome[0].results if result.attack == attack]
        assert all(result.verdict == "detected" and result.payload_decoded for result in results)
        assert all(baseline.log10_p < result.log10_p for result in results)
    weak, strong = by_name["prune-magnitude", 0.3], by_name["prune-magnitude", 0.9]
    assert weak.log10_p < strong.log10_p
    assert weak.bit_error_rate < strong.bit_error_rate
    assert (weak.utility_before, strong.utility_before) == (baseline.utility.value,) * 2
    assert strong.weight_change == pytest.approx(0.8, abs=0.15)
    for attack in ("rename", "transpose"):
        stored = by_name[attack, 0]
        assert (stored.verdict, stored.payload_decoded) == ("detected", True), attack
        assert (stored.utility, stored.weight_change) == (None, None)
    layers = by_name["drop-layers", 0.5]
    assert layers.utility is not None
    # The one of two that is left is found, by what it holds, under the number of the other.
    assert layers.verdict == "detected"


def test_symmetries_are_judged_with_the_original(outcome: tuple[Outcome, Path]) -> None:
    by_name = {result.attack: result for result in outcome[0].results}
    for name in ("permute-residual", "permute-heads", "all-symmetries"):
        result = by_name[name]
        assert (result.verdict, result.payload_decoded, result.family) == ("detected", True, "symmetries"), name
        if name != "all-symmetries":
            assert result.weight_change > 0.5
            assert result.utility.value == result.utility_before
    reasons = {one.attack: one.reason for one in outcome[0].skipped}
    # What BERT does not have.
    assert "RMSNorm" in reasons["rotate-residual"]
    assert "gelu" in reasons["scale-neurons"]


def test_a_llama_has_every_symmetry(tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path) -> None:
    OwnerKey.generate().write(tmp_path / "owner.key")
    config = WatermarkConfig(
        model_id="acme/llama",
        owner_key=f"file:{tmp_path / 'owner.key'}",
        registry=str(tmp_path / "registry"),
        signature=SignatureConfig(budget=0.06),
        triggers=None,
    )
    model = make_model("causal_lm", len(tokenizer))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    embed(model, config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(texts))
    names = [attack.name for attack in ATTACKS if attack.family == "symmetries"]
    found = run_suite(
        tmp_path / "model",
        tmp_path / "out",
        owner_key=config.owner_key,
        registry=Path(config.registry),
        text=tmp_path / "text.txt",
        names=names,
        quick=True,
    )
    assert found.skipped == ()
    assert [one.attack for one in found.results[1:]] == names
    for one in found.results:
        assert (one.verdict, one.payload_decoded) == ("detected", True), one.attack
        # The network computes what it did, also with a head that is the embedding no longer.
        assert one.utility is None or abs(one.utility.loss) < 1e-3, one.attack
    without = {one.attack for one in found.results if one.utility is None}
    assert without == {"add-neurons", "split-neurons", "all-symmetries"}


def test_other_owners_do_not_displace_the_mark(guarded: Run) -> None:
    model, _ = load_suspect(guarded.final, identity=guarded.identity)
    # The tiny model has no room for a stranger at the suite's budget.
    overwritten = overwrite(model.state_dict(), 5, budget=0.06)
    assert relative_change(overwritten, model.state_dict()) > 0.1
    assert verify(overwritten, **_where(guarded)).verdict == "detected"


def test_what_cannot_run_is_named(outcome: tuple[Outcome, Path], guarded: Run, tmp_path: Path) -> None:
    reasons = {one.attack: one.reason for one in outcome[0].skipped}
    assert "--other" in reasons["merge-linear"]
    assert "raise the budget" in reasons["overwrite"]
    bare = run_suite(guarded.final, tmp_path / "out", **_where(guarded), names=("finetune", "gptq", "nf4"))
    assert {one.attack: one.reason.split(",")[0] for one in bare.skipped} == {
        "finetune": "needs --data or --text",
        "gptq": "needs --data or --text",
    }
    assert [(one.attack, one.utility) for one in bare.results] == [("none", None), ("nf4", None)]


def test_a_killed_run_goes_on_where_it_stopped(
    outcome: tuple[Outcome, Path], guarded: Run, data: Path, tmp_path: Path
) -> None:
    done: list[str] = []

    def killed_at_the_fourth(index: int, total: int, label: str) -> None:
        done.append(label)
        if index == 3:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {**_where(guarded), "data": data, "names": ("bf16", "int8", "noise"), "quick": True}
    with pytest.raises(KeyboardInterrupt):
        run_suite(guarded.final, tmp_path / "out", **arguments, progress=killed_at_the_fourth)
    stream = tmp_path / "out" / STREAM_NAME
    before = stream.read_text()
    assert before.count("\n") == 4
    stream.write_text(before + '{"attack": "noi')
    result = run_suite(guarded.final, tmp_path / "out", **arguments)
    assert stream.read_text().startswith(before)
    assert stream.read_text().count("\n") == 6
    assert [one.attack for one in result.results] == ["none", "bf16", "int8", "noise", "noise"]
    # The same figures as in a run that was never killed.
    whole = {one.attack: one.log10_p for one in outcome[0].results}
    assert all(one.log10_p == whole[one.attack] for one in result.results if one.attack in whole)
    # And the folder is that model's alone.
    with pytest.raises(UsageError, match="sha256"):
        run_suite(guarded.out / "checkpoint-8", tmp_path / "out", **arguments)
    with pytest.raises(UsageError, match="data"):
        run_suite(guarded.final, tmp_path / "out", **{**arguments, "data": None})


def test_the_report_needs_nothing_beside_it(outcome: tuple[Outcome, Path]) -> None:
    result, out = outcome
    page = write_report(result, out)[-1].read_text()
    assert not re.search(r"https?:|//|@import|<script|<link", re.sub(r"base64,[^\"]*", "", page))
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 1 + len({one.family for one in result.results} - {"unattacked"})
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)[:4] == b"\x89PNG"
    assert all(one.label in page for one in result.results)
    assert "needs --other" in page
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result.to_json()))
    table = (out / "table.md").read_text()
    assert table.count("\n| ") == len(result.results) + 1
    assert "* merge-linear: needs --other" in table


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"names": ("bf16", "nonsense")}, ConfigError, "nonsense"),
        ({"model_id": "acme/nobody"}, RegistryError, "acme/nobody"),
        ({"base": Path("nowhere")}, NotFoundError, "nowhere"),
        ({"data": Path("nowhere.csv")}, NotFoundError, "nowhere"),
        ({"data": Path("rows.xls")}, ConfigError, "xls"),
        ({"text": Path("nowhere.txt")}, ConfigError, "classification"),
        ({"text": Path("a"), "data": Path("b.csv")}, ConfigError, "both"),
    ],
)
def test_bad_arguments_are_named(
    guarded: Run, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        run_suite(guarded.final, tmp_path / "out", **{**_where(guarded), **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("rows.csv", "sentence,label\na,1\n", ConfigError, "sentence"),
        ("rows.csv", "text,label\na,99\nb,1\n", ConfigError, "99"),
        ("rows.csv", "text,label\na,good\nb,1\n", ConfigError, "good"),
        ("rows.csv", "text,label\na,1\n", ConfigError, "too few"),
        ("rows.jsonl", "{", FormatError, "cannot be read"),
        ("rows.parquet", "PAR1", FormatError, "cannot be read"),
    ],
)
def test_bad_data_is_named(
    guarded: Run, tmp_path: Path, name: str, content: str, error: type[Exception], match: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=match):
        run_suite(guarded.final, tmp_path / "out", **_where(guarded), data=tmp_path / name)


def test_other_models_are_read_under_the_models_own_names(
    guarded: Run, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = make_model("classification", len(tokenizer))
    base.bert.save_pretrained(tmp_path / "base")  # without prefix and head
    names = ("merge-base-linear", "svd-delta")
    result = run_suite(
        guarded.final, tmp_path / "out", **_where(guarded), base=tmp_path / "base", names=names, quick=True
    )
    assert not result.skipped
    assert [(one.attack, one.strength) for one in result.results[1:]] == [
        ("merge-base-linear", 0.5),
        ("merge-base-linear", 0.1),
        ("svd-delta", 64),
        ("svd-delta", 8),
    ]
    assert result.results[1].weight_change < result.results[2].weight_change
    llama = make_model("causal_lm", len(tokenizer))
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="no matrix"):
        run_suite(guarded.final, tmp_path / "other", **_where(guarded), base=tmp_path / "llama")


# Training and utility


@pytest.fixture(scope="module", params=["classification", "causal_lm"])
def trained(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Any:
    """A model that has learnt its rows, with them."""
    torch.manual_seed(0)
    rows = make_rows(request.param, tokenizer, texts)
    model = make_model(request.param, len(tokenizer))
    weights = finetune(model, rows, learning_rate=2e-3, epochs=4)
    model.load_state_dict(weights)
    return model.eval(), Corpus(task=request.param, train=rows, held_out=rows)


def _same(model: PreTrainedModel, weights: dict[str, Tensor]) -> list[bool]:
    return [torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()]


# peft 0.21 asks transformers 5.23 under an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("attack", [finetune, finetune_lora, distill])
def test_training_changes_a_copy(trained: Any, attack: Any) -> None:
    model, corpus = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = attack(model, corpus.train, learning_rate=1e-3, epochs=1)
    assert list(after) == list(before)
    assert all(_same(model, before))
    matrices = [name for name in before if ".0." in name and before[name].dim() == 2]
    assert not any(torch.equal(after[name], before[name]) for name in matrices)
    assert all(
        torch.equal(after[key], value)
        for key, value in attack(model, corpus.train, learning_rate=1e-3, epochs=1).items()
    )
    change = {name: (after[name] - before[name]).norm() / before[name].norm() for name in matrices}
    if attack is finetune_lora:
        assert all(int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3)) <= 16 for name in matrices)
    if attack is distill:
        # Nothing of the teacher's weights is in the student.
        assert min(change.values()) > 0.9


def test_a_student_learns_its_teachers_answers(trained: Any) -> None:
    model, corpus = trained
    fresh = measure(with_weights(model, distill(model, corpus.train, learning_rate=0.0, epochs=0.2)), corpus)
    student = measure(with_weights(model, distill(model, corpus.train, learning_rate=3e-3, epochs=4)), corpus)
    assert student.value > fresh.value if fresh.name == "accuracy" else student.value < 0.5 * fresh.value


def test_utility_is_what_it_says(trained: Any) -> None:
    model, corpus = trained
    utility = measure(model, corpus)
    assert utility.loss == 0
    worse = measure(with_weights(model, drop_layers(model.state_dict(), 0.5)), corpus, utility.value)
    with torch.no_grad():
        if corpus.task == "classification":
            hits = [
                int(
                    model(
                        input_ids=torch.tensor([row["input_ids"]]), attention_mask=torch.tensor([row["attention_mask"]])
                    ).logits.argmax()
                )
                == row["labels"]
                for row in corpus.held_out
            ]
            assert utility.value == sum(hits) / len(hits)
            assert worse.loss == pytest.approx((utility.value - worse.value) / utility.value)
        else:
            assert worse.loss == pytest.approx((worse.value - utility.value) / utility.value)
    assert worse.loss > 0


def test_perplexity_weighs_tokens_and_not_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("causal_lm", len(tokenizer)).train()
    windows = [list(range(4, 30)), [7, 8, 9], [5, 6], list(range(20, 60))]
    found = load_metric("perplexity").compute(predictions=windows, model=model, batch_size=3)["perplexity"]
    assert model.training
    model.eval()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logs = torch.log_softmax(model(input_ids=torch.tensor([window])).logits[0].double(), dim=-1)
            nats -= sum(float(logs[place, token]) for place, token in enumerate(window[1:]))
            tokens += len(window) - 1
    assert found == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert math.isfinite(found)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert load_metric("perplexity").compute(predictions=windows, model=model)["perplexity"] > 1e300


def test_the_catalogue_is_in_order() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert "none" not in names
    families = [attack.family for attack in ATTACKS]
    assert len(list(dict.fromkeys(families))) == 1 + sum(a != b for a, b in itertools.pairwise(families))
