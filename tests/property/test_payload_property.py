"""Any payload under any key comes back, whole, scaled, in part and under noise."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_wmguard.watermark.payload import MIN_CODE_BITS, PAYLOAD_BYTES, decode, encode
from hf_wmguard.watermark.prf import Stream

payloads = st.binary(min_size=PAYLOAD_BYTES, max_size=PAYLOAD_BYTES)
keys = st.binary(min_size=32, max_size=32)
sizes = st.integers(MIN_CODE_BITS, 4 * MIN_CODE_BITS)


@settings(max_examples=40, deadline=None)
@given(payload=payloads, key=keys, n=sizes, dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_round_trip(payload: bytes, key: bytes, n: int, dtype: torch.dtype) -> None:
    code_bits = encode(payload, n, Stream(key, "payload"))
    assert int(code_bits.max()) <= 1
    assert decode(1 - 2 * code_bits.to(dtype), Stream(key, "payload")) == payload


@settings(max_examples=40, deadline=None)
@given(payload=payloads, key=keys, n=sizes, seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_round_trip_with_30_percent_erased_and_noise(
    payload: bytes, key: bytes, n: int, seed: int, scale: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    soft = 1.0 - 2.0 * encode(payload, n, Stream(key, "payload")).double()
    soft += 0.35 * torch.randn(n, generator=draw, dtype=torch.float64)
    soft[torch.rand(n, generator=draw) < 0.3] = 0.0
    assert decode(scale * soft, Stream(key, "payload")) == payload


@settings(max_examples=20, deadline=None)
@given(a=payloads, b=payloads, key=keys, n=sizes)
def test_two_payloads_differ_by_at_least_the_free_distance(a: bytes, b: bytes, key: bytes, n: int) -> None:
    differing = int((encode(a, n, Stream(key, "payload")) ^ encode(b, n, Stream(key, "payload"))).sum())
    assert differing == 0 if a == b else differing >= 24
