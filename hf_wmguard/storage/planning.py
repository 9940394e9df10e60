"""From what a bucket is set to, to what it will be: a list of changes, each with its diff. Pure: nothing is changed."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from hf_wmguard.storage.bucket import SETTINGS, Settings
from hf_wmguard.storage.policy import (
    ABORT_DAYS,
    OWNERSHIP,
    PUBLIC_ACCESS_BLOCK,
    RULE_ID,
    SID_PREFIX,
    Lock,
    Statement,
    abort_rule,
    bucket_policy,
    encryption_of,
)
from hf_wmguard.storage.principals import is_caller
from hf_wmguard.storage.statements import is_ours, is_public, principals_of, sid_of, statements_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that is not as it should be.

    Args:
        setting: One of `hf_wmguard.storage.bucket.SETTINGS`.
        before: As it is, in the words of S3's API; None where nothing is set.
        after: As it will be.
    """

    setting: str
    before: Any
    after: Any

    @property
    def diff(self) -> str:
        """The same as a unified diff of JSON."""
        names = (f"{self.setting} (now)", f"{self.setting} (after)")
        return "\n".join(difflib.unified_diff(_lines(self.before), _lines(self.after), *names, lineterm=""))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"setting": self.setting, "before": self.before, "after": self.after, "diff": self.diff}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a lock-down changes.

    Args:
        lock: Who may do what.
        caller: ARN of whoever asked, None where the store does not say.
        changes: In the order in which they are applied.
        desired: Every setting as it will be.
        openings: What is open to the public now and is closed.
        notes: What else to know before saying yes.
        unsupported: Settings that this store does not have.
        plain_http: Whether the store is asked without TLS.
    """

    lock: Lock
    caller: str | None
    changes: tuple[Change, ...]
    desired: dict[str, Any]
    openings: tuple[str, ...]
    notes: tuple[str, ...]
    unsupported: tuple[str, ...]
    plain_http: bool = False

    @property
    def lock_out(self) -> str | None:
        """Why the caller could not undo this, as far as one can see; None where they can."""
        if self.caller is None:
            return "this store does not say who you are, so that nobody can tell whether you are an administrator"
        if not any(is_caller(admin, self.caller) for admin in self.lock.admins):
            return f"you are {self.caller}, and not one of the administrators"
        if self.plain_http:
            return "you ask over plain HTTP, which the policy denies to everyone"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "bucket": self.lock.bucket,
            "prefix": self.lock.prefix,
            "readers": [one.arn for one in self.lock.readers],
            "writers": [one.arn for one in self.lock.writers],
            "admins": [one.arn for one in self.lock.admins],
            "caller": self.caller,
            "lock_out": self.lock_out,
            "changes": [change.to_json() for change in self.changes],
            "openings": list(self.openings),
            "notes": list(self.notes),
            "unsupported": list(self.unsupported),
            "desired": self.desired,
        }


def make_plan(lock: Lock, settings: Settings, caller: str | None, *, plain_http: bool = False) -> Plan:
    """Return what has to change.

    Args:
        lock: Who may do what.
        settings: As the bucket is now.
        caller: ARN of whoever asks.
        plain_http: Whether the store is asked without TLS.
    Raises:
        ConfigError: The policy would be longer than S3 takes.
    """
    now = settings.values
    kept, openings, notes = _sorted_out(lock, statements_of(now.get("policy")))
    desired = {
        "versioning": "Enabled",
        "acl": [],
        "ownership": OWNERSHIP,
        "encryption": _encryption(lock, now.get("encryption")),
        "lifecycle": _lifecycle(now.get("lifecycle")),
        "public_access_block": dict(PUBLIC_ACCESS_BLOCK),
        "policy": bucket_policy(lock, kept),
    }
    changes = tuple(
        Change(setting=name, before=now[name], after=desired[name])
        for name in SETTINGS
        if name in now and _plain(now[name]) != _plain(desired[name])
    )
    openings += [f"the ACL grants {grant['Permission']} to {grant['Grantee']}" for grant in now.get("acl") or ()]
    if lock.kms_key:
        notes.append("readers need kms:Decrypt with the key, writers kms:GenerateDataKey and kms:Decrypt too")
    return Plan(
        lock=lock,
        caller=caller,
        changes=changes,
        desired=desired,
        openings=tuple(openings),
        notes=tuple(notes),
        unsupported=settings.unsupported,
        plain_http=plain_http,
    )


def _sorted_out(lock: Lock, statements: list[Statement]) -> tuple[list[Statement], list[str], list[str]]:
    """Return the statements of others that stay, and what to say of them and of those that go."""
    kept, openings, notes = [], [], []
    named = {one.arn for one in lock.everyone}
    for number, statement in enumerate(statements, start=1):
        sid = sid_of(statement, number)
        if is_ours(statement):
            notes += _former(lock, statement)
            continue
        if is_public(statement):
            openings.append(f"{sid} of the policy gives {_actions(statement)} to the public, and is removed")
            continue
        kept.append(statement)
        if statement.get("Effect") == "Deny":
            notes.append(f"{sid} is kept: see that it denies no administrator anything")
        for kind, name in principals_of(statement):
            if statement.get("Effect") == "Allow" and kind != "Service" and name not in named:
                notes.append(f"{sid} is kept, but {name} is not named here and is denied")
    return kept, openings, notes


def _former(lock: Lock, statement: Statement) -> list[str]:
    """Return what an older lock gave that this one does not."""
    if statement.get("Effect") != "Allow" or statement.get("Sid") == f"{SID_PREFIX}Administer":
        return []
    notes = []
    resources = statement.get("Resource", [])
    for resource in [resources] if isinstance(resources, str) else resources:
        if resource not in (lock.bucket_arn, lock.objects_arn):
            notes.append(
                f"the bucket is locked for {resource} now: one bucket has one lock, and this one takes its place"
            )
    return notes


def _actions(statement: Statement) -> str:
    found = statement.get("Action", "everything")
    return found if isinstance(found, str) else ", ".join(map(str, found))


def _encryption(lock: Lock, now: Any) -> Any:
    # A bucket that is encrypted by a key of its owner is not taken back to the store's own key.
    if (
        lock.kms_key is None
        and isinstance(now, dict)
        and str(now.get("SSEAlgorithm", "")).startswith(("aws:kms", "AES256"))
    ):
        return now
    return encryption_of(lock)


def _lifecycle(now: Any) -> list[dict[str, Any]]:
    rules = list(now or ())
    if any(aborts_uploads(rule) for rule in rules):
        return rules
    return [*(rule for rule in rules if rule.get("ID") != RULE_ID), abort_rule()]


def aborts_uploads(rule: dict[str, Any]) -> bool:
    """Return whether a lifecycle rule clears unfinished uploads of the whole bucket soon enough."""
    days = rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation")
    everywhere = rule.get("Filter", {}) in ({}, {"Prefix": ""}) and not rule.get("Prefix")
    return rule.get("Status") == "Enabled" and everywhere and days is not None and days <= ABORT_DAYS


def _plain(value: Any) -> Any:
    """Return a value in which neither order nor the two ways to write one name make a difference."""
    if isinstance(value, dict):
        return {key: _plain([one] if key in _LISTS and isinstance(one, str) else one) for key, one in value.items()}
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return sorted(set(value))
    return [_plain(one) for one in value] if isinstance(value, list) else value


_LISTS = {"AWS", "Service", "Action", "NotAction", "Resource", "NotResource"}


def _lines(value: Any) -> list[str]:
    return [] if value is None else json.dumps(value, indent=2, ensure_ascii=False).splitlines()
