"""Run the attacks against one marked model.

Every attacked model is judged like any suspect, through `hf_wmguard.verify`: nothing here knows where the mark is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_wmguard.container.owner import load_owner
from hf_wmguard.errors import ConfigError, WmguardError
from hf_wmguard.keys import OwnerKey
from hf_wmguard.reports import Report
from hf_wmguard.robustness.attacks import StateDict, relative_change
from hf_wmguard.robustness.catalogue import ATTACKS, BASELINE, Attack
from hf_wmguard.robustness.results import Outcome, Result, ResultStream, Skipped
from hf_wmguard.robustness.target import Target, load_target
from hf_wmguard.robustness.utility import Utility, measure, with_weights
from hf_wmguard.suspects.reader import digest
from hf_wmguard.verification import verify

Judge = Callable[[Attack, StateDict | Path], Report]
Progress = Callable[[int, int, str], None]


def run_suite(
    folder: Path,
    out: Path,
    *,
    owner_key: str,
    registry: Path,
    model_id: str | None = None,
    base: Path | None = None,
    other: Path | None = None,
    text: Path | None = None,
    data: Path | None = None,
    names: Sequence[str] = (),
    quick: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Attack a marked model and return what is left of its mark, attack by attack.

    Results reach ``out/results.jsonl`` as they come. Where that file holds results of the same model, key, text and
    other models, they are taken over and not made again.

    Args:
        folder: The marked model, plain, or protected and opened by the owner key.
        out: Folder of the results, made where it does not exist.
        owner_key: Reference to the owner key.
        registry: The owner's registry.
        model_id: Only this model's commitments.
        base: Folder of what the model was fine-tuned from, plain.
        other: Folder of another fine-tune of the base, plain.
        text: Plain text, for a causal language model: utility is perplexity.
        data: Rows of ``text`` and ``label``, for a classifier: utility is accuracy.
        names: Attacks to run; all by default.
        quick: Only the weakest and the strongest of each attack, on fewer rows.
        progress: Called before each attack with attacks done, attacks in all, and its label.
    Raises:
        ConfigError: An unknown attack, or text that does not suit the model.
        UsageError: The folder of results belongs to another run.
        RegistryError: Nothing to judge by.
        NotFoundError, FormatError, UnsupportedError: A model or text cannot be read.
    """
    chosen = _choose(names)
    owner = load_owner(owner_key)
    digests = _subject(owner, {"sha256": folder, "base": base, "other": other}, {"text": text, "data": data})
    subject = {**digests, "model_id": model_id, "quick": quick}

    def judge(attack: Attack, suspect: StateDict | Path) -> Report:
        original = folder if attack.aligned else None
        return verify(suspect, owner_key=owner_key, registry=registry, model_id=model_id, original=original)

    # Before anything is loaded or written: no commitment, a wrong key.
    judge(BASELINE, folder)
    target = load_target(folder, owner, base=base, other=other, text=text, data=data, quick=quick)
    stream = ResultStream(out, subject)
    points, skipped = _points(chosen, target, quick)
    for done, (attack, strength) in enumerate(points):
        if progress is not None:
            progress(done, len(points), _label(attack, strength))
        if (attack.name, strength) in stream.results:
            continue
        try:
            stream.add(_run(attack, strength, target, judge, _before(stream)))
        except WmguardError as error:
            skipped.append(Skipped(attack=attack.name, family=attack.family, reason=str(error)))
    order = {attack.name: index for index, attack in enumerate((BASELINE, *ATTACKS))}
    results = sorted(stream.results.values(), key=lambda result: order[result.attack])
    return Outcome(subject=subject, results=tuple(results), skipped=tuple(skipped))


def _choose(names: Sequence[str]) -> tuple[Attack, ...]:
    known = {attack.name: attack for attack in ATTACKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"unknown attack {', '.join(unknown)}", hint=f"known: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else ATTACKS


def _subject(owner: OwnerKey, models: dict[str, Path | None], files: dict[str, Path | None]) -> dict[str, str | None]:
    """Return what results depend on, by digest: results of other weights or text must not stand beside them."""
    subject = {name: None if path is None else digest(path) for name, path in models.items()}
    for name, path in files.items():
        # One that is missing is named by whoever reads it.
        subject[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None
    return {"owner": owner.key_id(), **subject}


def _points(
    chosen: tuple[Attack, ...], target: Target, quick: bool
) -> tuple[list[tuple[Attack, float]], list[Skipped]]:
    points, skipped = [(BASELINE, BASELINE.strengths[0])], []
    for attack in chosen:
        missing = attack.missing(target)
        if missing is not None:
            skipped.append(Skipped(attack=attack.name, family=attack.family, reason=missing))
            continue
        ends = dict.fromkeys((attack.strengths[0], attack.strengths[-1]))
        points += [(attack, strength) for strength in (ends if quick else attack.strengths)]
    return points, skipped


def _before(stream: ResultStream) -> float | None:
    baseline = stream.results.get((BASELINE.name, BASELINE.strengths[0]))
    return None if baseline is None or baseline.utility is None else baseline.utility.value


def _label(attack: Attack, strength: float) -> str:
    return attack.label.format(f"{strength:g}")


def _run(attack: Attack, strength: float, target: Target, judge: Judge, before: float | None) -> Result:
    start = time.perf_counter()
    attacked = attack.run(target, strength)
    seconds = time.perf_counter() - start
    report = judge(attack, attacked)
    utility = _utility(attack, attacked, target, before)
    signature = report.signature
    if signature is None:
        raise ConfigError("the verdict rests on no weights")
    return Result(
        attack=attack.name,
        family=attack.family,
        label=_label(attack, strength),
        axis=attack.axis,
        strength=strength,
        verdict=report.verdict,
        log10_p=report.log10_p,
        bit_error_rate=signature.bit_error_rate,
        payload_decoded=signature.payload_decoded,
        utility=utility,
        utility_before=before if before is not None else utility.value if utility else None,
        weight_change=relative_change(attacked, target.tensors) if attack.loads else None,
        seconds=seconds,
    )


def _utility(attack: Attack, attacked: StateDict, target: Target, before: float | None) -> Utility | None:
    if target.corpus is None or not attack.loads:
        return None
    return measure(with_weights(target.model, attacked), target.corpus, before)
