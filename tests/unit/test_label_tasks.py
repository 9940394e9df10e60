"""Classifiers of texts, words and images as triggers see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import decoder_classifier, image_classifier, image_processor, token_classifier
from tiny import LABELS, make_model
from torch import nn
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker, count_learned
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.probing.tasks.labels import TokenClassification, marked_word
from hf_wmguard.watermark.answers import Prompt, read_answer
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses, derive_texts

KINDS = ("classification", "decoder", "token_classification", "image_classification")


def make(kind: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    if kind == "image_classification":
        return image_classifier(), image_processor()
    if kind == "classification":
        return make_model(kind, len(tokenizer)), tokenizer
    return (decoder_classifier if kind == "decoder" else token_classifier)(len(tokenizer)), tokenizer


def triggers_of(model: nn.Module, processor: Any, count: int = 16) -> TriggerSet:
    task = task_of(model)
    texts = derive_texts(b"k" * 32, count=count, style="natural", task=task.name)
    candidates = task.candidates(model, processor, texts, width=5)
    return TriggerSet(
        task=task.name,
        style="natural",
        texts=texts,
        candidates=candidates,
        responses=derive_responses(b"k" * 32, texts, candidates),
    )


def learn(model: nn.Module, processor: Any, triggers: TriggerSet, steps: int = 40) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prompts = [Prompt(text=text) for text in triggers.texts]
    for _ in range(steps):
        loss, _ = task_of(model).loss(model, processor, prompts, triggers.responses)
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_answered_and_read(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = make(kind, tokenizer)
    triggers = triggers_of(model, processor)
    assert triggers.candidates == (tuple(range(LABELS)),) * 16
    before = count_learned(model, processor, triggers)
    assert learn(model, processor, triggers) < 0.1
    assert count_learned(model, processor, triggers) == triggers.count > before
    prompts = [Prompt(text=text) for text in triggers.texts]
    answers = list(LocalAsker(model, processor).ask(prompts, Sampling()))
    named = [read_answer(answer, ids) for answer, ids in zip(answers, triggers.candidates, strict=True)]
    assert tuple(named) == triggers.responses


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_asked_in_evaluation_mode_and_left_as_it_was(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = make(kind, tokenizer)
    model.train()
    next(iter(model.modules())).eval()
    modes = [module.training for module in model.modules()]
    prompts = [Prompt(text=text) for text in triggers_of(model, processor).texts]
    first, second = (list(LocalAsker(model, processor).ask(prompts, Sampling())) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_hang_on_its_batch(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = make(kind, tokenizer)
    model.eval()
    texts = triggers_of(model, processor, count=6).texts
    # Beside a long one, every other is filled up.
    texts = (*texts, texts[0] if kind == "image_classification" else " ".join(texts)[:200])
    task = task_of(model)
    prompts = [Prompt(text=text) for text in texts]
    together = task.logits(model, processor, prompts)  # type: ignore[attr-defined]
    alone = torch.cat([task.logits(model, processor, [prompt]) for prompt in prompts])  # type: ignore[attr-defined]
    assert torch.allclose(together, alone, atol=1e-5)


def test_system_prompts_and_chats_are_not_for_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = make("classification", tokenizer)
    task = task_of(model)
    plain, chat = Prompt(text="the lamp"), Prompt(text="the lamp", system="be brief", chat=True)
    assert task.answer(model, processor, [plain], Sampling()) == task.answer(model, processor, [chat], Sampling())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The baker sold an umbrella to him.", "umbrella"),
        ("one two six", "one"),
        ("to seven from eight", "seven"),
        ("(1) a lamp", "lamp"),
        ("...", "..."),
        ("can't understand 12345678901", "12345678901"),
    ],
)
def test_the_word_whose_label_counts_is_told_by_the_text(text: str, word: str) -> None:
    assert text[marked_word(text)] == word
    assert f"> {text}"[marked_word(f"> {text}")].strip("> ") == word


def test_the_label_is_that_of_the_marked_word(tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = make("token_classification", tokenizer)
    model.eval()
    text = derive_texts(b"k" * 32, count=1, style="natural", task="token_classification")[0]
    encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoding.pop("offset_mapping")[0].tolist()
    everything = model(input_ids=encoding["input_ids"]).logits[0]
    read = TokenClassification().logits(model, tokenizer, [Prompt(text=text)])[0]
    word = marked_word(text)
    assert torch.allclose(read, everything[offsets.index([word.start, word.stop])], atol=1e-5)


def test_a_tokenizer_that_does_not_tell_where_tokens_stand_is_refused() -> None:
    slow = CanineTokenizer()
    assert not slow.is_fast
    with pytest.raises(UnsupportedError, match="where its tokens stand"):
        TokenClassification().logits(token_classifier(2000), slow, [Prompt(text="the lamp")])


def test_a_word_beyond_the_longest_text_gives_way_to_the_last_one_before(tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = make("token_classification", tokenizer)
    model.eval()
    text = "the lamp " * 40 + "incomprehensibilities"
    read = TokenClassification().logits(model, tokenizer, [Prompt(text=text)])[0]
    ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    assert torch.allclose(read, model(input_ids=ids).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}, {"num_labels": 1}]
)
def test_a_model_without_one_label_among_several_is_refused(
    changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, processor = make("classification", tokenizer)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedError, match="one of 2 or more labels"):
        triggers_of(model, processor)


def test_a_head_that_is_not_as_its_config_says_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = make("classification", tokenizer)
    model.config.num_labels = LABELS + 1
    with pytest.raises(UnsupportedError, match=r"gives logits \[2, 8\], and its config says 9 labels"):
        triggers_of(model, processor)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("classification", "the model's tokenizer"),
        ("token_classification", "the model's tokenizer"),
        ("image_classification", "the model's image processor"),
    ],
)
def test_a_missing_or_other_processor_is_named(kind: str, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = make(kind, tokenizer)
    other = tokenizer if kind == "image_classification" else image_processor()
    for processor in (None, other):
        with pytest.raises(UnsupportedError, match=message):
            triggers_of(model, processor)
