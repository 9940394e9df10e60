"""Tiny models of the families whose matrices are named, fused or stored in their own ways."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 400
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
FAMILIES = ("gemma2", "gpt2", "gpt_neox", "opt", "phi", "phi3", "qwen3")


def make_family(name: str) -> PreTrainedModel:
    """Return a fresh model whose biases and gains all differ; the same weights every time."""
    torch.manual_seed(1)
    models = {
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, **_GROUPED)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)
        ),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                **{key: value for key, value in _SIZES.items() if key != "intermediate_size"},
                ffn_dim=128,
                word_embed_proj_dim=64,
            )
        ),
        "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, **_GROUPED)),
    }
    return make_lively(models[name]())


def make_lively(model: PreTrainedModel) -> PreTrainedModel:
    """Give every bias and gain of a fresh model a value of its own, or a forgotten one would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(4)
    return model.eval()
