"""The second verb: is this suspect ours, and with what probability is that verdict wrong?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_wmguard.container.owner import load_owner
from hf_wmguard.container.recipients import Identity, X25519Identity, load_identity
from hf_wmguard.errors import ConfigError, RegistryError, TranscriptError
from hf_wmguard.evidence.recording import Transcript
from hf_wmguard.evidence.transcript import check_transcript
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.asking import Asker, Sampling
from hf_wmguard.probing.calling import CallableAsker
from hf_wmguard.probing.local import LocalAsker
from hf_wmguard.probing.openai import OpenAIAsker
from hf_wmguard.probing.plan import Plan
from hf_wmguard.probing.session import Outcome, Progress, SetResult, rescore, run
from hf_wmguard.protect import Committed
from hf_wmguard.reports import Method, Report, SignatureResult, TriggerResult
from hf_wmguard.stores.location import is_location, parse_location
from hf_wmguard.suspects.reader import digest, open_suspect
from hf_wmguard.suspects.remote import RemoteFolder, open_remote
from hf_wmguard.suspects.signature import Attempt, read_attempts
from hf_wmguard.suspects.signature import Progress as CarrierProgress
from hf_wmguard.verdicts import check_alpha, find_commitments, make_report, too_little_answered, trigger_result
from hf_wmguard.watermark.pvalues import log10_bonferroni, log10_fuse
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
    transcript: str | Path | None = None,
    alpha_log10: float = DEFAULT_ALPHA_LOG10,
    progress: CarrierProgress | None = None,
) -> Report:
    """Judge a suspect by its weights, and by what it answered where a transcript of a probe is given.

    Args:
        suspect: A folder, a ``.safetensors``, ``.bin`` or ``.pt`` file, a protected folder, a state dict or a model;
            or where it is kept, ``hub://org/name@revision`` or ``s3://bucket/prefix``: of that only headers and the
            tiles that carry are read, and nothing is downloaded.
        owner_key: Reference to the owner key.
        registry: The owner's registry.
        model_id: Only this model's commitments; all of them by default, which the p-value is corrected for.
        identity: Reference to a private key for a protected folder; the owner key opens the owner's own.
        original: The owner's own model, marked or not: the suspect is aligned to it, which undoes permuted, scaled,
            rotated and split parts. Every alignment tried is corrected for.
        transcript: Finished transcript of a probe of the same suspect: the verdict rests on weights and answers
            together, whatever either says (`log10_fuse`). Decide for it before either is read.
        alpha_log10: Level of the verdict, log10.
        progress: Called with carriers looked at, carriers in all, and the name of a matrix.
    Raises:
        RegistryError: The registry holds no commitment to judge by.
        AuthenticationError: The owner key is not the registry's.
        NotFoundError, FormatError: The suspect cannot be read.
        StoreError: Where it is kept refuses, or does not answer.
        TranscriptError: The transcript is unfinished, was changed, or is signed by another.
    """
    check_alpha(alpha_log10)
    owner = load_owner(owner_key)
    committed = find_commitments(owner, registry, model_id)
    answers = None if transcript is None else _answers(Path(transcript), owner, committed)
    candidates = [one for one in committed if one.record.carriers]
    if not candidates:
        raise RegistryError(
            f"{registry} commits to no weight signature",
            hint="these models were marked with triggers only: use wmguard probe",
        )
    identities: tuple[Identity, ...] = (X25519Identity.from_owner(owner),)
    if identity is not None:
        identities = (load_identity(identity), *identities)
    with ExitStack() as stack:
        where = _reachable(suspect, stack)
        # Hashing a large suspect takes longer than all the rest, and needs nothing of it.
        described = stack.enter_context(ThreadPoolExecutor(1)).submit(_describe, where)
        opened = stack.enter_context(open_suspect(where, identities=identities))
        own = None
        if original is not None:
            own = stack.enter_context(open_suspect(_reachable(original, stack), identities=identities))
        tried = [
            (one, attempt)
            for one in candidates
            for attempt in read_attempts(
                one.record, one.record.carrier_keys(owner), opened, original=own, progress=progress
            )
        ]
        # Last: of what is kept elsewhere it tells what was read.
        about = _read_of(where) | described.result()
    read = [_Channels.of(one, [attempt for other, attempt in tried if other is one], answers) for one in candidates]
    best = min(read, key=lambda one: (one.log10_p, not _enough(one.attempt.reading)))
    # With answers every commitment is one test, of weights and answers; without them every reading is.
    tests = sum(one.tests for one in read) if answers is None else best.tests * len(read)
    lacking = [
        None if any(_enough(attempt.reading) for _, attempt in tried) else _lacking(best.attempt.reading),
        None if answers is None else too_little_answered(answers.outcome, answers.plan, len(read), transcript),
    ]
    return make_report(
        best.committed,
        min(0.0, best.log10_p + math.log10(tests / best.tests)),
        tests,
        alpha_log10,
        lacking="; ".join(filter(None, lacking)) or None,
        signature=_signature_result(best.committed, owner, best.attempt, best.score),
        triggers=None if answers is None else answers.result(best.answered),
        suspect=about,
        transcript=None if answers is None else answers.about,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Channels:
    """What weights and answers say about one commitment.

    Args:
        committed: The commitment.
        attempt: The reading of the weights that says most.
        score: Its score.
        tests: Readings that were scored.
        answered: What the answers say, None where they were not asked for this commitment.
    """

    committed: Committed
    attempt: Attempt
    score: Score
    tests: int
    answered: SetResult | None

    @classmethod
    def of(cls, committed: Committed, attempts: Sequence[Attempt], answers: _Answers | None) -> _Channels:
        scored = [(attempt, attempt.reading.score()) for attempt in attempts]
        attempt, score = min(scored, key=lambda item: (item[1].log10_p, not _enough(item[0].reading)))
        return cls(
            committed=committed,
            attempt=attempt,
            score=score,
            tests=sum(attempt.tests * score.tests for attempt, score in scored),
            answered=None if answers is None else answers.results.get(committed.entry.hash),
        )

    @property
    def log10_p(self) -> float:
        """Of both channels, corrected for the tests within this commitment."""
        weights = log10_bonferroni(self.score.log10_p, self.tests)
        return log10_fuse(weights, None if self.answered is None else self.answered.log10_p)


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
    check_alpha(alpha_log10)
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
    tried = _with_triggers(find_commitments(owner, registry, model_id), asker, registry)
    about = _about(suspect, asker, uri)
    with ExitStack() as stack:
        written = None
        if transcript is not None:
            fixed = {"owner": owner.key_id(), "commitments": [one.entry.hash for one, _ in tried], "suspect": about}
            written = stack.enter_context(Transcript(Path(transcript), {**fixed, **plan.to_json()}, owner))
        sets = [triggers for _, triggers in tried]
        outcome = run(asker, sets, plan, transcript=written, may_be_canned=not is_local, progress=progress)
        best = min(range(len(tried)), key=lambda i: outcome.results[i].log10_p)
        report = make_report(
            tried[best][0],
            log10_bonferroni(outcome.results[best].log10_p, len(tried)),
            len(tried),
            alpha_log10,
            lacking=too_little_answered(outcome, plan, len(tried), transcript),
            triggers=trigger_result(outcome, outcome.results[best], plan),
            suspect=about,
        )
        if written is not None and outcome.queries and outcome.fault is None:
            written.finish(report.to_json())
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """What a finished transcript says.

    Args:
        plan: What was fixed before the first question.
        outcome: What the answers are worth.
        results: By the hash of the commitment.
        about: For the report.
    """

    plan: Plan
    outcome: Outcome
    results: Mapping[str, SetResult]
    about: dict[str, str | None]

    def result(self, of: SetResult | None) -> TriggerResult | None:
        return None if of is None else trigger_result(self.outcome, of, self.plan)


def _answers(path: Path, owner: OwnerKey, committed: Sequence[Committed]) -> _Answers:
    """Return what a transcript says, judged again from its answers: the verdict in it is not taken over."""
    contents = check_transcript(path, owner.signing_key().public_key())
    known = {one.entry.hash: one.record.triggers for one in committed}
    entries = contents.plan.get("commitments")
    entries = entries if isinstance(entries, list) else []
    sets = [known.get(entry) for entry in entries]
    whole = [one for one in sets if one is not None]
    if not whole or len(whole) < len(sets):
        # Triggers of all of them were asked: without their sets the questions cannot be told apart.
        raise TranscriptError(
            f"{path} asks triggers that this registry, or this model, does not commit to",
            hint="check --registry, and leave --model-id out or probe with it too",
        )
    plan = Plan.from_json(contents.plan)
    outcome = rescore(contents, whole, plan)
    where = contents.plan.get("suspect")
    asked = where if isinstance(where, dict) else {}
    about = {"uri": asked.get("uri"), "model": asked.get("model"), "time": contents.time, "sha256": contents.head}
    return _Answers(plan=plan, outcome=outcome, results=dict(zip(entries, outcome.results, strict=True)), about=about)


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


def _reachable(suspect: Source, stack: ExitStack) -> Source | RemoteFolder:
    """Return a suspect that can be opened: one that is kept elsewhere is reached first."""
    if isinstance(suspect, str) and is_location(suspect):
        return stack.enter_context(open_remote(parse_location(suspect)))
    return suspect


def _read_of(suspect: Source | RemoteFolder) -> dict[str, Any]:
    """Return what was read of a suspect that is kept elsewhere, and what its store says of the whole files."""
    if not isinstance(suspect, RemoteFolder):
        return {}
    stated = {name: suspect.stated.get(name) for name in suspect.weight_names()}
    return {"revision": suspect.location.revision, "read": suspect.reads.to_json(), "sha256_stated": stated}


def _describe(suspect: Source | RemoteFolder) -> dict[str, Any]:
    if isinstance(suspect, RemoteFolder):
        # Nobody has read all of it: there is no digest of the whole to vouch for.
        return {"uri": str(suspect.location), "sha256": None}
    if isinstance(suspect, str | Path):
        return {"uri": str(suspect), "sha256": digest(Path(suspect))}
    return {"uri": type(suspect).__name__, "sha256": None}
