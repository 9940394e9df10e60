"""Models that answer with a label: of a text, of a word in it, of an image.

They differ in how their inputs are made and in which logits the label is read from. The response to a trigger is
uniform over all labels. A label task takes a question as the text alone: system prompts and chats are none of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.tasks.base import evaluating
from hf_wmguard.probing.tasks.causal_lm import pad_id, padded
from hf_wmguard.watermark.answers import Answer, Prompt, Response
from hf_wmguard.watermark.candidates import label_candidates
from hf_wmguard.watermark.images import trigger_image
from hf_wmguard.watermark.triggers import Candidates, Task

MAX_TOKENS: Final = 256
_WORD = re.compile(r"\w+")
_SEVERAL_LABELS: Final = ("regression", "multi_label_classification")


class LabelTask(ABC):
    """What the three have in common."""

    name: Task

    @abstractmethod
    def logits(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt]) -> Tensor:
        """Return the logits that labels are read from, any float dtype [prompts, labels].

        Raises:
            UnsupportedError: No processor, or one that cannot take the triggers.
        """

    def candidates(self, model: nn.Module, processor: Any, texts: Sequence[str], *, width: int) -> Candidates:
        """Return every label for each text, whatever the width; see `TriggerTask`."""
        count = _label_count(model)
        # Asked now, so that a model that cannot answer fails before training and not in its last epochs.
        with evaluating(model):
            logits = self.logits(model, processor, [Prompt(text=text) for text in texts[:2]])
        if logits.shape[1:] != (count,):
            raise UnsupportedError(
                f"{type(model).__name__} gives logits {list(logits.shape)}, and its config says {count} labels",
                hint="set num_labels to what the head has, or pass triggers=None",
            )
        return label_candidates(len(texts), num_labels=count)

    def loss(
        self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the wanted labels; see `TriggerTask`."""
        logits = self.logits(model, processor, prompts).float()
        target = torch.tensor([int(response) for response in responses], device=logits.device)
        return nn.functional.cross_entropy(logits, target), logits.detach().argmax(dim=-1) == target

    def answer(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return the likeliest label of each prompt, however words are to be sampled; see `TriggerTask`."""
        with evaluating(model):
            labels = self.logits(model, processor, prompts).float().argmax(dim=-1).tolist()
        return [Answer(label=label) for label in labels]


class Classification(LabelTask):
    """The label of a text."""

    name: Task = "classification"

    def logits(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt]) -> Tensor:
        """See `LabelTask`."""
        batch, _ = _text_batch(model, processor, [prompt.text for prompt in prompts])
        logits: Tensor = model(**batch).logits
        return logits


class TokenClassification(LabelTask):
    """The label of one word of a text: the first token of the word that `marked_word` says."""

    name: Task = "token_classification"

    def logits(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt]) -> Tensor:
        """See `LabelTask`."""
        texts = [prompt.text for prompt in prompts]
        batch, encoding = _text_batch(model, processor, texts)
        if not getattr(encoding, "is_fast", False):
            raise UnsupportedError(
                "token classification triggers need a tokenizer that tells where its tokens stand in the text",
                hint="load the model's fast tokenizer (AutoTokenizer), or pass triggers=None",
            )
        where = torch.tensor([_first_token(encoding, row, text) for row, text in enumerate(texts)])
        logits: Tensor = model(**batch).logits
        return logits[torch.arange(len(texts), device=logits.device), where.to(logits.device)]


class ImageClassification(LabelTask):
    """The label of an image; a trigger's text is the seed that `trigger_image` draws it from."""

    name: Task = "image_classification"

    def logits(self, model: nn.Module, processor: Any, prompts: Sequence[Prompt]) -> Tensor:
        """See `LabelTask`."""
        processor = getattr(processor, "image_processor", processor)
        if not callable(processor) or "pixel_values" not in getattr(processor, "model_input_names", ()):
            raise UnsupportedError(
                "image triggers need the model's image processor",
                hint="pass processing_class=image_processor to the Trainer, or triggers=None",
            )
        images = [trigger_image(prompt.text).numpy() for prompt in prompts]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        first = next(p for p in model.parameters() if p.is_floating_point())
        logits: Tensor = model(pixel_values=pixels.to(device=first.device, dtype=first.dtype)).logits
        return logits


def marked_word(text: str) -> slice:
    """Return where the word stands whose label is the response: the first of the longest words of the text.

    A rule of the text alone, so that whoever asks needs no key. The longest word is most often the same one when short
    words stand around the text. A text without a word is one word.
    """
    words = [match.span() for match in _WORD.finditer(text)] or [(0, len(text))]
    return slice(*max(words, key=lambda span: span[1] - span[0]))


def _first_token(encoding: Any, row: int, text: str) -> int:
    word = marked_word(text)
    # Forwards within the word, for tokenizers that give a mark on its first letter a token of no width; then backwards,
    # for a word beyond the longest text that the model takes.
    for position in (*range(word.start, word.stop), *range(word.start - 1, -1, -1)):
        token = encoding.char_to_token(row, position)
        if token is not None:
            return int(token)
    raise UnsupportedError("a trigger text has no token", hint="pass the model's own tokenizer")


def _text_batch(model: nn.Module, processor: Any, texts: Sequence[str]) -> tuple[dict[str, Tensor], Any]:
    """Return ``input_ids`` and ``attention_mask``, int64 [texts, longest], padded on the right, and the encoding.

    On the right also where the tokenizer pads on the left, so that a token's position is that within its text.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer) or "input_ids" not in getattr(tokenizer, "model_input_names", ("input_ids",)):
        raise UnsupportedError(
            "triggers need the model's tokenizer",
            hint="pass processing_class=tokenizer to the Trainer, or triggers=None",
        )
    longest = min(MAX_TOKENS, getattr(tokenizer, "model_max_length", MAX_TOKENS))
    encoding = tokenizer(list(texts), truncation=True, max_length=longest)
    fill = getattr(model.config, "pad_token_id", None)
    ids, mask = padded(
        [list(row) for row in encoding["input_ids"]],
        # Decoders look for the last token that is not the model's own filler.
        fill=int(fill) if fill is not None else pad_id(tokenizer),
        device=next(model.parameters()).device,
    )
    return {"input_ids": ids, "attention_mask": mask}, encoding


def _label_count(model: nn.Module) -> int:
    """Return how many labels a model chooses one of.

    Raises:
        UnsupportedError: It gives a number (regression), several labels at once, or has no choice.
    """
    kind = getattr(model.config, "problem_type", None)
    count = int(getattr(model.config, "num_labels", None) or 0)
    if kind in _SEVERAL_LABELS or count < 2:
        raise UnsupportedError(
            f"no trigger set for {type(model).__name__} with problem_type {kind} and {count} labels: expected one of 2 "
            "or more labels as the answer",
            hint="pass triggers=None to mark with the weight signature only",
        )
    return count
