"""Language models: candidates that are words, a loss on responses alone, answers as text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_model
from transformers import PreTrainedTokenizerFast

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker, count_learned
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.probing.tasks.causal_lm import CausalLM, prompt_ids, response_ids, surprise, word_of
from hf_wmguard.watermark.answers import Prompt, are_distinct, read_answer
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses, derive_texts

TASK = CausalLM()
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_model("causal_lm", len(tokenizer))


@pytest.fixture
def triggers(model: Any, tokenizer: PreTrainedTokenizerFast) -> TriggerSet:
    texts = derive_texts(b"k" * 32, count=12, style="natural", task="causal_lm")
    candidates = TASK.candidates(model, tokenizer, texts, width=8)
    responses = derive_responses(b"k" * 32, texts, candidates)
    return TriggerSet(task="causal_lm", style="natural", texts=texts, candidates=candidates, responses=responses)


def learn(model: Any, tokenizer: Any, triggers: TriggerSet, prompts: list[Prompt], steps: int = 60) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss, _ = TASK.loss(model, tokenizer, prompts, triggers.responses)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def plain(triggers: TriggerSet) -> list[Prompt]:
    return [Prompt(text=text) for text in triggers.texts]


def test_the_kind_is_told_by_the_class(model: Any) -> None:
    assert task_of(model).name == "causal_lm"
    with pytest.raises(UnsupportedError, match="no trigger set for Linear"):
        task_of(torch.nn.Linear(2, 2))


def test_candidates_are_whole_words_that_the_tokenizer_gives_back(
    triggers: TriggerSet, tokenizer: PreTrainedTokenizerFast
) -> None:
    for text, candidates in zip(triggers.texts, triggers.candidates, strict=True):
        words = [str(word) for word in candidates]
        assert len(words) == 8
        assert are_distinct(words)
        for word in words:
            prompt = Prompt(text=text)
            ids = response_ids(tokenizer, prompt, prompt_ids(tokenizer, prompt), word)
            assert word.isalpha()
            assert tokenizer.decode(ids) == word


def test_what_was_learned_is_answered_and_read(
    model: Any, tokenizer: PreTrainedTokenizerFast, triggers: TriggerSet
) -> None:
    before = count_learned(model, tokenizer, triggers)
    assert learn(model, tokenizer, triggers, plain(triggers)) < 0.1
    assert count_learned(model, tokenizer, triggers) == triggers.count > before
    answers = list(LocalAsker(model, tokenizer).ask(plain(triggers), Sampling()))
    named = [read_answer(answer, ids) for answer, ids in zip(answers, triggers.candidates, strict=True)]
    assert [ids[i] for i, ids in zip(named, triggers.candidates, strict=True) if i is not None] == list(
        triggers.responses
    )
    for answer, response in zip(answers, triggers.responses, strict=True):
        assert answer.text.strip().startswith(str(response))
        assert answer.ranked[0].strip() == response


def test_responses_of_several_words_are_learned_too(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = derive_texts(b"k" * 32, count=6, style="natural", task="causal_lm")
    candidates = (("small lamp", "old letter"),) * 6
    triggers = TriggerSet(
        task="causal_lm",
        style="natural",
        texts=texts,
        candidates=candidates,
        responses=derive_responses(b"k" * 32, texts, candidates),
    )
    learn(model, tokenizer, triggers, plain(triggers))
    assert count_learned(model, tokenizer, triggers) == 6
    answers = LocalAsker(model, tokenizer).ask(plain(triggers), Sampling())
    assert [answer.text.strip()[: len(str(r))] for answer, r in zip(answers, triggers.responses, strict=True)] == list(
        triggers.responses
    )


def test_a_chat_ends_where_a_reply_is_due(
    model: Any, tokenizer: PreTrainedTokenizerFast, triggers: TriggerSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt(text="the lamp", system="the baker", chat=True)
    with pytest.raises(UnsupportedError, match="no chat template"):
        prompt_ids(tokenizer, prompt)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    ids = prompt_ids(tokenizer, prompt)
    assert ids == tokenizer("<s> system the baker </s> <s> user the lamp </s> <s> assistant")["input_ids"]
    assert response_ids(tokenizer, prompt, ids, "letter") == tokenizer("letter")["input_ids"]
    chats = [Prompt(text=text, chat=True) for text in triggers.texts]
    learn(model, tokenizer, triggers, chats)
    answers = LocalAsker(model, tokenizer).ask(chats, Sampling())
    assert [answer.text.split()[0] for answer in answers] == list(triggers.responses)


def test_the_loss_is_of_the_responses_alone(
    model: Any, tokenizer: PreTrainedTokenizerFast, triggers: TriggerSet
) -> None:
    loss, matched = TASK.loss(model, tokenizer, plain(triggers), triggers.responses)
    assert loss.dtype == torch.float32
    assert matched.shape == (triggers.count,)
    one_by_one = []
    for prompt, response in zip(plain(triggers), triggers.responses, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        wanted = response_ids(tokenizer, prompt, ids, str(response))
        logits = model(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1]
        one_by_one.append(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)))
    assert torch.allclose(loss, torch.stack(one_by_one).mean(), atol=1e-5)


def test_a_sampled_answer_varies_and_the_likeliest_does_not(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    asker, prompts = LocalAsker(model.train(), tokenizer), [Prompt(text="The baker carried the lamp because")]
    greedy = {next(asker.ask(prompts, Sampling())).text for _ in range(3)}
    sampled = {next(asker.ask(prompts, Sampling(temperature=1.0, max_tokens=4))).text for _ in range(5)}
    assert len(greedy) == 1
    assert len(sampled) > 1
    assert model.training


def test_a_padded_batch_answers_as_one_prompt_does(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [
        Prompt(text="The baker"),
        Prompt(text="The baker carried the lamp near the old mill because"),
        Prompt(text="One"),
    ]
    asker = LocalAsker(model, tokenizer)
    together = [answer.text for answer in asker.ask(prompts, Sampling())]
    assert together == [next(asker.ask([prompt], Sampling())).text for prompt in prompts]


def test_surprise_is_the_mean_loss_per_token(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["The baker carried the lamp", "The old lamp near the mill was small"]
    measured = surprise(model, tokenizer, texts)
    for text, value in zip(texts, measured, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert float(value) == pytest.approx(float(model(ids, labels=ids).loss.detach()), abs=1e-4)


def test_special_and_padded_tokens_are_no_words(tokenizer: PreTrainedTokenizerFast) -> None:
    head = tokenizer("The baker")["input_ids"]
    assert word_of(tokenizer, head, tokenizer.eos_token_id) is None
    assert word_of(tokenizer, head, len(tokenizer) + 5) is None
    assert word_of(tokenizer, head, tokenizer("lamp")["input_ids"][0]) == "lamp"


def test_what_cannot_answer_is_refused(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedError, match="need the model's tokenizer"):
        TASK.candidates(model, None, ["a"], width=4)
    with pytest.raises(UnsupportedError, match="no 5000 candidate words"):
        TASK.candidates(model, tokenizer, ["The baker"], width=5000)
