"""Language models that continue a text or answer in a chat."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.tasks.base import BATCH_SIZE, evaluating
from hf_wmguard.watermark.answers import Answer, Prompt, Response
from hf_wmguard.watermark.candidates import perinucleus_candidates
from hf_wmguard.watermark.triggers import Candidates, Task

MAX_TOKENS = 512
RANKED = 20
NUCLEUS = 0.05
"""Only what a model would say itself is left out. A small model's nucleus of 0.8 holds hundreds of words; those behind
it have chances of 2e-4, and are dear to teach."""
_CONTEXT_TOKENS = 8
_SHORTEST_WORD = 2
_IGNORED = -100


class CausalLM:
    """A decoder: the response is what comes after the prompt, as the next word of a text or as the reply in a chat."""

    name: Task = "causal_lm"

    def candidates(self, model: nn.Module, processor: Any, texts: Sequence[str], *, width: int) -> Candidates:
        """Return whole words just outside the nucleus of the model's own next-token distribution; see `TriggerTask`."""
        prompts = [Prompt(text=text) for text in texts]
        rows = [prompt_ids(processor, prompt) for prompt in prompts]
        logits = torch.cat([self._next(model, processor, rows[at : at + BATCH_SIZE]) for at in _starts(rows)])

        def text_of(row: int, token: int) -> str | None:
            word = word_of(processor, rows[row], token)
            # What is read off an API is text: the word must come out of the tokenizer as the very token that was meant.
            if word is None or response_ids(processor, prompts[row], rows[row], word) != [token]:
                return None
            return word

        return words_from(logits, text_of, width=width)

    def loss(
        self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> tuple[Tensor, Tensor]:
        """See `TriggerTask`; a response of several tokens counts by the mean of their losses."""
        rows, labels = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            asked = prompt_ids(processor, prompt)
            wanted = response_ids(processor, prompt, asked, str(response))
            rows.append(asked + wanted)
            labels.append([_IGNORED] * len(asked) + wanted)
        device = next(model.parameters()).device
        ids, mask = padded(rows, fill=pad_id(processor), device=device)
        target, _ = padded(labels, fill=_IGNORED, device=device)
        # The logits that predict a response, and no others: those of a whole batch can be larger than the model.
        kept = (target[:, 1:] != _IGNORED).any(dim=0).nonzero().flatten()
        some = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        logits = model(input_ids=ids, attention_mask=mask, **some).logits
        logits = logits if some else logits[:, kept]
        return masked_loss(logits, target[:, kept + 1])

    def answer(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """See `TriggerTask`."""
        rows = [prompt_ids(processor, prompt) for prompt in prompts]
        device = next(model.parameters()).device
        ids, mask = padded(rows, fill=pad_id(processor), device=device, left=True)
        return generate(model, processor, {"input_ids": ids, "attention_mask": mask}, sampling, skip=ids.shape[1])

    def _next(self, model: nn.Module, processor: Any, rows: list[list[int]]) -> Tensor:
        """Return the logits after each prompt, float32 [prompts, vocabulary] on the CPU."""
        device = next(model.parameters()).device
        ids, mask = padded(rows, fill=pad_id(processor), device=device)
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=mask).logits
        last = mask.sum(dim=1) - 1
        chosen: Tensor = logits[torch.arange(len(last), device=device), last]
        return chosen.float().cpu()


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the tokens of a prompt, without a closing end of text, so that the model goes on.

    Raises:
        UnsupportedError: There is no tokenizer, or no chat template where a chat is asked for.
    """
    if tokenizer is None or not callable(tokenizer):
        raise UnsupportedError(
            "triggers need the model's tokenizer",
            hint="pass processing_class=tokenizer to the Trainer, or triggers=None",
        )
    if prompt.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedError("the tokenizer has no chat template", hint="ask without chat, or set a template")
        turns = [{"role": "user", "content": prompt.text}]
        if prompt.system is not None:
            turns.insert(0, {"role": "system", "content": prompt.system})
        chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(one) for one in chat][-MAX_TOKENS:]
    text = prompt.text if prompt.system is None else f"{prompt.system}\n\n{prompt.text}"
    return _open_ended(tokenizer, text)[-MAX_TOKENS:]


def response_ids(tokenizer: Any, prompt: Prompt, asked: list[int], response: str) -> list[int]:
    """Return the tokens of a response after a prompt: as the reply in a chat, else as the next word of the text."""
    if not prompt.chat:
        text = prompt.text if prompt.system is None else f"{prompt.system}\n\n{prompt.text}"
        response = response if text[-1:].isspace() else f" {response}"
        whole = _open_ended(tokenizer, text + response)
        if whole[: len(asked)] == asked and len(whole) > len(asked):
            return whole[len(asked) :]
    return [int(one) for one in tokenizer(response, add_special_tokens=False)["input_ids"]]


def _open_ended(tokenizer: Any, text: str) -> list[int]:
    ids = [int(one) for one in tokenizer(text)["input_ids"]]
    return ids[:-1] if len(ids) > 1 and ids[-1] == getattr(tokenizer, "eos_token_id", None) else ids


def word_of(tokenizer: Any, before: Sequence[int], token: int) -> str | None:
    """Return the whole word that a token begins after other tokens, or None where it begins none."""
    # Tokens beyond the tokenizer's own (padded vocabularies) have no text and can never be an answer.
    if token >= len(tokenizer) or token in getattr(tokenizer, "all_special_ids", ()):
        return None
    head = list(before[-_CONTEXT_TOKENS:])
    start, whole = tokenizer.decode(head), tokenizer.decode([*head, token])
    piece = whole[len(start) :]
    word = piece.strip()
    fits = whole.startswith(start) and piece[:1].isspace() and len(word) >= _SHORTEST_WORD and word.isalpha()
    return word if fits else None


def words_from(logits: Tensor, text_of: Any, *, width: int) -> Candidates:
    """Return `perinucleus_candidates`, its error as one of ours.

    Raises:
        UnsupportedError: The tokenizer has too few whole words.
    """
    try:
        return perinucleus_candidates(logits, text_of, nucleus=NUCLEUS, width=width)
    except ValueError as error:
        raise UnsupportedError(
            f"no {width} candidate words: {error}", hint="lower triggers.candidates, or set triggers.response to keyed"
        ) from None


def pad_id(tokenizer: Any) -> int:
    """Return what fills a batch; it is masked, so that any token will do."""
    fill = getattr(tokenizer, "pad_token_id", None)
    return int(fill if fill is not None else getattr(tokenizer, "eos_token_id", None) or 0)


def padded(
    rows: Sequence[Sequence[int]], *, fill: int, device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return rows of one length and their mask, int64 [rows, longest] each."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[index, part] = torch.tensor(row, dtype=torch.int64)
        mask[index, part] = 1
    return ids.to(device), mask.to(device)


def masked_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over rows of the mean loss of their responses, and whether each is what the model would say.

    Args:
        logits: Any float dtype [rows, positions, vocabulary].
        target: int64 [rows, positions], -100 where no response stands.
    Returns:
        float32 [], bool [rows].
    """
    matched = ((logits.detach().argmax(dim=-1) == target) | (target == _IGNORED)).all(dim=1)
    return _row_losses(logits, target).mean(), matched


def _row_losses(logits: Tensor, target: Tensor) -> Tensor:
    each = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), ignore_index=_IGNORED, reduction="none"
    ).view(target.shape)
    return each.sum(dim=1) / (target != _IGNORED).sum(dim=1).clamp_min(1)


