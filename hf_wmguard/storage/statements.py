"""Read the policy that somebody else wrote: which statements are ours, which open the bucket to the public. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from hf_wmguard.storage.policy import SID_PREFIX, Statement

# Conditions on fixed values of these keep a statement from being public. Source: Amazon S3 User Guide, "Blocking public
# access to your Amazon S3 storage", section "The meaning of 'public'".
_LIMITING = {
    "aws:principalarn",
    "aws:principalaccount",
    "aws:principalorgid",
    "aws:principalorgpaths",
    "aws:sourceaccount",
    "aws:sourcearn",
    "aws:sourceip",
    "aws:sourceorgid",
    "aws:sourceorgpaths",
    "aws:sourceowner",
    "aws:sourcevpc",
    "aws:sourcevpce",
    "aws:userid",
    "s3:dataaccesspointaccount",
    "s3:dataaccesspointarn",
    "s3:x-amz-server-side-encryption-aws-kms-key-id",
}
_EQUAL = {"stringequals", "stringequalsignorecase", "stringlike", "arnequals", "arnlike"}
_WIDEST_PREFIX = {4: 8, 6: 32}


def statements_of(policy: Mapping[str, Any] | None) -> list[Statement]:
    """Return the statements of a policy document, or none."""
    found = (policy or {}).get("Statement", [])
    return [one for one in _listed(found) if isinstance(one, dict)]


def is_ours(statement: Statement) -> bool:
    """Return whether `bucket_policy` wrote a statement, some day."""
    return str(statement.get("Sid", "")).startswith(SID_PREFIX)


def sid_of(statement: Statement, number: int) -> str:
    """Return what a statement is called in messages."""
    return str(statement.get("Sid") or f"statement {number}")


def is_public(statement: Statement) -> bool:
    """Return whether a statement gives something to people whom nobody named, as S3 itself judges it.

    Where in doubt the answer is yes: a condition that is not understood limits nothing.
    """
    if statement.get("Effect") != "Allow":
        return False
    anyone = "NotPrincipal" in statement or any(
        kind == "AWS" and "*" in name.split(":") for kind, name in principals_of(statement)
    )
    return anyone and not any(_limits(*condition) for condition in _conditions(statement))


def principals_of(statement: Statement) -> Iterator[tuple[str, str]]:
    """Yield kind (``AWS``, ``Service``, ``Federated``, ...) and name of everyone whom a statement names."""
    principal = statement.get("Principal", {})
    if not isinstance(principal, dict):
        principal = {"AWS": principal}
    for kind, names in principal.items():
        for name in _listed(names):
            yield kind, str(name)


def requires_tls(statement: Statement, bucket_arn: str) -> bool:
    """Return whether a statement denies everybody everything over plain HTTP."""
    resources = {str(one) for one in _listed(statement.get("Resource", []))}
    tests = [
        value
        for operator, key, values in _conditions(statement)
        for value in values
        if operator in ("bool", "boolifexists") and key == "aws:securetransport"
    ]
    return (
        statement.get("Effect") == "Deny"
        and ("AWS", "*") in principals_of(statement)
        and bool({"s3:*", "*"} & {str(one) for one in _listed(statement.get("Action", []))})
        and ("*" in resources or {bucket_arn, f"{bucket_arn}/*"} <= resources)
        and [value.lower() for value in tests] == ["false"]
        # A second condition would have to hold as well.
        and len(list(_conditions(statement))) == 1
    )


def denies_others(statement: Statement, bucket_arn: str) -> bool:
    """Return whether a statement denies objects to everybody but those whom it names."""
    resources = {str(one) for one in _listed(statement.get("Resource", []))}
    named = any(
        operator in ("arnnotlike", "arnnotequals", "stringnotlike", "stringnotequals") and key == "aws:principalarn"
        for operator, key, _ in _conditions(statement)
    )
    return (
        statement.get("Effect") == "Deny"
        and ((("AWS", "*") in principals_of(statement) and named) or "NotPrincipal" in statement)
        and bool({"s3:*", "*"} & {str(one) for one in _listed(statement.get("Action", []))})
        and bool({"*", f"{bucket_arn}/*"} & resources)
    )


def _conditions(statement: Statement) -> Iterator[tuple[str, str, list[str]]]:
    """Yield operator, key (both in lower case, as they are compared) and values."""
    block = statement.get("Condition", {})
    for operator, tests in block.items() if isinstance(block, dict) else ():
        for key, values in tests.items() if isinstance(tests, dict) else ():
            yield operator.lower(), key.lower(), [str(value) for value in _listed(values)]


def _limits(operator: str, key: str, values: list[str]) -> bool:
    if key not in _LIMITING or not values:
        return False
    if operator == "ipaddress" and key == "aws:sourceip":
        return all(_is_narrow(value) for value in values)
    # Without "IfExists" and "ForAllValues", which hold where the key is missing.
    return operator.removeprefix("foranyvalue:") in _EQUAL and not any("*" in value or "?" in value for value in values)


def _is_narrow(network: str) -> bool:
    try:
        found = ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
    return found.prefixlen >= _WIDEST_PREFIX[found.version]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
