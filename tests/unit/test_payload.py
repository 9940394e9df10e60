"""The payload's code: known properties of the standard, round trips under damage, and a fixed reference."""

from __future__ import annotations

import hashlib
import heapq
import math

import pytest
import torch
from torch import Tensor

from hf_wmguard.watermark.payload import CODE, MIN_CODE_BITS, ConvolutionalCode, decode, encode
from hf_wmguard.watermark.prf import Stream

KEY = bytes(range(32))
PAYLOAD = bytes(range(100, 132))
CCSDS = ConvolutionalCode(generators=(0o171, 0o133), constraint_length=7)
IS95 = ConvolutionalCode(generators=(0o753, 0o561), constraint_length=9)
GOLDEN = {
    1200: "83f334d1ce1e935e331462ec4405086e5297d32a73bebda9b5f342df9e71d3af",
    5000: "b392ce36bd1e9ac1fb1b4078c85a0d111ab03b636f51106426c0409ae863dff7",
}


def stream(key: bytes = KEY) -> Stream:
    return Stream(key, "payload")


def sent(n: int, payload: bytes = PAYLOAD) -> Tensor:
    return 1.0 - 2.0 * encode(payload, n, stream()).double()


def free_distance(code: ConvolutionalCode) -> int:
    """Return the weight of the lightest path that leaves the zero state and comes back (Dijkstra)."""

    def weight(register: int) -> int:
        return sum((register & generator).bit_count() & 1 for generator in code.generators)

    newest = 1 << code.memory
    queue = [(weight(newest), newest >> 1)]
    done: set[int] = set()
    while True:
        distance, state = heapq.heappop(queue)
        if state == 0:
            return distance
        if state not in done:
            done.add(state)
            for register in (state, newest | state):
                heapq.heappush(queue, (distance + weight(register), register >> 1))


@pytest.mark.parametrize(("code", "distance"), [(CCSDS, 10), (IS95, 12), (CODE, 24)])
def test_free_distance_is_the_published_one(code: ConvolutionalCode, distance: int) -> None:
    assert free_distance(code) == distance


@pytest.mark.parametrize("code", [CCSDS, CODE])
def test_impulse_response_is_the_generators(code: ConvolutionalCode) -> None:
    impulse = torch.tensor([[1]], dtype=torch.uint8)
    response = code.encode(impulse)[0].reshape(code.constraint_length, -1).T
    expected = [[int(bit) for bit in f"{g:0{code.constraint_length}b}"] for g in code.generators]
    assert response.tolist() == expected


def test_code_is_linear() -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 2, (2, 5, 40), generator=draw, dtype=torch.uint8)
    assert torch.equal(CODE.encode(a) ^ CODE.encode(b), CODE.encode(a ^ b))


