"""Payload error rate against phase noise for three ways to fill n code bits (ADR 0003).

    python benchmarks/payload_gain.py [--trials 400]

Channel: s = cos(2 pi (c / 2 + z)), z Gaussian with standard deviation sigma, in units of the step D. One
table for each n, then the sigma at which half of all payloads fail (linear between grid points).
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from hf_wmguard.watermark.payload import CODE, PAYLOAD_BYTES, ConvolutionalCode
from hf_wmguard.watermark.pvalues import log10_p_correlation

MESSAGE_BITS = 8 * PAYLOAD_BYTES
CODES: dict[str, ConvolutionalCode | None] = {
    "repetition": None,
    "K=7 1/2": ConvolutionalCode(generators=(0o171, 0o133), constraint_length=7),
    "K=9 1/4": CODE,
}
PROJECTIONS = (1_200, 2_900)
SIGMAS = [0.14 + 0.01 * step for step in range(13)]


def failures(code: ConvolutionalCode | None, n: int, sigma: float, trials: int) -> int:
    """Return how many of ``trials`` random payloads are not read back bit by bit."""
    draw = torch.Generator().manual_seed(round(1e6 * sigma) + n)
    messages = torch.randint(0, 2, (trials, MESSAGE_BITS), generator=draw, dtype=torch.uint8)
    codewords = messages if code is None else code.encode(messages)
    length = codewords.shape[1]
    noise = sigma * torch.randn(trials, n, generator=draw, dtype=torch.float64)
    repeated = codewords[:, torch.arange(n) % length].double()
    soft = torch.cos(2 * math.pi * (repeated / 2 + noise))
    combined = torch.zeros(trials, length, dtype=torch.float64).index_add_(1, torch.arange(n) % length, soft)
    decoded = (combined < 0).to(torch.uint8) if code is None else code.decode(combined)
    return int((decoded != messages).any(dim=1).sum())


def crossing(rates: Tensor) -> float:
    """Return the sigma at which a rising error rate passes one half."""
    above = int((rates >= 0.5).nonzero()[0])
    low, high = float(rates[above - 1]), float(rates[above])
    return SIGMAS[above - 1] + 0.01 * (0.5 - low) / (high - low)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="payloads for each cell of a table")
    trials = parser.parse_args().trials
    for n in PROJECTIONS:
        rates = {
            name: torch.tensor([failures(code, n, sigma, trials) / trials for sigma in SIGMAS])
            for name, code in CODES.items()
        }
        print(f"payload error rate, n = {n}, {trials} payloads for each cell")
        print("| sigma | rho | log10 p expected |" + "".join(f" {name} |" for name in CODES))
        print("|---|---|---|" + "---|" * len(CODES))
        for row, sigma in enumerate(SIGMAS):
            rho = math.exp(-2 * math.pi**2 * sigma**2)
            cells = "".join(f" {float(rate[row]):.3f} |" for rate in rates.values())
            print(f"| {sigma:.2f} | {rho:.3f} | {log10_p_correlation(n * rho, n):.0f} |" + cells)
        print("sigma at 50%: " + ", ".join(f"{name} {crossing(rate):.3f}" for name, rate in rates.items()))
        print()


if __name__ == "__main__":
    main()
