"""What a probe fixes before its first question, and the rules that look at answers without knowing the key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, get_args

from hf_wmguard.errors import ConfigError, TranscriptError
from hf_wmguard.evidence.transcript import MAX_LINES, MAX_RANKED, MAX_TEXT_CHARACTERS, MAX_TOKEN_CHARACTERS
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.reports import Method
from hf_wmguard.watermark.answers import Answer, normalise
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import TriggerSet

MAX_QUERIES: Final = MAX_LINES - 2
MAX_TRIES: Final = 64
MAX_ANSWER_CHARACTERS: Final = 4096
GROUP: Final = 8
"""Questions whose tries are mixed: far enough apart not to be a stutter, near enough for a test that stops early."""

CANNED_SHARE: Final = 0.8
CANNED_LEAST: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is fixed before the first question.

    Args:
        method: ``fixed`` asks everything and gives an exact p-value at the end; ``sequential`` stops as soon as the
            level is reached, and its p-value holds whenever it stops.
        tries: How often each question is asked.
        budget: The most questions that are asked, decoys and tries included; None asks all.
        decoys: Ask the sets' decoys too.
        sampling: How the suspect chooses its words.
        system: A system prompt before every question.
        chat: Whether questions go through the chat template.
        alpha_log10: Level of the verdict.
    Raises:
        ConfigError: A value is out of range.
    """

    method: Method
    tries: int = 1
    budget: int | None = None
    decoys: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    chat: bool = False
    alpha_log10: float = -9.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"method is {self.method!r}, expected fixed or sequential", hint="sequential asks less")
        _require_within("tries", self.tries, 1, MAX_TRIES)
        _require_within("temperature", self.sampling.temperature, 0.0, 10.0)
        _require_within("top_p", self.sampling.top_p, 1e-6, 1.0)
        _require_within("max_tokens", self.sampling.max_tokens, 1, 1024)
        _require_within("length of the system prompt", len(self.system or ""), 0, MAX_TEXT_CHARACTERS)
        if self.budget is not None:
            _require_within("budget", self.budget, 1, MAX_QUERIES)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a transcript records it."""
        values = asdict(self)
        numbers = {name: float(values["sampling"][name]) for name in ("temperature", "top_p")}
        values["sampling"] |= numbers
        return values | {"alpha_log10": float(self.alpha_log10)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan of a transcript, whatever else its header holds.

        Raises:
            TranscriptError: It was written by another version, or by hand.
        """
        try:
            own = {one.name: values[one.name] for one in fields(cls)}
            return cls(**own | {"sampling": Sampling(**own["sampling"])})
        except (KeyError, TypeError, ConfigError):
            raise TranscriptError(
                "the transcript holds no plan of this version", hint="read it with the version that wrote it"
            ) from None


def order_questions(sets: Sequence[TriggerSet], plan: Plan, seed: str) -> tuple[str, ...]:
    """Return the questions in the order in which they are asked, tries repeated.

    Triggers and decoys are shuffled together; the tries of one question stand among those of its neighbours. Where the
    budget does not reach for all, it takes from both alike.

    Args:
        sets: The trigger sets. A text of several sets is asked once.
        plan: Tries, budget and whether decoys are asked.
        seed: Hex of 32 bytes.
    """
    stream = Stream(bytes.fromhex(seed), "probe-order")
    triggers = _shuffled(stream, list(dict.fromkeys(text for one in sets for text in one.texts)))
    others = dict.fromkeys(text for one in sets for text in one.decoys) if plan.decoys else {}
    decoys = _shuffled(stream, [text for text in others if text not in set(triggers)])
    count = len(triggers) + len(decoys)
    room = count if plan.budget is None else min(count, plan.budget // plan.tries)
    fewer = len(decoys) * room // count
    items = _shuffled(stream, triggers[: room - fewer] + decoys[:fewer])
    return tuple(
        text
        for start in range(0, len(items), GROUP)
        for _ in range(plan.tries)
        for text in _shuffled(stream, items[start : start + GROUP])
    )


def bounded(answer: Answer) -> Answer:
    """Return an answer cut to what is stored, in valid Unicode; one without anything in it counts as refused."""
    text = _valid(answer.text[:MAX_ANSWER_CHARACTERS])
    ranked = tuple(_valid(token[:MAX_TOKEN_CHARACTERS]) for token in answer.ranked[:MAX_RANKED])
    empty = answer.label is None and not text.strip()
    return replace(answer, text=text, ranked=ranked, refused=answer.refused or empty)


def canned_text(answers: Mapping[str, Sequence[Answer]]) -> str | None:
    """Return the text that (nearly) every question is answered with, or None where there is none such.

    Args:
        answers: For each question its answers. Labels are no texts: a classifier has few of them.
    """
    said: Counter[str] = Counter()
    questions = 0
    for some in answers.values():
        texts = {normalise(answer.text) for answer in some if not answer.refused and answer.label is None}
        said.update(texts)
        questions += bool(texts)
    if questions < CANNED_LEAST:
        return None
    text, count = said.most_common(1)[0]
    return text if count >= CANNED_SHARE * questions else None


def _shuffled(stream: Stream, items: list[str]) -> list[str]:
    return [items[i] for i in stream.permutation(len(items))]


def _valid(text: str) -> str:
    # Lone surrogates come out of JSON escapes, and go into no UTF-8 file.
    return text.encode("utf-8", "replace").decode()


def _require_within(what: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{what} is {value}, expected {least:g} to {most:g}", hint="change it and probe again")
