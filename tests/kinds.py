"""A tiny model of every kind that a trigger set can be put into, with what makes its inputs."""

from __future__ import annotations

from typing import Any

import torch
from tiny import LABELS
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

PIXELS = 32
_BODY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": LABELS,
}


def image_processor() -> ViTImageProcessorPil:
    """Return an image processor that needs no torchvision."""
    return ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})


def token_classifier(vocabulary: int) -> PreTrainedModel:
    """Return a tiny token classifier; the same weights every time."""
    torch.manual_seed(1)
    return BertForTokenClassification(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **_BODY))


def decoder_classifier(vocabulary: int) -> PreTrainedModel:
    """Return a tiny decoder that classifies by its last token."""
    torch.manual_seed(1)
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=0, **_BODY)
    )


def image_classifier() -> PreTrainedModel:
    """Return a tiny image classifier."""
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(image_size=PIXELS, patch_size=8, **_BODY))


def t5(vocabulary: int) -> PreTrainedModel:
    """Return a tiny T5."""
    torch.manual_seed(1)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            dropout_rate=0.0,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
        )
    )


def bart(vocabulary: int) -> PreTrainedModel:
    """Return a tiny BART."""
    torch.manual_seed(1)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
            forced_bos_token_id=2,
        )
    )


def with_ends(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer with ``<s>`` before and ``</s>`` after every text, as BART's puts them."""
    from tokenizers.processors import TemplateProcessing

    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return copy