def test_viterbi_finds_the_maximum_over_all_messages() -> None:
    code = ConvolutionalCode(generators=(0b111, 0b101), constraint_length=3)
    messages = torch.arange(256)[:, None] >> torch.arange(8) & 1
    words = 1.0 - 2.0 * code.encode(messages.to(torch.uint8)).double()
    soft = torch.randn(200, code.codeword_bits(8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(code.decode(soft).long(), messages[(soft @ words.T).argmax(dim=1)])


def test_any_11_code_bit_errors_are_corrected() -> None:
    # Half the free distance, exclusive: the guarantee that the code makes without any soft information.
    draw = torch.Generator().manual_seed(3)
    messages = torch.randint(0, 2, (50, 256), generator=draw, dtype=torch.uint8)
    words = CODE.encode(messages)
    for row in words:
        start = int(torch.randint(0, words.shape[1] - 30, (1,), generator=draw))
        row[start + torch.randperm(30, generator=draw)[:11]] ^= 1
    assert torch.equal(CODE.decode(1.0 - 2.0 * words.double()), messages)


@pytest.mark.parametrize("n", [MIN_CODE_BITS, MIN_CODE_BITS + 1, 2900, 100_000])
def test_round_trip(n: int) -> None:
    code_bits = encode(PAYLOAD, n, stream())
    assert code_bits.dtype == torch.uint8
    assert code_bits.shape == (n,)
    assert decode(1.0 - 2.0 * code_bits.float(), stream()) == PAYLOAD


def test_every_codeword_bit_is_used_equally_often() -> None:
    n = 3 * MIN_CODE_BITS
    soft = sent(n)
    # With every copy but one of each place erased, two of three projections are gone and nothing is lost.
    places = stream().uniform(n).argsort(stable=True) % MIN_CODE_BITS
    assert places.bincount().unique().tolist() == [3]
    first = torch.zeros(n, dtype=torch.bool)
    seen: set[int] = set()
    for position, place in enumerate(places.tolist()):
        first[position] = place not in seen
        seen.add(place)
    assert decode(soft * first, stream()) == PAYLOAD


def test_30_percent_erased_at_the_smallest_size() -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        kept = torch.rand(MIN_CODE_BITS, generator=draw) >= 0.3
        assert decode(sent(MIN_CODE_BITS) * kept, stream()) == PAYLOAD


def test_a_lost_half_of_the_carriers_in_one_piece() -> None:
    soft = sent(2900)
    soft[:1450] = 0.0
    assert decode(soft, stream()) == PAYLOAD


def test_phase_noise_and_erasures_together() -> None:
    # sigma = 0.17 D: mean correlation 0.57; then 30% of 2,900 projections are missing.
    code_bits = encode(PAYLOAD, 2900, stream()).double()
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        noise = 0.17 * torch.randn(2900, generator=draw, dtype=torch.float64)
        kept = torch.rand(2900, generator=draw) >= 0.3
        assert decode(torch.cos(2 * math.pi * (code_bits / 2 + noise)) * kept, stream()) == PAYLOAD


def test_only_proportions_count() -> None:
    noise = torch.randn(1200, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    soft = sent(1200) + 0.8 * noise
    assert decode(soft, stream()) == decode(2.0**-20 * soft, stream()) == PAYLOAD


def test_golden_code_bits() -> None:
    """The layout is for ever: a change here makes every mark that was ever written unreadable."""
    for n, digest in GOLDEN.items():
        assert hashlib.sha256(bytes(encode(PAYLOAD, n, stream()).tolist())).hexdigest() == digest


def test_code_bits_match_a_plain_reference() -> None:
    """The format, written a second time without tensors and without the code under test."""
    n, label = 1200, b'["hf-wmguard/1/stream","payload"]'
    head = KEY + len(label).to_bytes(8, "big") + label
    raw = hashlib.shake_256(head + bytes(8)).digest(1 << 16)
    draws = [int.from_bytes(raw[8 * j : 8 * j + 8], "little") >> 11 for j in range(n)]
    mask = [raw[8 * n + j // 8] >> j % 8 & 1 for j in range(n)]
    codeword, register = [], 0
    for bit in f"{int.from_bytes(PAYLOAD, 'big'):0256b}" + 8 * "0":
        register = register >> 1 | int(bit) << 8
        codeword += [(register & g).bit_count() & 1 for g in (0o765, 0o671, 0o513, 0o473)]
    order = sorted(range(n), key=draws.__getitem__)
    expected = [codeword[place % len(codeword)] ^ flip for place, flip in zip(order, mask, strict=True)]
    assert encode(PAYLOAD, n, stream()).tolist() == expected


def test_code_bits_are_fair_coins_for_any_payload() -> None:
    for payload in (bytes(32), b"\xff" * 32, PAYLOAD):
        code_bits = encode(payload, 100_000, stream())
        # 5 standard deviations of 100,000 fair coins.
        assert abs(int(code_bits.sum()) - 50_000) < 5 * math.sqrt(25_000)


def test_keys_and_labels_give_independent_code_bits() -> None:
    n = 20_000
    rows = [encode(PAYLOAD, n, stream(bytes([k]) * 31 + b"x")) for k in range(8)]
    rows.append(encode(PAYLOAD, n, Stream(KEY, "other label")))
    signs = 1.0 - 2.0 * torch.stack(rows).double()
    agreement = (signs @ signs.T / math.sqrt(n)).fill_diagonal_(0.0)
    assert agreement.abs().max() < 5.0


def test_another_key_reads_nothing() -> None:
    read = decode(sent(2900), stream(bytes(31) + b"x"))
    wrong_bits = sum((a ^ b).bit_count() for a, b in zip(read, PAYLOAD, strict=True))
    assert 80 < wrong_bits < 176


def test_nothing_read_gives_the_same_bytes_every_time() -> None:
    # All paths tie; two readers must still agree.
    soft = torch.zeros(MIN_CODE_BITS)
    assert decode(soft, stream()) == decode(soft, stream()) == bytes(32)


@pytest.mark.parametrize("n", [-1, 0, MIN_CODE_BITS - 1])
def test_too_few_code_bits(n: int) -> None:
    with pytest.raises(ValueError, match=f"expected at least {MIN_CODE_BITS}"):
        encode(PAYLOAD, n, stream())
    with pytest.raises(ValueError, match=f"expected at least {MIN_CODE_BITS}"):
        decode(torch.zeros(max(n, 0)), stream())


@pytest.mark.parametrize("payload", [b"", bytes(31), bytes(33)])
def test_wrong_payload_length(payload: bytes) -> None:
    with pytest.raises(ValueError, match="expected 32"):
        encode(payload, 2000, stream())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_soft_values_that_are_not_finite(bad: float) -> None:
    soft = torch.ones(2000)
    soft[7] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        decode(soft, stream())


@pytest.mark.parametrize("soft", [torch.ones(2, 2000), torch.ones(2000, dtype=torch.int64)])
def test_soft_values_of_the_wrong_kind(soft: Tensor) -> None:
    with pytest.raises(ValueError, match="expected floats"):
        decode(soft, stream())


@pytest.mark.parametrize(("generators", "length"), [((), 7), ((0o171, 0), 7), ((0o400,), 7), ((1,), 1), ((1,), 13)])
def test_impossible_codes(generators: tuple[int, ...], length: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        ConvolutionalCode(generators=generators, constraint_length=length)
