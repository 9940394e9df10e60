"""Make ``examples/tiny_llama``: the config and the tokenizer of a model small enough to train in seconds on a CPU.

There are no weights in it: scripts make them with ``from_scratch: true``. The tokenizer is byte-level BPE, trained on
the glosses in ``examples/wordnet_gloss``. Running this again gives the same files.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 2048
LENGTH = 128


def main() -> None:
    rows = pyarrow.parquet.read_table(HERE / "wordnet_gloss" / "train.parquet").column("gloss").to_pylist()
    inner = ByteLevelBPETokenizer(add_prefix_space=True)
    inner.train_from_iterator(rows, vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    pad, begin, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, pad_token=pad, bos_token=begin, eos_token=end, model_max_length=LENGTH
    )
    tokenizer.save_pretrained(HERE / "tiny_llama")
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(HERE / "tiny_llama")


if __name__ == "__main__":
    main()
