"""What an audit found, and how bad it is. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("critical", "high", "medium", "low", "info")
OPEN = SEVERITIES[:3]
"""Findings of these severities are openings; the others are worth knowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was found.

    Args:
        severity: One of `SEVERITIES`.
        what: One word or two for programs: ``public``, ``plaintext``, ``unchecked``, ...
        where: A setting, an object, a file at a revision.
        detail: What it means.
        remedy: What to do.
    """

    severity: str
    what: str
    where: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Everything that was found at one address.

    Args:
        uri: The address.
        findings: The worst first.
    """

    uri: str
    findings: tuple[Finding, ...]

    @property
    def is_open(self) -> bool:
        """Whether anything is open."""
        return any(finding.severity in OPEN for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return {"uri": self.uri, "open": self.is_open, "findings": [asdict(finding) for finding in self.findings]}


def make_audit(uri: str, findings: list[Finding]) -> Audit:
    """Return the findings of an address, sorted, each once."""
    unique = dict.fromkeys(findings)
    return Audit(uri=uri, findings=tuple(sorted(unique, key=lambda one: (SEVERITIES.index(one.severity), one.what))))
