"""What a bucket policy lets somebody do, by the rules of IAM: a small judge, for the tests alone.

It knows what our policies are made of and no more, and stops where it meets anything else.

Source: AWS IAM User Guide, "Policy evaluation logic" and "IAM JSON policy elements: Condition operators".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

BUCKET = "arn:aws:s3:::acme-models"


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks.

    Args:
        arn: Of the role or user, None for nobody in particular (anonymous).
        allowed: Actions that IAM of their own account gives them for this bucket, as patterns.
        https: Whether they ask over TLS.
        tls: Its version.
        service: Whether it is a service of AWS.
    """

    arn: str | None
    allowed: tuple[str, ...] = ()
    https: bool = True
    tls: str = "1.3"
    service: bool = False
    owner_account: str = field(default="111122223333")

    @property
    def account(self) -> str | None:
        return self.arn.split(":")[4] if self.arn else None


def may(policy: Mapping[str, Any], asker: Asker, action: str, resource: str, **keys: str) -> bool:
    """Return whether a request is allowed.

    Args:
        policy: Of the bucket.
        asker: Who asks.
        action: ``s3:GetObject`` and so on.
        resource: ARN.
        keys: Further condition keys; ``s3_prefix`` is ``s3:prefix``.
    """
    context = {"aws:SecureTransport": str(asker.https).lower()}
    if asker.https:
        context["s3:TlsVersion"] = asker.tls
    if asker.arn is not None and not asker.service:
        context |= {"aws:PrincipalArn": asker.arn, "aws:PrincipalIsAWSService": "false"}
    if asker.service:
        context["aws:PrincipalIsAWSService"] = "true"
    context |= {name.replace("_", ":", 1): value for name, value in keys.items()}
    effects = {
        statement["Effect"]
        for statement in policy["Statement"]
        if _named(statement["Principal"], asker)
        and _acts(statement, action)
        and _reaches(statement, resource)
        and _holds(statement.get("Condition", {}), context)
    }
    if "Deny" in effects:
        return False
    own = any(_like(action, pattern) for pattern in asker.allowed)
    # In the owner's account either is enough; in another one both have to agree.
    return ("Allow" in effects or own) if asker.account == asker.owner_account else ("Allow" in effects and own)


def _named(principal: Any, asker: Asker) -> bool:
    if principal == "*":
        return True
    assert set(principal) == {"AWS"}
    for name in principal["AWS"]:
        assert name.startswith("arn:aws:iam::")
        # A root user's ARN as a principal stands for the account, as far as its IAM lets somebody.
        if name.endswith(":root") and asker.account == name.split(":")[4]:
            if asker.arn == name or asker.allowed:
                return True
        elif name == asker.arn:
            return True
    return False


def _acts(statement: Mapping[str, Any], action: str) -> bool:
    if "NotAction" in statement:
        return not any(_like(action, pattern) for pattern in _listed(statement["NotAction"]))
    return any(_like(action, pattern) for pattern in _listed(statement["Action"]))


def _reaches(statement: Mapping[str, Any], resource: str) -> bool:
    if "NotResource" in statement:
        return not any(_like(resource, pattern) for pattern in _listed(statement["NotResource"]))
    return any(_like(resource, pattern) for pattern in _listed(statement["Resource"]))


def _holds(condition: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    for operator, tests in condition.items():
        for key, wanted in tests.items():
            if not _OPERATORS[operator](context.get(key), _listed(wanted)):
                return False
    return True


def _arn_like(value: str, pattern: str) -> bool:
    left, right = value.split(":", 5), pattern.split(":", 5)
    # "arn:aws:iam::111122223333:*": each part on its own, a pattern's last one may stand for several.
    return len(left) == len(right) == 6 and all(_like(a, b) for a, b in zip(left, right, strict=True))


def _like(value: str, pattern: str) -> bool:
    assert "[" not in pattern
    return fnmatchcase(value, pattern)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


# A missing key: a positive test fails, a negated one holds, "IfExists" holds.
_OPERATORS = {
    "Bool": lambda value, wanted: value in wanted,
    "BoolIfExists": lambda value, wanted: value is None or value in wanted,
    "StringLike": lambda value, wanted: value is not None and any(_like(value, one) for one in wanted),
    "StringNotLike": lambda value, wanted: value is None or not any(_like(value, one) for one in wanted),
    "ArnNotLike": lambda value, wanted: value is None or not any(_arn_like(value, one) for one in wanted),
    "NumericLessThan": lambda value, wanted: value is not None and any(float(value) < float(one) for one in wanted),
}
