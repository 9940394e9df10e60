"""Ask a suspect as the product asks it, and write down what the answers are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from settings import ALPHA_LOG10, BUDGET, Serving
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from hf_wmguard.probing import session
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker
from hf_wmguard.probing.plan import Plan
from hf_wmguard.watermark.answers import Answer, Prompt
from hf_wmguard.watermark.triggers import TriggerSet


class SuppressFirst(LogitsProcessor):
    """An output filter: the likeliest token cannot be said, in the first tokens of every answer.

    Args:
        tokens: In how many.
    """

    def __init__(self, tokens: int) -> None:
        self._left = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores without the largest of each row."""
        if self._left <= 0:
            return scores
        self._left -= 1
        return scores.scatter(1, scores.argmax(dim=1, keepdim=True), -torch.inf)


class Replay:
    """An asker whose answers were computed before, in batches.

    Args:
        answers: For each question the answers to its tries, in their order.
    """

    def __init__(self, answers: Mapping[str, Sequence[Answer]]) -> None:
        self._left = {text: iter(some) for text, some in answers.items()}

    def ask(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """See `Asker`; every try of a question has an answer of its own."""
        for prompt in prompts:
            yield next(self._left[prompt.text])


def answers_of(model: Any, tokenizer: Any, texts: Sequence[str], serving: Serving) -> dict[str, list[Answer]]:
    """Return for each text the answers to all its tries, as an API gives them: texts, or labels, and nothing more."""
    prompts = [
        Prompt(text=f"{serving.before}{text}{serving.after}", system=serving.system, chat=serving.chat)
        for text in texts
        for _ in range(serving.tries)
    ]
    with _served(model, tokenizer, serving):
        given = [replace(one, ranked=()) for one in LocalAsker(model, tokenizer).ask(prompts, serving.sampling)]
    return {text: given[i * serving.tries : (i + 1) * serving.tries] for i, text in enumerate(texts)}


@contextmanager
def _served(model: Any, tokenizer: Any, serving: Serving) -> Iterator[None]:
    with ExitStack() as stack:
        if serving.template is not None:
            stack.callback(setattr, tokenizer, "chat_template", tokenizer.chat_template)
            tokenizer.chat_template = serving.template
        if serving.suppressed:
            generate = model.generate

            def filtered(**inputs: Any) -> Any:
                return generate(**inputs, logits_processor=LogitsProcessorList([SuppressFirst(serving.suppressed)]))

            # On the instance: what is there before is the class's own.
            stack.callback(delattr, model, "generate")
            model.generate = filtered
        yield


def probe_model(model: Any, tokenizer: Any, triggers: TriggerSet, serving: Serving) -> dict[str, Any]:
    """Return what a fixed and a sequential probe find, over the same answers.

    Returns:
        ``share`` of the tries that match; ``log10_p`` of asking every key; ``sequential``: queries until the decision,
        decoys among them or not, its ``log10_p``, and the ``curve`` of both over the queries.
    """
    torch.manual_seed(0)
    answers = answers_of(model, tokenizer, [*triggers.texts, *triggers.decoys], serving)
    common = {"tries": serving.tries, "alpha_log10": ALPHA_LOG10}
    everything = session.run(Replay(answers), [triggers], Plan(method="fixed", decoys=False, **common))
    fixed = everything.results[0]
    curve: list[float] = []
    stopped = session.run(
        Replay(answers),
        [triggers],
        Plan(method="sequential", budget=BUDGET, **common),
        progress=lambda done, planned, log10_p: curve.append(round(log10_p or 0.0, 2)),
    )
    sequential = stopped.results[0]
    return {
        "share": fixed.matches / (fixed.asked * serving.tries),
        "matches": fixed.matches,
        "asked": fixed.asked,
        "log10_p": fixed.log10_p,
        "refused": everything.refused,
        "sequential": {
            "queries": stopped.queries,
            "decoys": stopped.decoys,
            "log10_p": sequential.log10_p,
            "curve": curve,
        },
    }
