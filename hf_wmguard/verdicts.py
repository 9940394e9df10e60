"""What `verify` and `probe` share: the commitments that they judge by, and how a verdict is worded."""

from __future__ import annotations

import math
from pathlib import Path

from hf_wmguard.errors import ConfigError, RegistryError
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.keys import OwnerKey
from hf_wmguard.probing.plan import Plan
from hf_wmguard.probing.session import Outcome, SetResult
from hf_wmguard.protect import Committed
from hf_wmguard.reports import Report, SignatureResult, TriggerResult, Verdict
from hf_wmguard.watermark.pvalues import log10_bonferroni


def find_commitments(owner: OwnerKey, registry: str | Path, model_id: str | None) -> list[Committed]:
    """Return the commitments of a registry, of one model or all, each checked to be derived from the owner's key.

    Raises:
        RegistryError: There is none.
        AuthenticationError: The owner key is not the registry's.
    """
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


def check_alpha(alpha_log10: float) -> None:
    """Refuse a level that is none.

    Raises:
        ConfigError: Not below 0, or not finite.
    """
    if not -math.inf < alpha_log10 < 0:
        raise ConfigError(f"alpha_log10 is {alpha_log10}, expected a number below 0", hint="-9 is usual")


def trigger_result(outcome: Outcome, result: SetResult, plan: Plan) -> TriggerResult:
    """Return what a report says about one trigger set."""
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


def too_little_answered(outcome: Outcome, plan: Plan, tests: int, transcript: str | Path | None) -> str | None:
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


def make_report(
    best: Committed,
    log10_p: float,
    tests: int,
    alpha_log10: float,
    *,
    lacking: str | None,
    suspect: dict[str, str | None],
    signature: SignatureResult | None = None,
    triggers: TriggerResult | None = None,
    transcript: dict[str, str | None] | None = None,
) -> Report:
    """Return the report on the commitment that fits best.

    Args:
        best: The commitment.
        log10_p: Corrected for every test.
        tests: How many there were.
        alpha_log10: Level of the verdict.
        lacking: What could not be read or was not answered, None where it was enough.
        suspect: See `Report`.
        signature: What the weights say.
        triggers: What the answers say.
        transcript: Which transcript they are from, see `Report`.
    """
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
        transcript=transcript,
        reason=lacking if found == "inconclusive" else None,
    )
