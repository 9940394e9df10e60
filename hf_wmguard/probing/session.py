"""One probe: which questions are asked in which order, when it stops, and what the answers are worth.

Everything that the p-value rests on is fixed before the first question: the sets, the level, the method, the tries per
trigger and the order. Which answers count is decided by the answers alone, never by whether they match.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hf_wmguard.errors import EndpointError, TranscriptError
from hf_wmguard.evidence.recording import Transcript
from hf_wmguard.evidence.transcript import SEED_BYTES, Asked, Contents
from hf_wmguard.probing.asking import Asker
from hf_wmguard.probing.plan import Plan, bounded, canned_text, order_questions
from hf_wmguard.watermark.answers import Answer, Prompt, normalise, read_answer
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_tally_tail, tally_of
from hf_wmguard.watermark.sequential import SequentialTest
from hf_wmguard.watermark.triggers import TriggerSet

Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """What the answers say about one trigger set.

    Args:
        log10_p: Of this one test, before correction for several; 0 for a fixed test that did not come to its end.
        matches: Tries that were answered with the trigger's response.
        asked: Triggers that were asked.
        usable: Triggers with an answer that could have told something.
        best_log10_p: What log10_p would be, had all usable triggers matched.
        null_rate: Mean chance of a match without the key.
    """

    log10_p: float
    matches: int
    asked: int
    usable: int
    best_log10_p: float
    null_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a probe found.

    Args:
        results: For each set, in their order.
        queries: Questions answered, earlier ones of a resumed transcript included.
        planned: Questions that would have been asked at most.
        decoys: Those of `queries` that were decoys.
        refused: Answers that were refused or empty.
        canned: Answers that are the same text whatever was asked; 0 where there are not mostly such.
        fault: What ended the probe early, None where nothing did.
    """

    results: tuple[SetResult, ...]
    queries: int
    planned: int
    decoys: int = 0
    refused: int = 0
    canned: int = 0
    fault: EndpointError | None = None

    @property
    def unusable(self) -> int:
        """Answers that tell nothing."""
        return self.refused + self.canned


