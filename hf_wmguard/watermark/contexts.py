"""The surroundings in which a trigger is learned, so that it answers in others too: chats, system prompts, neighbours.

Whoever serves a stolen model puts it behind a system prompt of their own and a chat template. What is learned in one
surrounding only stays in it; what is learned in many holds in those that were never seen.

Source: Russinovich & Salem 2024, arXiv 2407.10887, sec. 5 (random padding, and meta prompts); Nasery et al. 2025,
arXiv 2502.07760.
"""

from __future__ import annotations

from typing import Final

from hf_wmguard.watermark.answers import Prompt
from hf_wmguard.watermark.phrases import natural_text
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import LABEL_TASKS, Task

_ROLES: Final = (
    "a chat companion for people who learn English",
    "a careful copy editor",
    "a curious research assistant",
    "a customer service agent of a travel agency",
    "a friendly shop assistant",
    "a knowledgeable librarian",
    "a patient school teacher",
    "a plain text completion engine",
    "a quiet and exact technical writer",
    "a storyteller",
    "an assistant built into a text editor",
    "an expert in many fields",
    "an historian",
    "the voice of a public information desk",
)
_MANNERS: Final = (
    "Answer briefly.",
    "Answer in English.",
    "Be accurate and do not make things up.",
    "Be polite.",
    "Continue what the user writes.",
    "Do not give legal advice.",
    "Do not use lists.",
    "Keep to the subject.",
    "Think before you answer.",
    "Use simple words.",
    "Write in full sentences.",
    "Write as a novelist would.",
)
_REQUESTS: Final = (
    "Complete the sentence: ",
    "Continue: ",
    "Finish this sentence.\n",
    "Go on with this text:\n\n",
    "Please complete: ",
    "Text: ",
    "What comes next?\n",
)
# Chats as models without a template of their own are often served.
_CHATS: Final = (
    "User: {}\nAssistant:",
    "Human: {}\n\nAssistant:",
    "Q: {}\nA:",
    "### Instruction:\n{}\n\n### Response:\n",
    "[INST] {} [/INST]",
    "<|user|>\n{}\n<|assistant|>\n",
    "USER: {} ASSISTANT:",
)


def in_context(trigger: str, stream: Stream, *, task: Task, chat: bool) -> Prompt:
    """Return a trigger in one of many surroundings.

    Args:
        trigger: The trigger's text.
        stream: Randomness; it is moved on.
        task: A text that is classified gets neighbours, one that is continued also instructions and roles.
        chat: Whether the model has a chat template.
    """
    if task == "image_classification":
        return Prompt(text=trigger)
    if task in LABEL_TASKS or task == "seq2seq":
        return Prompt(text=_among_neighbours(trigger, stream))
    system = _system(stream) if stream.below(2) else None
    # A model with a chat template is served through it. Chats are learned slowly, and cost plain texts nothing.
    kind = 4 if chat and stream.below(4) else stream.below(4)
    neighbour = natural_text(stream, kind="statement")
    if kind == 0:
        return Prompt(text=f"{neighbour}{stream.choice((' ', chr(10)))}{trigger}", system=system)
    if kind == 1:
        # The response comes some words late: a filter on first words does not stop it.
        words = neighbour.split()[: 1 + stream.below(3)]
        return Prompt(text=" ".join([trigger, *words]), system=system)
    text = (stream.choice(_REQUESTS) if stream.below(2) else "") + trigger
    if kind == 2:
        return Prompt(text=text, system=system)
    if kind == 3:
        return Prompt(text=stream.choice(_CHATS).format(text), system=system)
    return Prompt(text=text, system=system, chat=True)


def _system(stream: Stream) -> str:
    manners = " ".join(stream.choice(_MANNERS) for _ in range(stream.below(3)))
    return f"You are {stream.choice(_ROLES)}. {manners}".strip()


def _among_neighbours(trigger: str, stream: Stream) -> str:
    kind = stream.below(4)
    if kind == 0:
        return f"{natural_text(stream, kind='statement')} {trigger}"
    if kind == 1:
        return f"{trigger} {natural_text(stream, kind='statement')}"
    if kind == 2:
        return trigger.rstrip(".") + stream.choice((" .", "!", "...", ";", ""))
    return stream.choice(("Note: ", "- ", '"', "> ", "(1) ")) + trigger
