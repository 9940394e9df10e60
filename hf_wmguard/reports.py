"""What a verdict says: the one report of `verify` and `probe`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["detected", "not_detected", "inconclusive"]
Method = Literal["fixed", "sequential"]


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
        log10_p: p-value of this one test, before correction for several: exact if ``method`` is ``fixed``, a bound that
            holds whenever the test stops if it is ``sequential``. 0 where a fixed test could not come to its end.
        matches: Tries answered with the committed response.
        asked: Triggers asked.
        null_rate: Mean chance of a match without the key.
        queries: Questions answered, decoys and other sets' triggers included.
        method: ``fixed`` or ``sequential``.
        tries: How often each trigger was asked.
        unusable: Answers that were refused, empty, or the same whatever was asked.
        decoys: Questions that were decoys.
    """

    log10_p: float
    matches: int
    asked: int
    null_rate: float
    queries: int
    method: Method = "fixed"
    tries: int = 1
    unusable: int = 0
    decoys: int = 0


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
        suspect: Where it was read or asked, the SHA-256 over its weight files (None in memory), and behind an API the
            name of the model. Of one that is kept elsewhere the revision, every range that was read with its SHA-256,
            and the SHA-256 of the whole files as the store states them; its own is None, for nobody read all of it.
        transcript: Where the answers are from that the weights were judged with: address, model, when they were asked,
            and the SHA-256 of the transcript's last line; None for any other report.
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
    suspect: dict[str, Any] = field(default_factory=dict)
    transcript: dict[str, str | None] | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as ``--json`` prints it."""
        return asdict(self)
