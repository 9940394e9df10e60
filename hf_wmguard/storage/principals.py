"""Who is named in a bucket policy: roles, users, whole accounts. Pure: nothing is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_wmguard.errors import ConfigError

_ACCOUNT = re.compile(r"\d{12}")
# No wildcards: a name with one would be a pattern in the policy, and a pattern is more than was named.
_ARN = re.compile(
    r"arn:(?P<partition>aws|aws-cn|aws-us-gov):iam::(?P<account>\d{12}|):"
    r"(?P<kind>user|role|root)(?P<path>(?:/[\w+=,.@-]{1,128}){0,16})",
    re.ASCII,
)
_SESSION = re.compile(
    r"arn:(?P<partition>aws|aws-cn|aws-us-gov):sts::(?P<account>\d{12}):assumed-role/(?P<name>[\w+=,.@-]{1,64})/.+",
    re.ASCII,
)
_EXAMPLE = "arn:aws:iam::111122223333:role/trainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """One name in a policy.

    Args:
        arn: As a policy's ``Principal`` names it.
        pattern: What ``aws:PrincipalArn`` is compared with: the same, but for a whole account.
    """

    arn: str
    pattern: str

    @property
    def partition(self) -> str:
        """``aws``, or another cloud of the same maker."""
        return self.arn.split(":")[1]

    @property
    def account(self) -> str:
        """Its twelve digits; empty in stores that have no accounts."""
        return self.arn.split(":")[4]

    @property
    def is_account(self) -> bool:
        """Whether everybody in an account is meant, as far as its own administrator lets them."""
        return self.pattern.endswith(":*")


def parse_principal(text: str, *, partition: str = "aws") -> Principal:
    """Return whom a text names.

    A role or user is its ARN. Twelve digits are a whole account: everybody in it whom its own IAM lets.
    ``arn:aws:iam::111122223333:root`` is that account's root user and nobody else.

    Args:
        text: As typed.
        partition: Of an account that is named by its digits.
    Raises:
        ConfigError: Anything else, such as a wildcard, a group, or a session of a role.
    """
    if _ACCOUNT.fullmatch(text):
        return Principal(arn=f"arn:{partition}:iam::{text}:root", pattern=f"arn:{partition}:iam::{text}:*")
    session = _SESSION.fullmatch(text)
    if session:
        raise ConfigError(
            f"{text!r} is a session of a role, which ends",
            hint=f"name the role: arn:{session['partition']}:iam::{session['account']}:role/{session['name']}, "
            "with its path if it has one",
        )
    found = _ARN.fullmatch(text)
    # A user or role has a name behind its kind, the root user has none. Names without an account exist in
    # S3-compatible stores only, for users.
    if (
        not found
        or (found["kind"] == "root") == bool(found["path"])
        or not (found["account"] or found["kind"] == "user")
    ):
        raise ConfigError(
            f"{text[:200]!r} names no role, user or account",
            hint=f"write {_EXAMPLE}, or the twelve digits of an account; wildcards are refused",
        )
    return Principal(arn=text, pattern=text)


def is_caller(principal: Principal, caller: str) -> bool:
    """Return whether the identity that STS names is this principal.

    A session is named by its role without the role's path, while the policy compares the whole ARN of the role. A
    role's name is unique in its account whatever its path, and S3 takes no policy that names a role at a path where it
    is not: so the name decides.

    Args:
        principal: Somebody in a policy.
        caller: ARN from ``sts:GetCallerIdentity``.
    """
    if principal.is_account:
        return caller.split(":")[4:5] == [principal.account]
    session = _SESSION.fullmatch(caller)
    if session is None:
        return caller == principal.arn
    return (
        session["partition"] == principal.partition
        and session["account"] == principal.account
        and principal.arn.split(":", 5)[5].startswith("role/")
        and principal.arn.rsplit("/", 1)[1] == session["name"]
    )
