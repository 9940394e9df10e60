"""The second verb: is this suspect ours, and with what probability is that verdict wrong?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from hf_wmguard.container.recipients import Identity, X25519Identity, load_identity
from hf_wmguard.errors import ConfigError, RegistryError
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.asking import Sampling
from hf_wmguard.probing.local import LocalAsker
from hf_wmguard.protect import Committed
from hf_wmguard.suspects.reader import digest, open_suspect
from hf_wmguard.suspects.signature import Attempt, read_attempts
from hf_wmguard.watermark.answers import Prompt, read_answer
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_poisson_binomial_tail
from hf_wmguard.watermark.signature import Reading, Score

DEFAULT_ALPHA_LOG10 = -9.0
Verdict = Literal["detected", "not_detected", "inconclusive"]
Source = str | Path | Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureResult:
    """What the weights say.

    Args:
        log10_p: Upper bound of the p-value of this one test, before correction for several.
        correlation: -1 to 1; 1 right after embedding, about 0 without the mark.
        projections: Projections read.
        bit_error_rate: Share of wrong code bits before error correction, 0 to 1.
        payload: Hex of what the code bits decode to.
        payload_decoded: Whether that is the committed payload.
        carriers_read: Carriers found in the suspect.
        carriers_missing: Carriers not found, of another shape or not finite.
        bytes_read: Bytes of weights read.
        alignment: What was undone before reading: ``none``, ``norms`` (scaled rows and columns), or how the suspect was
            aligned with the original.
    """

    log10_p: float
    correlation: float
    projections: int
    bit_error_rate: float
    payload: str
    payload_decoded: bool
    carriers_read: int
    carriers_missing: int
    bytes_read: int
    alignment: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerResult:
    """What the behaviour says.

    Args:
        log10_p: Exact p-value of this one test, before correction for several.
        matches: Triggers answered with the committed response.
        asked: Triggers asked.
        null_rate: Mean chance of a match without the key.
        queries: Queries made.
    """

    log10_p: float
    matches: int
    asked: int
    null_rate: float
    queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A verdict and what it rests on.

    Args:
        verdict: ``detected`` where ``log10_p <= alpha_log10``, ``inconclusive`` where too little could be read.
        log10_p: Upper bound of the p-value, corrected for every commitment that was tried.
        alpha_log10: The level of the verdict.
        tests_corrected_for: Number of tests in the correction: every commitment, alignment and weighting of the steps.
        model_id: Model of the best matching commitment.
        iteration: Its iteration.
        slot: Its slot.
        signature: What the weights say, None where they were not asked.
        triggers: What the behaviour says, None where it was not asked.
        commitment: Time and hash of the registry entry made before training; whether it bears a timestamp.
        suspect: Where it was read, and the SHA-256 over its weight files (None in memory).
        reason: Why the verdict is ``inconclusive``, in words; None otherwise.
    """

    verdict: Verdict
    log10_p: float
    alpha_log10: float
    tests_corrected_for: int
    model_id: str
    iteration: str
    slot: int
    signature: SignatureResult | None
    triggers: TriggerResult | None
    commitment: dict[str, Any]
    suspect: dict[str, str | None] = field(default_factory=dict)
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as ``--json`` prints it."""
        return asdict(self)


def verify(
    suspect: Source,
    *,
    owner_key: str,
    registry: str | Path,
    model_id: str | None = None,
    identity: str | None = None,
    original: Source | None = None,
    alpha_log10: float = DEFAULT_ALPHA_LOG10,
) -> Report:
    """Judge a suspect by its weights.

    Args:
        suspect: A folder, a ``.safetensors``, ``.bin`` or ``.pt`` file, a protected folder, a state dict or a model.
        owner_key: Reference to the owner key.
        registry: The owner's registry.
        model_id: Only this model's commitments; all of them by default, which the p-value is corrected for.
        identity: Reference to a private key for a protected folder; the owner key opens the owner's own.
        original: The owner's own model, marked or not: the suspect is aligned to it, which undoes permuted, scaled,
            rotated and split parts. Every alignment tried is corrected for.
        alpha_log10: Level of the verdict, log10.
    Raises:
        RegistryError: The registry holds no commitment to judge by.
        AuthenticationError: The owner key is not the registry's.
        NotFoundError, FormatError: The suspect cannot be read.
    """
    _check_alpha(alpha_log10)
    owner = OwnerKey.load(owner_key)
    candidates = [one for one in _committed(owner, registry, model_id) if one.record.carriers]
    if not candidates:
        raise RegistryError(
            f"{registry} commits to no weight signature",
            hint="these models were marked with triggers only: use wmguard probe",
        )
    identities: tuple[Identity, ...] = (X25519Identity.from_owner(owner),)
    if identity is not None:
        identities = (load_identity(identity), *identities)
    with ExitStack() as stack:
        # Hashing a large suspect takes longer than all the rest, and needs nothing of it.
        described = stack.enter_context(ThreadPoolExecutor(1)).submit(_describe, suspect)
        opened = stack.enter_context(open_suspect(suspect, identities=identities))
        own = None if original is None else stack.enter_context(open_suspect(original, identities=identities))
        tried = [
            (one, attempt)
            for one in candidates
            for attempt in read_attempts(one.record, one.record.carrier_keys(owner), opened, original=own)
        ]
    scored = [(one, attempt, attempt.reading.score()) for one, attempt in tried]
    best, attempt, score = min(scored, key=lambda item: (item[2].log10_p, not _enough(item[1].reading)))
    return _report(
        best,
        sum(attempt.tests * score.tests for _, attempt, score in scored),
        alpha_log10,
        lacking=None if any(_enough(attempt.reading) for _, attempt in tried) else _lacking(attempt.reading),
        signature=_signature_result(best, owner, attempt, score),
        suspect=described.result(),
    )


def probe(
    model: nn.Module,
    tokenizer: Any,
    *,
    owner_key: str,
    registry: str | Path,
    model_id: str | None = None,
    alpha_log10: float = DEFAULT_ALPHA_LOG10,
    uri: str | None = None,
) -> Report:
    """Judge a suspect by its answers to the trigger sets, with a model in this process.

    Args:
        model: A sequence classifier or a causal language model.
        tokenizer: Its tokenizer.
        owner_key: Reference to the owner key.
        registry: The owner's registry.
        model_id: Only this model's commitments; all of them by default, which the p-value is corrected for.
        alpha_log10: Level of the verdict, log10.
        uri: Where the model came from, for the report.
    Raises:
        RegistryError: The registry holds no commitment with a trigger set.
        AuthenticationError: The owner key is not the registry's.
    """
    _check_alpha(alpha_log10)
    owner = OwnerKey.load(owner_key)
    asker = LocalAsker(model, tokenizer)
    task = asker.task.name
    results = []
    for one in _committed(owner, registry, model_id):
        triggers = one.record.triggers
        if triggers is None or triggers.task != task:
            continue
        answers = asker.ask([Prompt(text=text) for text in triggers.texts], Sampling())
        named = [read_answer(a, ids) for a, ids in zip(answers, triggers.candidates, strict=True)]
        pairs = zip(named, triggers.candidates, triggers.responses, strict=True)
        matches = sum(one is not None and ids[one] == response for one, ids, response in pairs)
        log10_p = log10_poisson_binomial_tail(matches, triggers.rates)
        rate = sum(triggers.rates) / triggers.count
        count = triggers.count
        results.append(
            (one, TriggerResult(log10_p=log10_p, matches=matches, asked=count, null_rate=rate, queries=count))
        )
    if not results:
        raise RegistryError(
            f"{registry} commits to no trigger set for {task}", hint="use wmguard verify, which reads the weights"
        )
    best, result = min(results, key=lambda item: item[1].log10_p)
    best_case = log10_poisson_binomial_tail(result.asked, [result.null_rate] * result.asked)
    lacking = None
    if log10_bonferroni(best_case, len(results)) > alpha_log10:
        lacking = f"{result.asked} triggers cannot reach log10 p <= {alpha_log10:g}, even if all of them match"
    suspect = {"uri": uri or type(model).__name__, "sha256": None}
    return _report(best, len(results), alpha_log10, lacking=lacking, triggers=result, suspect=suspect)


def _check_alpha(alpha_log10: float) -> None:
    if not -math.inf < alpha_log10 < 0:
        raise ConfigError(f"alpha_log10 is {alpha_log10}, expected a number below 0", hint="-9 is usual")


def _committed(owner: OwnerKey, registry: str | Path, model_id: str | None) -> list[Committed]:
    entries = Registry(Path(registry), owner).commitments(model_id)
    if not entries:
        what = f"of {model_id}" if model_id else "at all"
        raise RegistryError(
            f"{registry} holds no commitment {what}",
            hint="a claim without a commitment before training is worth nothing",
        )
    committed = [Committed.from_entry(entry) for entry in entries]
    for one in committed:
        one.record.check(owner)
    return committed


def _signature_result(one: Committed, owner: OwnerKey, attempt: Attempt, score: Score) -> SignatureResult:
    reading = attempt.reading
    # What a projection is worth for the verdict it is worth for the payload.
    payload = one.record.decode_payload(owner, reading.soft * score.weights)
    return SignatureResult(
        log10_p=score.log10_p,
        correlation=reading.correlation,
        projections=reading.projections,
        bit_error_rate=reading.bit_error_rate,
        payload=payload,
        payload_decoded=payload == one.record.payload,
        carriers_read=reading.carriers_read,
        carriers_missing=reading.carriers_missing,
        bytes_read=attempt.bytes_read,
        alignment=attempt.alignment,
    )


def _enough(reading: Reading) -> bool:
    """Whether so much was read that a missing mark means something: half of the projections."""
    return 2 * reading.projections >= reading.soft.numel()


def _lacking(reading: Reading) -> str:
    """Say what could not be read."""
    carriers = reading.carriers_read + reading.carriers_missing
    return (
        f"{reading.carriers_read} of {carriers} carriers could be read, with {reading.projections} of "
        f"{reading.soft.numel()} projections; the others are missing, of another shape or dtype, or not finite"
    )


def _report(
    best: Committed,
    tests: int,
    alpha_log10: float,
    *,
    lacking: str | None,
    suspect: dict[str, str | None],
    signature: SignatureResult | None = None,
    triggers: TriggerResult | None = None,
) -> Report:
    channel = signature or triggers
    if channel is None:
        raise ConfigError("a report needs at least one channel")
    log10_p = log10_bonferroni(channel.log10_p, tests)
    found: Verdict = "detected" if log10_p <= alpha_log10 else "inconclusive" if lacking else "not_detected"
    return Report(
        verdict=found,
        log10_p=log10_p,
        alpha_log10=alpha_log10,
        tests_corrected_for=tests,
        model_id=best.record.model_id,
        iteration=best.record.iteration,
        slot=best.record.slot,
        signature=signature,
        triggers=triggers,
        commitment={"time": best.entry.time, "entry": best.entry.hash, "timestamped": False},
        suspect=suspect,
        reason=lacking if found == "inconclusive" else None,
    )


def _describe(suspect: Source) -> dict[str, str | None]:
    if isinstance(suspect, str | Path):
        return {"uri": str(suspect), "sha256": digest(Path(suspect))}
    return {"uri": type(suspect).__name__, "sha256": None}
