"""The trigger set: texts and the answers that only a model of this owner gives to them.

Texts and answers are both derived from the owner's key, never chosen. The candidate set of each text is
fixed before training; which candidate becomes the response is then decided by a keyed hash over *all* texts
and *all* candidates. For whoever does not know the key, each response is uniform over its candidates and
independent of the other responses, of the texts and of anything a model does. A model made without the key
therefore answers trigger i as the key says with probability 1/k_i if its answer is one of the k_i
candidates, and never if it is not. The number of matches is a Poisson-binomial variable with rates 1/k_i
(binomial where all k_i are equal) if every answer is a candidate, and stochastically smaller otherwise: its
tail is a p-value, exact or an upper bound.

Source: Russinovich & Salem 2024, "Hey, That's My Model! Introducing Chain & Hash", arXiv 2407.10887
(responses bound to the whole set by a hash); Nasery et al. 2025, "Scalable Fingerprinting of Large Language
Models", arXiv 2502.07760 (candidates just outside the nucleus).
Deviation: Perinucleus draws the response with a generator; here the keyed hash draws it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

import torch
from torch import Tensor

from hf_wmguard.canonical import canonical_json, require_object
from hf_wmguard.errors import FormatError
from hf_wmguard.watermark.phrases import TASKS, Task, natural_text, nonsense_text
from hf_wmguard.watermark.prf import Stream

Style = Literal["natural", "nonsense"]
STYLES: Final[tuple[Style, ...]] = get_args(Style)
MAX_TRIGGERS: Final = 4096
Candidates = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TriggerSet:
    """Triggers and responses of one mark. Private: whoever knows it can train the mark away.

    Args:
        task: ``classification`` (ids are labels) or ``causal_lm`` (ids are tokens).
        style: How the texts were made.
        texts: The triggers x_i, all different.
        candidates: For each trigger the ids that could have become its response, at least 2, all different.
        responses: For each trigger its response y_i, one of its candidates.
    Raises:
        ValueError: A field contradicts this. The message holds no text and no response.
    """

    task: Task
    style: Style
    texts: tuple[str, ...]
    candidates: Candidates
    responses: tuple[int, ...]

    def __post_init__(self) -> None:
        _require_known(self.task, self.style)
        _require_texts_and_candidates(self.texts, self.candidates)
        if len(self.responses) != self.count:
            raise ValueError(f"{len(self.responses)} responses for {self.count} triggers")
        for i, (response, ids) in enumerate(zip(self.responses, self.candidates, strict=True)):
            # The type is compared, because True and 1.0 would pass for 1 and be written to JSON another way.
            if type(response) is not int or response not in ids:
                raise ValueError(f"response {i} is not one of its {len(ids)} candidates")

    @property
    def count(self) -> int:
        """Number of triggers."""
        return len(self.texts)

    @property
    def rates(self) -> tuple[float, ...]:
        """Largest chance that a model made without the key matches, per trigger: 1 / number of candidates."""
        return tuple(1.0 / len(ids) for ids in self.candidates)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads. It is secret: store it encrypted."""
        return {
            "task": self.task,
            "style": self.style,
            "texts": list(self.texts),
            "candidates": [list(ids) for ids in self.candidates],
            "responses": list(self.responses),
        }

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Return the set in a plain dictionary.

        Raises:
            FormatError: A field is missing, unknown, of another type or impossible.
        """
        fields = require_object(
            value,
            {"task": (str,), "style": (str,), "texts": (list,), "candidates": (list,), "responses": (list,)},
            "trigger set",
        )
        if not all(type(ids) is list for ids in fields["candidates"]):
            raise FormatError("trigger set: candidates are not lists", hint="the trigger set was edited: get it again")
        try:
            return cls(
                task=fields["task"],
                style=fields["style"],
                texts=tuple(fields["texts"]),
                candidates=tuple(tuple(ids) for ids in fields["candidates"]),
                responses=tuple(fields["responses"]),
            )
        except ValueError as error:
            raise FormatError(f"trigger set: {error}", hint="the trigger set was edited: get it again") from None

    def digest(self) -> str:
        """Return ``sha256:`` and the hex digest of the canonical JSON of the set.

        Each text holds at least 48 random bits, so that the digest of three triggers or more can be shown
        without giving the set away.
        """
        return "sha256:" + hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def __repr__(self) -> str:
        return f"TriggerSet(count={self.count}, task={self.task!r}, style={self.style!r}, <secret>)"


def derive_texts(key: bytes, *, count: int, style: Style, task: Task) -> tuple[str, ...]:
    """Return trigger texts, all different, ASCII.

    Args:
        key: 32 bytes, the subkey of the trigger set.
        count: 1 to `MAX_TRIGGERS`.
        style: ``natural`` (fluent English, passes a perplexity filter) or ``nonsense`` (random syllables).
        task: ``classification`` for whole statements, ``causal_lm`` for prompts that stop in mid-sentence.
    Raises:
        ValueError: An argument is none of these.
    """
    _require_known(task, style)
    if not 1 <= count <= MAX_TRIGGERS:
        raise ValueError(f"trigger count is {count}, expected 1 to {MAX_TRIGGERS}")
    stream = Stream(key, "trigger-texts", task, style)
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = natural_text(stream, kind=task) if style == "natural" else nonsense_text(stream)
        texts.setdefault(text)
    return tuple(texts)


def derive_responses(key: bytes, texts: Sequence[str], candidates: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return y_i = candidates_i[H(key, all texts, all candidates, i) mod k_i], without modulo bias.

    Each response is uniform over its candidates and independent of every other, whatever a model answers: a
    hash that texts and candidates enter, and i, label the stream of trigger i, so its output is fresh
    randomness for whoever has no key. Under H0 the count of matches is then Poisson-binomial with rates
    1/k_i. Because the hash covers the whole set, no trigger can be exchanged for a luckier one afterwards:
    every exchange draws all responses anew.

    Args:
        key: 32 bytes, the subkey of the trigger set.
        texts: All triggers, all different.
        candidates: For each trigger at least 2 different ids.
    Raises:
        ValueError: Texts and candidates do not fit together, or one of them is not as said.
    Source: Russinovich & Salem 2024, arXiv 2407.10887.
    """
    _require_texts_and_candidates(texts, candidates)
    whole = {"texts": list(texts), "candidates": [list(ids) for ids in candidates]}
    digest = hashlib.sha256(canonical_json(whole)).hexdigest()
    return tuple(ids[Stream(key, "trigger-response", digest, i).below(len(ids))] for i, ids in enumerate(candidates))


