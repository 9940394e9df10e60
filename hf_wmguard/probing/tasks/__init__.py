"""One class per kind of model that a trigger set can be put into."""

from __future__ import annotations

from torch import nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.probing.tasks.base import TriggerTask
from hf_wmguard.probing.tasks.causal_lm import CausalLM
from hf_wmguard.probing.tasks.labels import Classification, ImageClassification, TokenClassification
from hf_wmguard.probing.tasks.seq2seq import Seq2Seq

# The endings of transformers' class names say what a model is for.
_BY_ENDING: dict[str, type[TriggerTask]] = {
    "ForCausalLM": CausalLM,
    "LMHeadModel": CausalLM,
    "ForSequenceClassification": Classification,
    "ForTokenClassification": TokenClassification,
    "ForImageClassification": ImageClassification,
    "ForConditionalGeneration": Seq2Seq,
    "ForSeq2SeqLM": Seq2Seq,
    "MTModel": Seq2Seq,
}


def task_of(model: nn.Module) -> TriggerTask:
    """Return what triggers need to know of a model.

    Raises:
        UnsupportedError: No kind of model that a trigger set can be put into.
    """
    name = type(model).__name__
    for ending, kind in _BY_ENDING.items():
        if name.endswith(ending) and (kind is not Seq2Seq or _reads_text_into_a_decoder(model)):
            return kind()
    raise UnsupportedError(
        f"no trigger set for {name}: expected a model that classifies (texts, tokens, images) or writes text",
        hint="pass triggers=None to mark with the weight signature only",
    )


def _reads_text_into_a_decoder(model: nn.Module) -> bool:
    # Speech and image models, and chat models that see, end in ForConditionalGeneration too.
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    return encodes and getattr(model, "main_input_name", "input_ids") == "input_ids"
