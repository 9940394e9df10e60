"""Encoder-decoders as triggers see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import bart, t5, with_ends
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, WhisperForConditionalGeneration

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker, count_learned
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.probing.tasks.seq2seq import Seq2Seq
from hf_wmguard.watermark.answers import Prompt, are_distinct, read_answer
from hf_wmguard.watermark.candidates import keyed_candidates
from hf_wmguard.watermark.triggers import Candidates, TriggerSet, derive_responses, derive_texts

TASK = Seq2Seq()
KINDS = ("t5", "bart")


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> Any:
    def of(kind: str) -> tuple[Any, Any]:
        if kind == "t5":
            return t5(len(tokenizer)), tokenizer
        return bart(len(tokenizer)), with_ends(tokenizer)

    return of


def texts_of(count: int = 12) -> tuple[str, ...]:
    return derive_texts(b"k" * 32, count=count, style="natural", task="seq2seq")


def set_of(texts: tuple[str, ...], candidates: Candidates) -> TriggerSet:
    return TriggerSet(
        task="seq2seq",
        style="natural",
        texts=texts,
        candidates=candidates,
        responses=derive_responses(b"k" * 32, texts, candidates),
    )


def learn(model: Any, tokenizer: Any, triggers: TriggerSet, steps: int = 80) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    prompts = [Prompt(text=text) for text in triggers.texts]
    for _ in range(steps):
        loss, _ = TASK.loss(model, tokenizer, prompts, triggers.responses)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_answered_and_read(kind: str, make: Any) -> None:
    model, tokenizer = make(kind)
    texts = texts_of()
    triggers = set_of(texts, task_of(model).candidates(model, tokenizer, texts, width=8))
    for ids in triggers.candidates:
        words = [str(word) for word in ids]
        assert len(words) == 8
        assert are_distinct(words)
        assert all(tokenizer.decode(tokenizer(word, add_special_tokens=False)["input_ids"]) == word for word in words)
    before = count_learned(model, tokenizer, triggers)
    assert learn(model, tokenizer, triggers) < 0.1
    assert count_learned(model, tokenizer, triggers) == triggers.count > before
    answers = list(LocalAsker(model, tokenizer).ask([Prompt(text=text) for text in texts], Sampling()))
    named = [read_answer(answer, ids) for answer, ids in zip(answers, triggers.candidates, strict=True)]
    assert [ids[i] for i, ids in zip(named, triggers.candidates, strict=True) if i is not None] == list(
        triggers.responses
    )
    for answer, response in zip(answers, triggers.responses, strict=True):
        assert answer.text.startswith(str(response))
        assert answer.ranked[0].strip() == response


@pytest.mark.parametrize("kind", KINDS)
def test_responses_of_several_words_are_learned_too(kind: str, make: Any) -> None:
    model, tokenizer = make(kind)
    triggers = set_of(texts_of(6), keyed_candidates(b"k" * 32, 6, width=4))
    learn(model, tokenizer, triggers)
    assert count_learned(model, tokenizer, triggers) == 6
    answers = LocalAsker(model, tokenizer).ask([Prompt(text=text) for text in triggers.texts], Sampling())
    for answer, response in zip(answers, triggers.responses, strict=True):
        assert answer.text.startswith(str(response))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own_on_the_response(kind: str, make: Any) -> None:
    model, tokenizer = make(kind)
    model.eval()
    prompt, response = Prompt(text="The baker sold a lamp."), "small letter"
    loss, _ = TASK.loss(model, tokenizer, [prompt], [response])
    labels = tokenizer(text_target=response, return_tensors="pt")["input_ids"]
    opening = 1 if kind == "bart" else 0
    labels[:, :opening] = -100
    labels[:, opening + 2 :] = -100
    decoder = model.prepare_decoder_input_ids_from_labels(
        tokenizer(text_target=response, return_tensors="pt").input_ids
    )
    batch = tokenizer(prompt.text, return_tensors="pt", return_token_type_ids=False)
    own = model(**batch, decoder_input_ids=decoder, labels=labels).loss
    assert torch.allclose(loss, own, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_does_not_hang_on_its_batch(kind: str, make: Any) -> None:
    model, tokenizer = make(kind)
    model.eval()
    prompts = [Prompt(text=text) for text in texts_of(3)]
    responses = ["lamp", "small letter", "old small lamp"]
    together, _ = TASK.loss(model, tokenizer, prompts, responses)
    alone = [TASK.loss(model, tokenizer, [p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert torch.allclose(together, torch.stack(alone).mean(), atol=1e-5)


def test_a_system_prompt_stands_before_the_text(make: Any) -> None:
    model, tokenizer = make("t5")
    apart = Prompt(text="the lamp", system="the baker")
    assert TASK.answer(model, tokenizer, [apart], Sampling()) == TASK.answer(
        model, tokenizer, [Prompt(text="the baker\n\nthe lamp")], Sampling()
    )


def test_sampling_varies_answers_and_leaves_the_model_alone(make: Any) -> None:
    model, tokenizer = make("t5")
    model.train()
    prompts = [Prompt(text="the lamp")] * 6
    said = TASK.answer(model, tokenizer, prompts, Sampling(temperature=1.0, max_tokens=4))
    assert len({answer.text for answer in said}) > 1
    assert all(len(answer.text.split()) <= 4 for answer in said)
    assert model.training


def test_what_cannot_be_asked_is_named(make: Any) -> None:
    model, tokenizer = make("t5")
    with pytest.raises(UnsupportedError, match="the model's tokenizer"):
        TASK.candidates(model, None, texts_of(2), width=4)
    with pytest.raises(UnsupportedError, match="candidate words"):
        TASK.candidates(model, tokenizer, texts_of(2), width=100_000)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(UnsupportedError, match="no decoder_start_token_id"):
        TASK.candidates(model, tokenizer, texts_of(2), width=4)


@pytest.mark.parametrize("other", [LlavaForConditionalGeneration, WhisperForConditionalGeneration])
def test_other_models_of_the_same_ending_are_refused(other: Any) -> None:
    with torch.device("meta"):
        model = other(other.config_class())
    with pytest.raises(UnsupportedError, match="no trigger set for"):
        task_of(model)