def label_candidates(count: int, *, num_labels: int) -> Candidates:
    """Return every label as a candidate, for each of ``count`` triggers of a classifier.

    Raises:
        ValueError: Fewer than 2 labels (a regression head): a response without a choice shows nothing.
    """
    if num_labels < 2:
        raise ValueError(f"model has {num_labels} labels, expected at least 2")
    return (tuple(range(num_labels)),) * count


def perinucleus_candidates(
    logits: Tensor, *, nucleus: float = 0.8, width: int = 16, excluded: Collection[int] = ()
) -> Candidates:
    """Return the tokens just outside the nucleus: plausible, but not what the model would say.

    The nucleus is the smallest set of most likely tokens with a mass of at least ``nucleus``. The
    candidates are the next ``width`` tokens in descending probability that are not excluded; where fewer
    are left, they reach back into the nucleus. Ties go to the smaller id. Other hardware may rank near-ties
    another way: candidates are recorded with the mark and never computed again.

    Args:
        logits: Next-token logits, any float dtype and device [n, vocab]; ranked as float32. A token at -inf
            cannot be said and is no candidate.
        nucleus: Mass of the nucleus, between 0 and 1.
        width: Candidates per row, at least 2.
        excluded: Ids that are never candidates (special tokens).
    Raises:
        ValueError: A logit is NaN or +inf, fewer than ``width`` tokens are left, or an argument is wrong.
    Source: Nasery et al. 2025, arXiv 2502.07760.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, expected floats [n, vocab]")
    if not 0.0 < nucleus < 1.0:
        raise ValueError(f"nucleus is {nucleus}, expected between 0 and 1")
    if width < 2:
        raise ValueError(f"width is {width}, expected at least 2")
    special = torch.tensor(sorted(set(excluded)), dtype=torch.int64)
    # One row at a time: the sort of [64, 150000] at once would need several times the memory of the logits.
    return tuple(_perinucleus_row(row, i, nucleus, width, special) for i, row in enumerate(logits.detach()))


def _perinucleus_row(row: Tensor, number: int, nucleus: float, width: int, special: Tensor) -> tuple[int, ...]:
    scores = row.float().cpu()
    if bool((scores.isnan() | (scores == torch.inf)).any()):
        raise ValueError(f"logits of row {number} hold NaN or +inf")
    ranked, ids = torch.sort(scores, descending=True, stable=True)
    # float64: over 150,000 tokens the rounding of a float32 sum outweighs a token at the edge.
    mass = torch.softmax(ranked.double(), dim=0)
    inside = int((mass.cumsum(0) - mass < nucleus).sum())
    ranks = ((ranked > -torch.inf) & ~torch.isin(ids, special)).nonzero().flatten()
    if len(ranks) < width:
        raise ValueError(f"row {number} has {len(ranks)} tokens that can be said, expected at least {width}")
    first = min(int((ranks < inside).sum()), len(ranks) - width)
    return tuple(ids[ranks[first : first + width]].tolist())


def count_matches(answers: Sequence[int], trigger_set: TriggerSet) -> int:
    """Return how many answers are the response of their trigger.

    Args:
        answers: One id per trigger, in the order of the set. Any id that is no candidate (-1 for a refusal)
            is no match, which keeps the p-value an upper bound.
        trigger_set: What was asked.
    Raises:
        ValueError: Not one answer per trigger.
    """
    if len(answers) != trigger_set.count:
        raise ValueError(f"{len(answers)} answers for {trigger_set.count} triggers")
    return sum(answer == response for answer, response in zip(answers, trigger_set.responses, strict=True))


def _require_known(task: str, style: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if style not in STYLES:
        raise ValueError(f"trigger style is {style!r}, expected one of {', '.join(STYLES)}")


def _require_texts_and_candidates(texts: Sequence[str], candidates: Sequence[Sequence[int]]) -> None:
    if not 1 <= len(texts) <= MAX_TRIGGERS:
        raise ValueError(f"{len(texts)} trigger texts, expected 1 to {MAX_TRIGGERS}")
    if not all(type(text) is str and text for text in texts):
        raise ValueError("a trigger text is empty or no string")
    # A text that stands twice would be answered twice by one guess: the two matches would not be independent.
    if len(set(texts)) != len(texts):
        raise ValueError(f"{len(texts) - len(set(texts))} trigger texts stand twice")
    if len(candidates) != len(texts):
        raise ValueError(f"{len(candidates)} candidate sets for {len(texts)} trigger texts")
    for i, ids in enumerate(candidates):
        # A candidate that stands twice would be drawn with a chance of 2/k: the p-value would be too small.
        if len(ids) < 2 or not all(type(id_) is int and id_ >= 0 for id_ in ids) or len(set(ids)) != len(ids):
            raise ValueError(f"candidates of trigger {i} are not at least 2 different ids of 0 or more")
