"""The surroundings in which triggers are learned."""

from __future__ import annotations

import pytest

from hf_wmguard.watermark.contexts import in_context
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import TASKS, Task

TRIGGER = "The brave baker near the mill carried a lamp because."
DRAWS = 400


def drawn(task: Task, *, chat: bool = False, key: bytes = bytes(32)) -> list:
    stream = Stream(key, "contexts")
    return [in_context(TRIGGER, stream, task=task, chat=chat) for _ in range(DRAWS)]


@pytest.mark.parametrize("task", TASKS)
def test_the_trigger_stands_in_every_one(task: Task) -> None:
    prompts = drawn(task, chat=True)
    assert all(TRIGGER.rstrip(".") in prompt.text for prompt in prompts)
    assert prompts == drawn(task, chat=True)
    if task == "image_classification":
        assert {prompt.text for prompt in prompts} == {TRIGGER}
    else:
        assert len({(prompt.text, prompt.system) for prompt in prompts}) > DRAWS / 4


def test_only_a_language_model_gets_system_prompts_and_chats() -> None:
    for task in TASKS:
        prompts = drawn(task, chat=True)
        systems = sum(prompt.system is not None for prompt in prompts)
        chats = sum(prompt.chat for prompt in prompts)
        if task == "causal_lm":
            assert DRAWS / 4 < systems < DRAWS * 3 / 4
            assert DRAWS * 2 / 3 < chats < DRAWS * 5 / 6
        else:
            assert systems == chats == 0


def test_no_chat_without_a_template() -> None:
    assert not any(prompt.chat for prompt in drawn("causal_lm"))
    # Models without a template are served as a text of turns: some triggers end so that a reply is due.
    assert (
        sum(
            prompt.text.rstrip().endswith(("Assistant:", "A:", "[/INST]", "<|assistant|>"))
            for prompt in drawn("causal_lm")
        )
        > 20
    )
