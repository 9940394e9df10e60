"""The keyed stream: the same bytes for ever, however they are drawn, and uniform."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.pvalues import log10_binomial_tail

KEY = bytes(range(32))
BLOCK = 1 << 16
SHORT = 512


def reference(key: bytes, label: list[str | int], count: int) -> bytes:
    """The definition, spelt out: SHAKE-256 in counter mode over key, label and counter, 64 KiB each."""
    text = json.dumps(["hf-wmguard/1/stream", *label], separators=(",", ":")).encode()
    prefix = key + len(text).to_bytes(8, "big") + text
    blocks = range(-(-count // BLOCK))
    return b"".join(hashlib.shake_256(prefix + i.to_bytes(8, "big")).digest(BLOCK) for i in blocks)[:count]


def test_golden_bytes() -> None:
    assert (
        Stream(KEY, "golden", 7).bytes(32).hex() == "cfe1e0d021bfc1f981fefb0a8131ee55f4f5e4485a31f8293a4505e4e78f6c92"
    )
    whole = Stream(KEY, "golden", 7).bytes(3 * BLOCK)
    assert hashlib.sha256(whole).hexdigest() == "3d045a28911f1da97283c1baf05b0dfec8538563b1751a203161979b83a82c02"


def test_golden_values() -> None:
    """Every kind of draw, because a watermark made today is read with them in years."""
    assert Stream(KEY, "bits").bits(16).tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0]
    assert Stream(KEY, "signs").signs(2, 4).tolist() == [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]]
    assert Stream(KEY, "uniform").uniform(3).tolist() == [0.3064516533307162, 0.1809562177194034, 0.9639307958206499]
    assert [Stream(KEY, "below", bound).below(bound) for bound in (1, 2, 1000, 1 << 32)] == [0, 0, 130, 2357266737]
    assert Stream(KEY, "permutation").permutation(8) == [0, 2, 7, 1, 4, 3, 5, 6]


@pytest.mark.parametrize("count", [0, 1, SHORT - 1, SHORT, SHORT + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_bytes_are_those_of_the_definition(count: int) -> None:
    assert Stream(KEY, "a", 1).bytes(count) == reference(KEY, ["a", 1], count)


@pytest.mark.parametrize(
    "portions",
    [
        [SHORT, 1],
        [SHORT - 1, 1, 1],
        [SHORT - 1, 2],
        [1, SHORT, 1],
        [0, SHORT, 0, BLOCK - SHORT, 0, 1],
        [SHORT, BLOCK - SHORT, BLOCK, 5],
        [BLOCK - 1, 2, BLOCK],
        [3, 3 * BLOCK],
        [100] * 700,
    ],
)
def test_portions_do_not_matter(portions: list[int]) -> None:
    stream = Stream(KEY, "portions")
    assert b"".join(stream.bytes(count) for count in portions) == reference(KEY, ["portions"], sum(portions))


def test_keys_and_labels_give_independent_streams() -> None:
    streams = [
        Stream(KEY, "a"),
        Stream(KEY, "b"),
        Stream(KEY, "a", "b"),
        Stream(KEY, "ab"),
        Stream(KEY, 'a","b'),
        Stream(KEY, "1"),
        Stream(KEY, 1),
        Stream(KEY),
        Stream(bytes(32), "a"),
    ]
    assert len({stream.bytes(16) for stream in streams}) == len(streams)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_is_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="expected 32"):
        Stream(bytes(size), "a")


def test_nothing_secret_is_shown() -> None:
    stream = Stream(KEY, "a")
    assert repr(stream) == "Stream(<secret>)"
    assert not hasattr(stream, "__dict__")


def test_bits_and_signs_are_fair() -> None:
    count = 200_000
    ones = int(Stream(KEY, "fair").bits(count).sum())
    assert log10_binomial_tail(max(ones, count - ones), count, 0.5) > -6
    signs = Stream(KEY, "fair").signs(400, 500)
    assert signs.dtype == torch.float32
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs.flatten(), 1 - 2 * Stream(KEY, "fair").bits(count).float())
    # Bits of one byte and of its neighbours do not depend on each other either.
    for lag in (1, 2, 7, 8, 9):
        product = signs.flatten()[lag:] * signs.flatten()[:-lag]
        assert abs(float(product.mean())) < 5 / math.sqrt(count)


def test_uniform_is_uniform() -> None:
    values = Stream(KEY, "uniform").uniform(100_000)
    assert values.dtype == torch.float64
    assert 0 <= float(values.min()) < 1e-3
    assert 1 - 1e-3 < float(values.max()) < 1
    # Kolmogorov-Smirnov: exceeded with probability 2 exp(-2 x^2), 3e-7 at x = 2.8.
    ranks = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    assert float((values.sort().values - ranks).abs().max()) * math.sqrt(len(values)) < 2.8
    assert Stream(KEY, "uniform").uniform(0).tolist() == []


def test_uniform_takes_53_bits_of_eight_bytes_each() -> None:
    raw = Stream(KEY, "u").bytes(80)
    expected = [(int.from_bytes(raw[8 * i : 8 * i + 8], "little") >> 11) * 2.0**-53 for i in range(10)]
    assert Stream(KEY, "u").uniform(10).tolist() == expected


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1 << 32])
def test_below_stays_below(bound: int) -> None:
    stream = Stream(KEY, "below", bound)
    values = [stream.below(bound) for _ in range(300)]
    assert min(values) >= 0
    assert max(values) < bound


def test_below_is_unbiased() -> None:
    bound, draws = 6, 30_000
    stream = Stream(KEY, "dice")
    counts = [0] * bound
    for _ in range(draws):
        counts[stream.below(bound)] += 1
    for count in counts:
        rate = 1 / bound
        tail = log10_binomial_tail(count, draws, rate) if count > draws * rate else None
        assert tail is None or tail > -6
    assert sum((count - draws / bound) ** 2 / (draws / bound) for count in counts) < 40  # chi-square, p = 1.5e-7


def test_below_rejects_what_would_bias_it() -> None:
    """The largest 64-bit values, beyond the last whole multiple of the bound, are drawn again."""
    drawn = iter([(1 << 64) - 1, (1 << 64) - 2, 5])

    class Fixed(Stream):
        def bytes(self, count: int) -> bytes:
            return next(drawn).to_bytes(count, "big")

    assert (1 << 64) % 7 == 2
    assert Fixed(KEY, "fixed").below(7) == 5
    assert next(drawn, None) is None


@pytest.mark.parametrize("bound", [0, -1, (1 << 32) + 1])
def test_bounds_outside_the_range(bound: int) -> None:
    with pytest.raises(ValueError, match="bound"):
        Stream(KEY, "a").below(bound)


def test_choice_and_permutation() -> None:
    stream = Stream(KEY, "choice")
    assert {stream.choice("abc") for _ in range(100)} == set("abc")
    with pytest.raises(ValueError, match="bound"):
        stream.choice([])
    seen = set()
    for index in range(600):
        order = Stream(KEY, "order", index).permutation(4)
        assert sorted(order) == [0, 1, 2, 3]
        seen.add(tuple(order))
    assert len(seen) == 24
    assert stream.permutation(0) == []