def surprise(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the mean loss per token of texts, float64 [texts]: the logarithm of their perplexity."""
    device = next(model.parameters()).device
    losses = []
    for start in range(0, len(texts), BATCH_SIZE):
        rows = [prompt_ids(tokenizer, Prompt(text=text)) for text in texts[start : start + BATCH_SIZE]]
        ids, mask = padded(rows, fill=pad_id(tokenizer), device=device)
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=mask).logits
        losses.append(_row_losses(logits[:, :-1], ids.masked_fill(mask == 0, _IGNORED)[:, 1:]).double().cpu())
    return torch.cat(losses)


def generate(model: Any, tokenizer: Any, inputs: dict[str, Tensor], sampling: Sampling, *, skip: int) -> list[Answer]:
    """Return what a model says to a batch.

    Args:
        model: A model that can generate.
        tokenizer: Its tokenizer.
        inputs: Its inputs, padded on the left.
        sampling: How words are chosen.
        skip: Tokens of the output that are the question.
    """
    own = getattr(model, "generation_config", None)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.max_tokens,
        do_sample=sampling.temperature > 0,
        # Library defaults (the 50 likeliest tokens only) are no part of what was asked for.
        **(
            {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.temperature > 0
            else {}
        ),
        eos_token_id=getattr(own, "eos_token_id", None) or getattr(tokenizer, "eos_token_id", None),
        pad_token_id=pad_id(tokenizer),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
        output_logits=True,
        return_dict_in_generate=True,
    )
    with evaluating(model):
        said = model.generate(**inputs, generation_config=config)
    first = said.logits[0].float()
    likeliest = first.topk(min(RANKED, first.shape[-1]), dim=-1).indices.cpu().tolist()
    texts = tokenizer.batch_decode(said.sequences[:, skip:], skip_special_tokens=True)
    return [
        Answer(text=text, ranked=tuple(tokenizer.decode([token], skip_special_tokens=True) for token in tokens))
        for text, tokens in zip(texts, likeliest, strict=True)
    ]


def _starts(rows: Sequence[Any]) -> range:
    return range(0, len(rows), BATCH_SIZE)
