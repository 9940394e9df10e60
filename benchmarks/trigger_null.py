"""How often the trigger sets of wrong keys reach a p-value on innocent models, against what the p-value claims.

    python benchmarks/trigger_null.py SUSPECT... [--base MODEL] [--keys 1000] [--temperature 1 --tries 2]

For each key, 32 random bytes from a seed, the trigger set is made as training makes it (`make_triggers`, texts of the
grammar), with the candidates that the base finds plausible. Each suspect is asked all of them, the questions of many
keys together, and judged for each key by the exact tail and by the sequential test. No suspect knows any of the keys.
One thread takes about 3 s for each key and suspect.

Prints how many keys reach each p-value, with the exact upper limit of the rate at 99% confidence; writes
``trigger_null.json`` and ``trigger_null.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy.stats import beta
from transformers import AutoConfig, AutoTokenizer

from hf_wmguard.config import TriggerConfig
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker
from hf_wmguard.training.trigger_set import make_triggers
from hf_wmguard.watermark.answers import Prompt, read_answer
from hf_wmguard.watermark.pvalues import log10_tally_tail, tally_of
from hf_wmguard.watermark.sequential import SequentialTest
from hf_wmguard.watermark.triggers import TriggerSet

LEVELS = (-1.0, -2.0, -3.0, -4.0, -5.0, -6.0)
METHODS = ("fixed", "sequential")
# Questions are asked in the order of their lengths, so that batches need little padding: that many keys' at once.
KEYS_AT_ONCE = 20

Named = list[list[int | None]]


def load(folder: Path) -> tuple[Any, Any]:
    """Return a model of its own class in float32, which a processor is faster in than in float16, and its tokenizer."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def ask(asker: LocalAsker, sets: Sequence[TriggerSet], sampling: Sampling, tries: int) -> list[Named]:
    """Return for each set and trigger which candidate each try named."""
    places = [(number, index) for number, one in enumerate(sets) for index in range(one.count)]
    places.sort(key=lambda place: len(sets[place[0]].texts[place[1]]))
    prompts = [Prompt(text=sets[number].texts[index]) for number, index in places]
    named: list[Named] = [[[] for _ in range(one.count)] for one in sets]
    for _ in range(tries):
        for (number, index), answer in zip(places, asker.ask(prompts, sampling), strict=True):
            named[number][index].append(read_answer(answer, sets[number].candidates[index]))
    return named


def judge(triggers: TriggerSet, named: Named) -> dict[str, float]:
    """Return log10 p of both methods for one key."""
    wanted = [ids.index(response) for ids, response in zip(triggers.candidates, triggers.responses, strict=True)]
    widths = [len(ids) for ids in triggers.candidates]
    matches = sum(tries.count(response) for tries, response in zip(named, wanted, strict=True))
    test = SequentialTest()
    for tries, response, k in zip(named, wanted, widths, strict=True):
        test.update(tries, response, k)
    tail = log10_tally_tail(matches, [tally_of(tries, k) for tries, k in zip(named, widths, strict=True)])
    return {"fixed": tail, "sequential": test.log10_p}


def upper(count: int, trials: int) -> float:
    """Return the exact upper limit of a rate, one-sided, at 99% confidence (Clopper & Pearson 1934)."""
    return float(beta.ppf(0.99, count + 1, trials - count)) if count < trials else 1.0


def summary(name: str, values: list[dict[str, float]], named: list[Named], sampling: Sampling) -> dict[str, Any]:
    """Return the results of one suspect."""
    answers = [answer for key in named for tries in key for answer in tries]
    return {
        "suspect": name,
        "keys": len(values),
        "tries": len(named[0][0]),
        "temperature": sampling.temperature,
        "named_a_candidate": sum(answer is not None for answer in answers) / len(answers),
        "methods": {method: reached([value[method] for value in values]) for method in METHODS},
    }


def reached(values: list[float]) -> dict[str, Any]:
    """Return how many log10 p are at or below each level."""
    counts = [sum(value <= level for value in values) for level in LEVELS]
    return {
        "log10_p": sorted(round(value, 4) for value in values),
        "reached": counts,
        "upper_99": [upper(count, len(values)) for count in counts],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the counts as a table."""
    head = "| suspect | temperature, tries | named a candidate | test | keys | smallest p |"
    lines = [head + "".join(f" p <= 1e{level:.0f} |" for level in LEVELS), "|---|---|---|---|---|---|" + "---|" * 6]
    for one in results:
        for method in METHODS:
            found = one["methods"][method]
            cells = "".join(
                f" {n} ({limit:.1e}) |" for n, limit in zip(found["reached"], found["upper_99"], strict=True)
            )
            lines.append(
                f"| {one['suspect']} | {one['temperature']:g}, {one['tries']} | {one['named_a_candidate']:.0%} "
                f"| {method} | {one['keys']} | {10 ** found['log10_p'][0]:.1e} |{cells}"
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Write the share of keys that reach a p-value against that p-value; the claim is the diagonal."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5))
    for one in results:
        for method, style in zip(METHODS, ("-", ":"), strict=True):
            values = one["methods"][method]["log10_p"]
            shares = [rank / len(values) for rank in range(1, len(values) + 1)]
            label = f"{one['suspect']}, {method}, temperature {one['temperature']:g}, {one['tries']} tries"
            axes.step([10**value for value in values], shares, style, where="post", label=label)
    low = 10 ** math.floor(-math.log10(max(one["keys"] for one in results)) - 1)
    axes.plot([low, 1], [low, 1], "k--", label="what is claimed")
    axes.set(xscale="log", yscale="log", xlabel="claimed p", ylabel="share of wrong keys that reach it")
    axes.set(xlim=(low, 1), ylim=(low, 1))
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Make the sets, ask, print the table, and write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspects", nargs="+", type=Path, help="folders with a model, causal or a classifier")
    parser.add_argument("--base", type=Path, help="the model that the sets are made for; the first suspect by default")
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--triggers", type=int, default=64, help="triggers of each key")
    parser.add_argument("--response", choices=("perinucleus", "keyed"), default="perinucleus")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load(options.base or options.suspects[0])
    config = TriggerConfig(count=options.triggers, response=options.response)
    sampling = Sampling(temperature=options.temperature)
    askers = {path: LocalAsker(*load(path)) for path in options.suspects}
    named: dict[Path, list[Named]] = {path: [] for path in askers}
    values: dict[Path, list[dict[str, float]]] = {path: [] for path in askers}
    # Keys that can be drawn again, and no secrets.
    draw, begun = random.Random(options.seed), time.monotonic()  # noqa: S311
    for start in range(0, options.keys, KEYS_AT_ONCE):
        size = min(KEYS_AT_ONCE, options.keys - start)
        sets = [make_triggers(draw.randbytes(32), config, base, tokenizer) for _ in range(size)]
        for path, asker in askers.items():
            answers = ask(asker, sets, sampling, options.tries)
            named[path] += answers
            values[path] += [judge(*pair) for pair in zip(sets, answers, strict=True)]
        # After every block: a run that is cut short has measured fewer keys, and not nothing.
        results = [summary(path.absolute().name, values[path], named[path], sampling) for path in askers]
        (options.out / "trigger_null.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{start + size} keys, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    plot(results, options.out / "trigger_null.png")
    print(table(results))
    print("In brackets: exact upper limit of the rate, 99% confidence.")


if __name__ == "__main__":
    main()
