"""One class per kind of model that a trigger set can be put into."""

from __future__ import annotations

from torch import nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.tasks.base import TriggerTask
from hf_wmguard.probing.tasks.causal_lm import CausalLM
from hf_wmguard.probing.tasks.labels import Classification

# The endings of transformers' class names say what a model is for.
_BY_ENDING: dict[str, type[TriggerTask]] = {
    "ForSequenceClassification": Classification,
    "ForCausalLM": CausalLM,
    "LMHeadModel": CausalLM,
}


def task_of(model: nn.Module) -> TriggerTask:
    """Return what triggers need to know of a model.

    Raises:
        UnsupportedError: No kind of model that a trigger set can be put into.
    """
    name = type(model).__name__
    for ending, kind in _BY_ENDING.items():
        if name.endswith(ending):
            return kind()
    raise UnsupportedError(
        f"no trigger set for {name}: expected a model that classifies (texts, tokens, images) or writes text",
        hint="pass triggers=None to mark with the weight signature only",
    )
