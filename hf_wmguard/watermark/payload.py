"""The payload: 32 bytes, spread over as many code bits as a signature has projections.

A payload goes through a standard convolutional code, is repeated until every projection carries one code
bit, and is then interleaved and whitened with the key. Reading adds up the soft values of every repetition
and runs one soft-decision Viterbi pass, so a carrier that is missing or wiped costs its share and no more.
Why this code: docs/adr/0003-error-correction.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_wmguard.watermark.prf import Stream

PAYLOAD_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionalCode:
    """A zero-tailed feed-forward convolutional code of rate 1 / len(generators).

    Attributes:
        generators: One integer per output; the most significant of its ``constraint_length`` bits weighs
            the newest input bit (the octal notation of the standards).
        constraint_length: Input bits that one output bit depends on, in bits.
    Raises:
        ValueError: No generator, a constraint length outside 2 .. 12, or a generator that is longer than it.
    Source: Viterbi 1967, "Error bounds for convolutional codes", sec. II and IV.
    """

    generators: tuple[int, ...]
    constraint_length: int

    def __post_init__(self) -> None:
        if not 2 <= self.constraint_length <= 12:
            raise ValueError(f"constraint length is {self.constraint_length}, expected 2 to 12")
        if not self.generators or not all(0 < g < 1 << self.constraint_length for g in self.generators):
            raise ValueError(f"generators are {self.generators}, expected each of {self.constraint_length} bits")

    @property
    def memory(self) -> int:
        """Input bits that the encoder remembers; its tail is as many zeros."""
        return self.constraint_length - 1

    def codeword_bits(self, message_bits: int) -> int:
        """Return the length of the codeword of a message, tail included."""
        return (message_bits + self.memory) * len(self.generators)

    def encode(self, messages: Tensor) -> Tensor:
        """Return the codewords of a batch of messages.

        Args:
            messages: Bits, uint8 [b, k].
        Returns:
            uint8 [b, codeword_bits(k)].
        """
        tail = messages.new_zeros(messages.shape[0], self.memory)
        windows = torch.cat([tail, messages, tail], dim=1).unfold(1, self.constraint_length, 1)  # oldest bit first
        return self._parities(windows).to(torch.uint8).flatten(1)

    def decode(self, soft: Tensor) -> Tensor:
        """Return the most likely messages (Viterbi, all states at once, one step per message bit).

        Args:
            soft: Soft code bits, float64 [b, codeword_bits(k)]: positive speaks for 0, negative for 1, and 0
                says nothing. Only their proportions count.
        Returns:
            uint8 [b, k].
        """
        batch, states = soft.shape[0], 1 << self.memory
        steps = soft.reshape(batch, -1, len(self.generators))
        # A state holds the last input bits, newest in the most significant place. The register of the branch
        # into state s from its predecessor of parity p is then 2 s + p, and that predecessor is the register
        # modulo the number of states.
        registers = torch.arange(2 * states)[:, None] >> torch.arange(self.constraint_length) & 1
        signs = 1.0 - 2.0 * self._parities(registers)
        metric = torch.full((batch, states), -torch.inf, dtype=torch.float64)
        metric[:, 0] = 0.0
        choices = []
        for step in range(steps.shape[1]):
            branch = (steps[:, step] @ signs.T).view(batch, 2, states // 2, 2)
            even, odd = (metric.view(batch, 1, states // 2, 2) + branch).unbind(-1)
            # Not torch.max: its index on a tie is unspecified, and two readers must agree on the bytes.
            choices.append((odd > even).reshape(batch, states))
            metric = torch.maximum(even, odd).reshape(batch, states)
        return self._trace_back(choices)

    def _trace_back(self, choices: list[Tensor]) -> Tensor:
        """Follow the survivors, bool [b, states] per step, back from the all-zero state, to uint8 [b, k]."""
        states = 1 << self.memory
        state = torch.zeros(choices[0].shape[0], 1, dtype=torch.int64)
        bits = []
        for choice in reversed(choices):
            bits.append((state >> (self.memory - 1)).to(torch.uint8))
            state = (2 * state + choice.gather(1, state)) % states
        return torch.cat(bits[::-1], dim=1)[:, : -self.memory]

    def _parities(self, registers: Tensor) -> Tensor:
        """Return the outputs of registers [..., constraint_length], oldest bit first, float64 [..., r]."""
        taps = torch.tensor(self.generators)[:, None] >> torch.arange(self.constraint_length) & 1
        return (registers.double() @ taps.double().T).remainder(2)


# The rate-1/4 code of cdma2000 (3GPP2 C.S0002). Its free distance is 24, as the tests compute.
CODE = ConvolutionalCode(generators=(0o765, 0o671, 0o513, 0o473), constraint_length=9)
MIN_CODE_BITS = CODE.codeword_bits(8 * PAYLOAD_BYTES)


def encode(payload: bytes, n: int, stream: Stream) -> Tensor:
    """Return the code bits of a payload, one per projection.

    Without the key they look like fair coins, whatever the payload is.

    Args:
        payload: 32 bytes.
        n: Code bits wanted, at least `MIN_CODE_BITS`.
        stream: A keyed stream that is used for nothing else; `decode` needs a fresh one of the same key and
            label.
    Returns:
        uint8 [n] of 0 and 1.
    Raises:
        ValueError: The payload is not 32 bytes, or n is below `MIN_CODE_BITS`.
    """
    if len(payload) != PAYLOAD_BYTES:
        raise ValueError(f"payload has {len(payload)} bytes, expected {PAYLOAD_BYTES}")
    places, mask = _layout(n, stream)
    codeword = CODE.encode(_unpack(payload)[None])[0]
    return codeword[places] ^ mask


def decode(soft: Tensor, stream: Stream) -> bytes:
    """Return the most likely payload; it says nothing of whether there is one (that is the p-value's part).

    Args:
        soft: One value per projection, any float dtype [n]: +1 speaks for code bit 0, -1 for code bit 1, and
            exactly 0 marks a projection that could not be read. Only their proportions count.
        stream: A fresh stream of the key and label that `encode` had.
    Returns:
        32 bytes.
    Raises:
        ValueError: The values are not one row of finite floats, or fewer than `MIN_CODE_BITS`.
    """
    if soft.ndim != 1 or not soft.is_floating_point():
        raise ValueError(f"soft values are {soft.dtype} {list(soft.shape)}, expected floats [n]")
    if not bool(torch.isfinite(soft).all()):
        raise ValueError("soft values contain NaN or Inf, expected 0 where a projection could not be read")
    places, mask = _layout(soft.numel(), stream)
    signed = soft.detach().double().cpu() * (1.0 - 2.0 * mask.double())
    # Adding up is the best combination: the error of a phase is close to von Mises, whose log-likelihood
    # ratio is proportional to the cosine, so that no noise level has to be known.
    combined = torch.zeros(MIN_CODE_BITS, dtype=torch.float64).index_add_(0, places, signed)
    return _pack(CODE.decode(combined[None])[0])


def _layout(n: int, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return each projection's place in the codeword, int64 [n], and its mask bit, uint8 [n].

    Raises:
        ValueError: n is below `MIN_CODE_BITS`.
    """
    if n < MIN_CODE_BITS:
        raise ValueError(f"n is {n}, expected at least {MIN_CODE_BITS}: the codeword would not fit once")
    # Sorting 53-bit draws takes a tenth of the time of Fisher-Yates. A tie (probability n^2 / 2^54, 6e-7 at
    # n = 100,000) is put in the same order on every machine, because the sort is stable.
    places = stream.uniform(n).argsort(stable=True) % MIN_CODE_BITS
    return places, stream.bits(n)


def _unpack(data: bytes) -> Tensor:
    """Return the bits of bytes, most significant first, uint8 [8 * len]."""
    packed = torch.tensor(list(data), dtype=torch.uint8)
    return (packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1).flatten()


def _pack(bits: Tensor) -> bytes:
    """Return the bytes of bits, the inverse of `_unpack`."""
    weights = 1 << torch.arange(7, -1, -1)
    return bytes((bits.reshape(-1, 8) * weights).sum(dim=1).tolist())
