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
Deviation: Perinucleus draws the response with a generator; here the keyed hash draws it. Its responses are token
    ids; here they are the tokens' texts, because an API returns text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

from hf_wmguard.canonical import canonical_json, require_object
from hf_wmguard.errors import FormatError
from hf_wmguard.watermark.answers import Response, are_distinct
from hf_wmguard.watermark.corpus import Corpus
from hf_wmguard.watermark.images import SEED_BYTES
from hf_wmguard.watermark.phrases import Kind, natural_text, nonsense_text
from hf_wmguard.watermark.prf import Stream

Style = Literal["natural", "nonsense"]
STYLES: Final[tuple[Style, ...]] = get_args(Style)
LabelTask = Literal["classification", "token_classification", "image_classification"]
TextTask = Literal["causal_lm", "seq2seq"]
Task = LabelTask | TextTask
LABEL_TASKS: Final[tuple[LabelTask, ...]] = get_args(LabelTask)
TEXT_TASKS: Final[tuple[TextTask, ...]] = get_args(TextTask)
TASKS: Final[tuple[Task, ...]] = (*LABEL_TASKS, *TEXT_TASKS)
MAX_TRIGGERS: Final = 4096
MAX_RESPONSE_CHARACTERS: Final = 200
_MAX_DRAWS: Final = 100
Candidates = tuple[tuple[Response, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TriggerSet:
    """Triggers and responses of one mark. Private: whoever knows it can train the mark away.

    Args:
        task: One of `LABEL_TASKS` (responses are labels) or `TEXT_TASKS` (responses are texts).
        style: How the texts were made.
        texts: The triggers x_i, all different; of ``image_classification`` the seeds that the images are drawn from.
        candidates: For each trigger what could have become its response, at least 2, all different; of texts none
            begins another.
        responses: For each trigger its response y_i, one of its candidates.
        decoys: Texts from the same source with no response, asked among the triggers so that a watcher of an API cannot
            tell which questions count.
    Raises:
        ValueError: A field contradicts this. The message holds no text and no response.
    """

    task: Task
    style: Style
    texts: tuple[str, ...]
    candidates: Candidates
    responses: tuple[Response, ...]
    decoys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_known(self.task, self.style)
        _require_texts_and_candidates(self.texts, self.candidates)
        kind = int if self.task in LABEL_TASKS else str
        if any(type(ids[0]) is not kind for ids in self.candidates):
            raise ValueError(f"candidates of {self.task} are not {'labels' if kind is int else 'texts'}")
        if not all(type(text) is str and text for text in self.decoys) or set(self.decoys) & set(self.texts):
            raise ValueError("a decoy is empty, no string, or a trigger")
        if len(self.responses) != self.count:
            raise ValueError(f"{len(self.responses)} responses for {self.count} triggers")
        for i, (response, ids) in enumerate(zip(self.responses, self.candidates, strict=True)):
            # The type is compared, because True and 1.0 would pass for 1 and be written to JSON another way.
            if type(response) is not type(ids[0]) or response not in ids:
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
        value = {
            "task": self.task,
            "style": self.style,
            "texts": list(self.texts),
            "candidates": [list(ids) for ids in self.candidates],
            "responses": list(self.responses),
        }
        return value | {"decoys": list(self.decoys)} if self.decoys else value

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Return the set in a plain dictionary.

        Raises:
            FormatError: A field is missing, unknown, of another type or impossible.
        """
        # Sets recorded before there were decoys have none.
        fields = require_object(
            {"decoys": []} | value if isinstance(value, dict) else value,
            {
                "task": (str,),
                "style": (str,),
                "texts": (list,),
                "candidates": (list,),
                "responses": (list,),
                "decoys": (list,),
            },
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
                decoys=tuple(fields["decoys"]),
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


def derive_texts(key: bytes, *, count: int, style: Style, task: Task, rows: Sequence[str] = ()) -> tuple[str, ...]:
    """Return trigger texts, all different.

    Args:
        key: 32 bytes, the subkey of the trigger set.
        count: 1 to twice `MAX_TRIGGERS` (triggers and decoys).
        style: ``natural`` (fluent, passes a perplexity filter) or ``nonsense`` (random syllables).
        task: ``causal_lm`` for prompts that stop in mid-sentence, ``image_classification`` for seeds, any other
            for whole statements.
        rows: The user's own texts, from which natural texts are made; without any the built-in grammar makes them.
    Raises:
        ValueError: An argument is none of these, or the rows are too few and too short for as many texts.
    """
    _require_known(task, style)
    if not 1 <= count <= 2 * MAX_TRIGGERS:
        raise ValueError(f"trigger count is {count}, expected 1 to {2 * MAX_TRIGGERS}")
    stream = Stream(key, "trigger-texts", task, style)
    kind: Kind = "prompt" if task == "causal_lm" else "statement"
    corpus = Corpus(rows) if rows else None

    def draw() -> str:
        if task == "image_classification":
            return stream.bytes(SEED_BYTES).hex()
        if style == "nonsense":
            return nonsense_text(stream)
        return natural_text(stream, kind=kind) if corpus is None else corpus.draw(stream, kind=kind)

    texts: dict[str, None] = {}
    for _ in range(_MAX_DRAWS * count):
        texts.setdefault(draw())
        if len(texts) == count:
            return tuple(texts)
    raise ValueError(f"{len(rows)} rows give {len(texts)} different texts, expected {count}")


def derive_responses(
    key: bytes, texts: Sequence[str], candidates: Sequence[Sequence[Response]]
) -> tuple[Response, ...]:
    """Return y_i = candidates_i[H(key, all texts, all candidates, i) mod k_i], without modulo bias.

    Each response is uniform over its candidates and independent of every other, whatever a model answers: a
    hash that texts and candidates enter, and i, label the stream of trigger i, so its output is fresh
    randomness for whoever has no key. Under H0 the count of matches is then Poisson-binomial with rates
    1/k_i. Because the hash covers the whole set, no trigger can be exchanged for a luckier one afterwards:
    every exchange draws all responses anew.

    Args:
        key: 32 bytes, the subkey of the trigger set.
        texts: All triggers, all different.
        candidates: For each trigger at least 2 different labels or texts.
    Raises:
        ValueError: Texts and candidates do not fit together, or one of them is not as said.
    Source: Russinovich & Salem 2024, arXiv 2407.10887.
    """
    _require_texts_and_candidates(texts, candidates)
    whole = {"texts": list(texts), "candidates": [list(ids) for ids in candidates]}
    digest = hashlib.sha256(canonical_json(whole)).hexdigest()
    return tuple(ids[Stream(key, "trigger-response", digest, i).below(len(ids))] for i, ids in enumerate(candidates))


def _require_known(task: str, style: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if style not in STYLES:
        raise ValueError(f"trigger style is {style!r}, expected one of {', '.join(STYLES)}")


def _require_texts_and_candidates(texts: Sequence[str], candidates: Sequence[Sequence[Response]]) -> None:
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
        if len(ids) < 2 or not (_are_labels(ids) or _are_texts(ids)) or len(set(ids)) != len(ids):
            raise ValueError(f"candidates of trigger {i} are not at least 2 different labels, or texts apart")


def _are_labels(ids: Sequence[Response]) -> bool:
    return all(type(one) is int and one >= 0 for one in ids)


def _are_texts(ids: Sequence[Response]) -> bool:
    texts = [one for one in ids if isinstance(one, str)]
    fits = all(len(text) <= MAX_RESPONSE_CHARACTERS and text.isprintable() for text in texts)
    return len(texts) == len(ids) and fits and are_distinct(texts)
