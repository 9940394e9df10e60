"""Encoders with a decoder, as T5 and BART: the encoder reads the prompt, the decoder says the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.tasks.base import BATCH_SIZE, evaluating
from hf_wmguard.probing.tasks.causal_lm import generate, masked_loss, pad_id, padded, words_from
from hf_wmguard.watermark.answers import Answer, Prompt, Response
from hf_wmguard.watermark.triggers import Candidates, Task

MAX_TOKENS: Final = 512
_SHORTEST_WORD: Final = 2
_IGNORED: Final = -100
_PROBE: Final = "the"


class Seq2Seq:
    """The response is what the decoder says first. A system prompt stands before the text; chats are not known here."""

    name: Task = "seq2seq"

    def candidates(self, model: nn.Module, processor: Any, texts: Sequence[str], *, width: int) -> Candidates:
        """Return whole words just outside the nucleus of the decoder's first-step distribution; see `TriggerTask`."""
        _require_tokenizer(processor)
        prompts = [Prompt(text=text) for text in texts]
        logits = torch.cat(
            [_first_step(model, processor, prompts[at : at + BATCH_SIZE]) for at in range(0, len(prompts), BATCH_SIZE)]
        )
        words: dict[int, str | None] = {}

        def text_of(row: int, token: int) -> str | None:
            # The decoder has said nothing yet: a token's word is the same for every prompt.
            if token not in words:
                words[token] = _word_of(processor, token)
            return words[token]

        return words_from(logits, text_of, width=width)

    def loss(
        self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> tuple[Tensor, Tensor]:
        """See `TriggerTask`; a response of several tokens counts by the mean of their losses."""
        opening = _opening(model, processor)
        wanted = [_own_ids(processor, str(response)) for response in responses]
        device = next(model.parameters()).device
        decoder, _ = padded([opening + ids[:-1] for ids in wanted], fill=pad_id(processor), device=device)
        target, _ = padded([[_IGNORED] * (len(opening) - 1) + ids for ids in wanted], fill=_IGNORED, device=device)
        # Fillers stand after every response, where a decoder does not look.
        logits = model(**_encoder_batch(model, processor, prompts), decoder_input_ids=decoder).logits
        return masked_loss(logits, target)

    def answer(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """See `TriggerTask`."""
        opening = _opening(model, processor)
        batch = _encoder_batch(model, processor, prompts)
        batch["decoder_input_ids"] = torch.tensor([opening] * len(prompts), device=batch["input_ids"].device)
        return generate(model, processor, batch, sampling, skip=len(opening))


def _require_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None or not callable(tokenizer):
        raise UnsupportedError(
            "triggers need the model's tokenizer",
            hint="pass processing_class=tokenizer to the Trainer, or triggers=None",
        )


def _encoder_batch(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    _require_tokenizer(tokenizer)
    texts = [p.text if p.system is None else f"{p.system}\n\n{p.text}" for p in prompts]
    longest = min(MAX_TOKENS, getattr(tokenizer, "model_max_length", MAX_TOKENS))
    rows = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    ids, mask = padded(rows, fill=pad_id(tokenizer), device=next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": mask}


def _opening(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return what a decoder starts with: its start token, and what the tokenizer puts before every target.

    T5 puts nothing there, BART its beginning of text, mBART a language.
    """
    configs = (getattr(model, "generation_config", None), model.config)
    start = next((i for i in (getattr(c, "decoder_start_token_id", None) for c in configs) if i is not None), None)
    if not isinstance(start, int):
        raise UnsupportedError(
            f"{type(model).__name__} has no decoder_start_token_id: its decoder cannot begin",
            hint="set model.config.decoder_start_token_id",
        )
    whole = [int(one) for one in tokenizer(text_target=_PROBE)["input_ids"]]
    own = _own_ids(tokenizer, _PROBE)
    before = next((at for at in range(len(whole)) if whole[at : at + len(own)] == own), 0)
    return [start, *whole[:before]]


def _own_ids(tokenizer: Any, response: str) -> list[int]:
    return [int(one) for one in tokenizer(text_target=response, add_special_tokens=False)["input_ids"]]


def _word_of(tokenizer: Any, token: int) -> str | None:
    """Return the whole word that a token begins an answer with, or None where it begins none."""
    # Tokens beyond the tokenizer's own (padded vocabularies) have no text and can never be an answer.
    if token >= len(tokenizer) or token in getattr(tokenizer, "all_special_ids", ()):
        return None
    word = str(tokenizer.decode([token])).strip()
    # What is read is text: the word must come out of the tokenizer as the very token that was meant.
    fits = len(word) >= _SHORTEST_WORD and word.isalpha() and _own_ids(tokenizer, word) == [token]
    return word if fits else None


def _first_step(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Return the logits of the first token of the answers, float32 [prompts, vocabulary] on the CPU."""
    batch = _encoder_batch(model, tokenizer, prompts)
    opening = torch.tensor([_opening(model, tokenizer)] * len(prompts), device=batch["input_ids"].device)
    with evaluating(model):
        logits: Tensor = model(**batch, decoder_input_ids=opening).logits
    return logits[:, -1].float().cpu()
