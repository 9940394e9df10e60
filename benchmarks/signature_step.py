"""Time of the decoupled signature step against an ordinary training step of a 110M-parameter causal language model.

One process, steps interleaved: every round takes one ordinary step (forward, backward, AdamW) of 8 x 512 tokens and,
right after it, signature steps inside the ramp. The ratio is the median of the rounds' ratios.

    python benchmarks/signature_step.py [--rounds 5] [--dtype float32] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_wmguard.config import SignatureConfig, WatermarkConfig
from hf_wmguard.keys import OwnerKey
from hf_wmguard.protect import new_record, new_salt
from hf_wmguard.training.schedule import Phase
from hf_wmguard.training.sharded import backend_of
from hf_wmguard.training.signature_step import SignatureStep

BATCH, TOKENS, REPEATS = 8, 512, 5


def make_model(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a fresh model in the shape of Llama, 12 blocks of width 768."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        intermediate_size=2048, max_position_embeddings=TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).train()


def make_signature(model: LlamaForCausalLM, device: str) -> SignatureStep:
    """Return the signature step of a new marking, always inside its ramp."""
    owner = OwnerKey.generate()
    signature = SignatureConfig(budget=0.012, ramp=1.0)
    config = WatermarkConfig(model_id="bench", owner_key="file:none", registry="none", signature=signature)
    backend = backend_of(model)
    record = new_record(owner, config, salt=new_salt(), shapes=backend.shapes(), read=backend.read)
    keys = tuple(key.to(torch.device(device)) for key in record.carrier_keys(owner))
    before = [baseline.projections_of(key) for key, baseline in zip(keys, record.baselines, strict=True)]
    return SignatureStep(keys, before, backend, signature, Phase(start=0, end=1000), b"r" * 32)


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that a call takes, with everything it started on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    model = make_model(device, dtype)
    signature = make_signature(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(32000, (BATCH, TOKENS), device=device)

    def ordinary() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ordinary()
    signature.after_optimizer(1)
    steps, marks = [], []
    for number in range(arguments.rounds):
        steps.append(timed(ordinary, device))
        marks += [timed(lambda n=number: signature.after_optimizer(n + 2), device) for _ in range(REPEATS)]  # type: ignore[misc]
    rounds = [statistics.median(marks[i * REPEATS : (i + 1) * REPEATS]) / step for i, step in enumerate(steps)]
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": arguments.dtype,
        "parameters": sum(one.numel() for one in model.parameters()),
        "carriers": len(signature.keys),
        "carrying_weights": sum(key.carrier.rows * key.carrier.shape[1] for key in signature.keys),
        "training_step_s": round(statistics.median(steps), 4),
        "signature_step_s": round(statistics.median(marks), 4),
        "ratio": round(statistics.median(rounds), 5),
        "ratios": [round(one, 5) for one in rounds],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