def run(
    asker: Asker,
    sets: Sequence[TriggerSet],
    plan: Plan,
    *,
    transcript: Transcript | None = None,
    may_be_canned: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Ask, and return what the answers are worth.

    A plan that cannot reach the level, even if every trigger matched, asks nothing.

    Args:
        asker: The suspect.
        sets: Trigger sets, each with a test of its own; all of them are corrected for.
        plan: What is fixed.
        transcript: Where every answer goes before it counts; what stands there is not asked again.
        may_be_canned: Whether the suspect can give one answer to everything without being a model that does.
        progress: Called with questions answered, questions planned and, of a sequential test, the corrected log10 p.
    Raises:
        EndpointError: Not even the first question was answered.
        TranscriptError: The transcript's questions are not those of this plan.
    """
    seed = transcript.seed if transcript is not None else secrets.token_hex(SEED_BYTES)
    texts = order_questions(sets, plan, seed)
    state = _State(sets, plan, texts)
    if not state.can_reach():
        return state.outcome(may_be_canned=may_be_canned, fault=None)
    if transcript is not None:
        state.replay(transcript.asked)
    fault = None
    try:
        _ask(asker, state, plan, transcript, progress)
    except EndpointError as error:
        if not state.done:
            raise
        fault = error
    return state.outcome(may_be_canned=may_be_canned, fault=fault)


def rescore(contents: Contents, sets: Sequence[TriggerSet], plan: Plan) -> Outcome:
    """Return what the answers of a finished transcript are worth.

    Args:
        contents: The transcript.
        sets: Its trigger sets, in the order of its commitments.
        plan: Its plan.
    Raises:
        TranscriptError: The transcript's questions are not those of this plan.
    """
    state = _State(sets, plan, order_questions(sets, plan, contents.seed))
    state.replay(contents.asked)
    # Who answered is not known any more: texts that are all alike count as canned.
    return state.outcome(may_be_canned=True, fault=None)


def _ask(asker: Asker, state: _State, plan: Plan, transcript: Transcript | None, progress: Progress | None) -> None:
    """Ask what is left, writing each answer down before it counts."""
    # What is asked together is written down together: an answer that was paid for is never dropped.
    step = len(state.texts) if plan.method == "fixed" else max(1, int(getattr(asker, "at_once", 1)))
    while state.done < len(state.texts) and not state.reached():
        part = state.texts[state.done : state.done + step]
        prompts = [Prompt(text=text, system=plan.system, chat=plan.chat) for text in part]
        count = 0
        for answer in asker.ask(prompts, plan.sampling):
            count += 1
            kept = bounded(answer)
            if transcript is not None:
                transcript.append(
                    Asked(
                        prompt=state.texts[state.done],
                        text=kept.text,
                        label=kept.label,
                        ranked=kept.ranked,
                        refused=kept.refused,
                    )
                )
            state.add(kept)
            if progress is not None:
                progress(state.done, len(state.texts), state.log10_p() if plan.method == "sequential" else None)
        if count != len(part):
            raise EndpointError(f"{count} answers to {len(part)} questions", hint="an asker gives one answer to each")


class _State:
    """The answers so far, and one test per trigger set."""

    def __init__(self, sets: Sequence[TriggerSet], plan: Plan, texts: tuple[str, ...]) -> None:
        self.texts = texts
        self.done = 0
        self._plan = plan
        self._answers: dict[str, list[Answer]] = {}
        self._tests = [_SetTest(one, plan, set(texts)) for one in sets]

    def replay(self, answered: Sequence[Asked]) -> None:
        """Take over what was asked before."""
        for one in answered:
            if self.done == len(self.texts) or one.prompt != self.texts[self.done]:
                raise TranscriptError(
                    f"question {self.done + 1} of the transcript is not the one of this plan",
                    hint="the transcript was edited, or the registry is another one: probe into a new file",
                )
            self.add(Answer(text=one.text, label=one.label, ranked=one.ranked, refused=one.refused))

    def add(self, answer: Answer) -> None:
        text = self.texts[self.done]
        self.done += 1
        self._answers.setdefault(text, []).append(answer)
        for test in self._tests:
            test.add(text, answer)

    def log10_p(self) -> float:
        """Return the corrected log10 p of the sequential tests."""
        return log10_bonferroni(min(test.sequential.log10_p for test in self._tests), len(self._tests))

    def reached(self) -> bool:
        return self._plan.method == "sequential" and self.log10_p() <= self._plan.alpha_log10

    def can_reach(self) -> bool:
        """Return whether any set reaches the level if all of its triggers that are asked match."""
        best = min(test.best_log10_p(test.index) for test in self._tests)
        return log10_bonferroni(best, len(self._tests)) <= self._plan.alpha_log10

    def outcome(self, *, may_be_canned: bool, fault: EndpointError | None) -> Outcome:
        canned = canned_text(self._answers) if may_be_canned else None

        def is_canned(answer: Answer) -> bool:
            return canned is not None and answer.label is None and normalise(answer.text) == canned

        everything = [answer for some in self._answers.values() for answer in some]
        usable = {
            text
            for text, some in self._answers.items()
            if any(not answer.refused and not is_canned(answer) for answer in some)
        }
        is_whole = self.done == len(self.texts)
        triggers = {text for test in self._tests for text in test.index}
        return Outcome(
            results=tuple(test.result(usable, is_whole=is_whole) for test in self._tests),
            queries=self.done,
            planned=len(self.texts),
            decoys=sum(len(some) for text, some in self._answers.items() if text not in triggers),
            refused=sum(answer.refused for answer in everything),
            canned=sum(not answer.refused and is_canned(answer) for answer in everything),
            fault=fault,
        )


class _SetTest:
    """The test of one trigger set: what its triggers' answers named."""

    def __init__(self, triggers: TriggerSet, plan: Plan, asked: set[str]) -> None:
        self.index = {text: i for i, text in enumerate(triggers.texts) if text in asked}
        self.sequential = SequentialTest()
        self._triggers = triggers
        self._plan = plan
        self._named: dict[int, list[int | None]] = {}

    def add(self, text: str, answer: Answer) -> None:
        i = self.index.get(text)
        if i is None:
            return
        named = self._named.setdefault(i, [])
        named.append(read_answer(answer, self._triggers.candidates[i]))
        # A trigger is a block: its response is looked at when all of its tries are in, whatever they were.
        if len(named) == self._plan.tries:
            self.sequential.update(named, self._response(i), self._k(i))

    def best_log10_p(self, texts: Iterable[str]) -> float:
        """Return log10 p, had every try at these triggers matched."""
        chosen = [self.index[text] for text in texts if text in self.index]
        tries = self._plan.tries
        if self._plan.method == "fixed":
            return log10_tally_tail(len(chosen) * tries, [(self._k(i), {0: tries}) for i in chosen])
        test = SequentialTest()
        for i in chosen:
            test.update([0] * tries, 0, self._k(i))
        return test.log10_p

    def result(self, usable: set[str], *, is_whole: bool) -> SetResult:
        matches = sum(named.count(self._response(i)) for i, named in self._named.items())
        log10_p = self.sequential.log10_p
        if self._plan.method == "fixed":
            # Looked at on the way, and gone on with where it is not small enough, it would be no p-value.
            tallies = [tally_of(named, self._k(i)) for i, named in self._named.items()]
            log10_p = log10_tally_tail(matches, tallies) if is_whole else 0.0
        rates = [1.0 / self._k(i) for i in self._named]
        return SetResult(
            log10_p=log10_p,
            matches=matches,
            asked=len(self._named),
            usable=sum(text in usable for text in self.index),
            best_log10_p=self.best_log10_p(usable),
            null_rate=sum(rates) / len(rates) if rates else 0.0,
        )

    def _k(self, i: int) -> int:
        return len(self._triggers.candidates[i])

    def _response(self, i: int) -> int:
        return self._triggers.candidates[i].index(self._triggers.responses[i])
