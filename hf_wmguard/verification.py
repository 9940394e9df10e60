"""The second verb: is this suspect ours, and with what probability is that verdict wrong?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_wmguard.container.owner import load_owner
from hf_wmguard.container.recipients import Identity, X25519Identity, load_identity
from hf_wmguard.errors import ConfigError, RegistryError
from hf_wmguard.evidence.recording import Transcript
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.asking import Asker, Sampling
from hf_wmguard.probing.calling import CallableAsker
from hf_wmguard.probing.local import LocalAsker
from hf_wmguard.probing.openai import OpenAIAsker
from hf_wmguard.probing.plan import Plan
from hf_wmguard.probing.session import Outcome, Progress, SetResult, run
from hf_wmguard.protect import Committed
from hf_wmguard.reports import Method, Report, SignatureResult, TriggerResult, Verdict
from hf_wmguard.suspects.reader import digest, open_suspect
from hf_wmguard.suspects.signature import Attempt, read_attempts
from hf_wmguard.watermark.pvalues import log10_bonferroni
from hf_wmguard.watermark.signature import Reading, Score
from hf_wmguard.watermark.triggers import TEXT_TASKS, TriggerSet

DEFAULT_ALPHA_LOG10 = -9.0
DEFAULT_BUDGET = 256
Source = str | Path | Mapping[str, Tensor] | nn.Module


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
    owner = load_owner(owner_key)
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
    suspect: nn.Module | Asker | Callable[[str], str | None],
    tokenizer: Any = None,
    *,
    owner_key: str,
    registry: str | Path,
    model_id: str | None = None,
    alpha_log10: float = DEFAULT_ALPHA_LOG10,
    method: Method | None = None,
    tries: int = 1,
    budget: int | None = None,
    decoys: bool | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    chat: bool | None = None,
    transcript: str | Path | None = None,
    progress: Progress | None = None,
    uri: str | None = None,
) -> Report:
    """Judge a suspect by its answers to the trigger sets.

    Args:
        suspect: A model in this process, an `Asker` (`OpenAIAsker` for an API), or a function from a text to a text.
        tokenizer: The tokenizer or image processor of a model in this process.
        owner_key: Reference to the owner key.
        registry: The owner's registry.
        model_id: Only this model's commitments; all of them by default, which the p-value is corrected for.
        alpha_log10: Level of the verdict, log10.
        method: ``fixed`` or ``sequential`` (see `Plan`); by default fixed for a model in this process.
        tries: How often each trigger is asked.
        budget: The most questions that are asked; by default `DEFAULT_BUDGET`, of a model in this process all.
        decoys: Ask decoys among the triggers; by default of everything but a model in this process.
        sampling: How the suspect chooses its words; greedy by default.
        system: A system prompt before every question.
        chat: Ask as the user in a chat; by default of an `OpenAIAsker` only.
        transcript: File that every answer is written to, and the signed report at the end. One that is there and not
            finished is gone on with.
        progress: See `hf_wmguard.probing.session.run`.
        uri: Where the suspect is, for the report.
    Raises:
        RegistryError: The registry holds no commitment with a trigger set for this kind of suspect.
        AuthenticationError: The owner key is not the registry's, or not the transcript's.
        ConfigError: An argument is out of range, or the transcript was begun with others.
        TranscriptError: The transcript was changed.
        EndpointError: The suspect answered nothing at all. Where it stops answering later, that is in the report.
    """
    _check_alpha(alpha_log10)
    owner = load_owner(owner_key)
    asker, is_local = _asker_of(suspect, tokenizer)
    plan = Plan(
        method=method or ("fixed" if is_local else "sequential"),
        tries=tries,
        budget=DEFAULT_BUDGET if budget is None and not is_local else budget,
        decoys=not is_local if decoys is None else decoys,
        sampling=sampling or Sampling(),
        system=system,
        chat=isinstance(asker, OpenAIAsker) if chat is None else chat,
        alpha_log10=alpha_log10,
    )
    tried = _with_triggers(_committed(owner, registry, model_id), asker, registry)
    about = _about(suspect, asker, uri)
    with ExitStack() as stack:
        written = None
        if transcript is not None:
            fixed = {"owner": owner.key_id(), "commitments": [one.entry.hash for one, _ in tried], "suspect": about}
            written = stack.enter_context(Transcript(Path(transcript), {**fixed, **plan.to_json()}, owner))
        sets = [triggers for _, triggers in tried]
        outcome = run(asker, sets, plan, transcript=written, may_be_canned=not is_local, progress=progress)
        best = min(range(len(tried)), key=lambda i: outcome.results[i].log10_p)
        report = _report(
            tried[best][0],
            len(tried),
            alpha_log10,
            lacking=_unanswered(outcome, plan, len(tried), transcript),
            triggers=_trigger_result(outcome, outcome.results[best], plan),
            suspect=about,
        )
        if written is not None and outcome.queries and outcome.fault is None:
            written.finish(report.to_json())
    return report


def _asker_of(suspect: Any, tokenizer: Any) -> tuple[Asker, bool]:
    """Return whom to ask, and whether it is a model in this process."""
    if isinstance(suspect, nn.Module):
        return LocalAsker(suspect, tokenizer), True
    if hasattr(suspect, "ask"):
        return suspect, isinstance(suspect, LocalAsker)
    if callable(suspect):
        return CallableAsker(suspect), False
    raise ConfigError(
        f"cannot ask a {type(suspect).__name__}", hint="pass a model, a function from text to text, or an OpenAIAsker"
    )


def _with_triggers(
    committed: Sequence[Committed], asker: Asker, registry: str | Path
) -> list[tuple[Committed, TriggerSet]]:
    """Return the commitments whose trigger sets a suspect of this kind can answer."""
    # Through an API it does not show which of the two writes the text.
    tasks = (asker.task.name,) if isinstance(asker, LocalAsker) else TEXT_TASKS
    sets = [(one, one.record.triggers) for one in committed]
    fitting = [(one, triggers) for one, triggers in sets if triggers is not None and triggers.task in tasks]
    if not fitting:
        raise RegistryError(
            f"{registry} commits to no trigger set for {' or '.join(tasks)}",
            hint="use wmguard verify, which reads the weights",
        )
    return fitting


def _about(suspect: Any, asker: Asker, uri: str | None) -> dict[str, str | None]:
    if isinstance(asker, OpenAIAsker):
        return {"uri": uri or asker.endpoint, "sha256": None, "model": asker.model}
    if isinstance(asker, CallableAsker):
        return {"uri": uri or asker.name, "sha256": None}
    return {"uri": uri or type(suspect).__name__, "sha256": None}


def _trigger_result(outcome: Outcome, result: SetResult, plan: Plan) -> TriggerResult:
    return TriggerResult(
        log10_p=result.log10_p,
        matches=result.matches,
        asked=result.asked,
        null_rate=result.null_rate,
        queries=outcome.queries,
        method=plan.method,
        tries=plan.tries,
        unusable=outcome.unusable,
        decoys=outcome.decoys,
    )


def _unanswered(outcome: Outcome, plan: Plan, tests: int, transcript: str | Path | None) -> str | None:
    """Say why too little was answered for a missing mark to mean something, or return None where it was enough."""
    level = f"log10 p <= {plan.alpha_log10:g}"
    if not outcome.queries:
        return (
            f"{outcome.planned} questions cannot reach {level}, even if all triggers match; nothing was asked: "
            "raise the budget, ask without decoys, or choose a higher level"
        )
    if outcome.fault is not None:
        again = "nothing was kept: use a transcript next time"
        if transcript is not None:
            again = f"run the same command again to go on with {transcript}"
        return f"stopped after {outcome.queries} of {outcome.planned} questions: {outcome.fault.message}; {again}"
    # Enough is half of the triggers asked, and as many as could have reached the level.
    for one in outcome.results:
        if 2 * one.usable >= one.asked and log10_bonferroni(one.best_log10_p, tests) <= plan.alpha_log10:
            return None
    return (
        f"of {outcome.queries} answers {outcome.refused} were refused or empty and {outcome.canned} the same text "
        f"whatever was asked; what is left cannot show that the mark is missing at {level}"
    )


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
