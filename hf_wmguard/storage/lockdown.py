"""Lock a bucket down: plan it, apply it, look whether it took effect.

What is read and written in between belongs to the bucket's administrator: S3 has no transaction over settings, so two
people who change the same bucket at the same moment can undo each other. The second look tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from hf_wmguard.errors import ConfigError, NotFoundError, StoreError, UsageError
from hf_wmguard.storage.aws import ask
from hf_wmguard.storage.bucket import read_settings, write_setting
from hf_wmguard.storage.planning import Plan, make_plan
from hf_wmguard.storage.policy import Lock
from hf_wmguard.storage.principals import Principal, parse_principal
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.s3 import S3Options, s3_client


def make_lock(
    location: Location,
    *,
    readers: Iterable[str] = (),
    writers: Iterable[str] = (),
    admins: Iterable[str] = (),
    kms_key: str | None = None,
    minimum_tls: str | None = None,
) -> Lock:
    """Return who may do what, from what somebody typed.

    Args:
        location: Of the scheme ``s3``.
        readers: ARNs or accounts, as `parse_principal` takes them.
        writers: The same.
        admins: The same, without accounts.
        kms_key: See `Lock`.
        minimum_tls: See `Lock`.
    Raises:
        ConfigError: Not S3, or a name that is none.
    """
    if location.scheme != "s3":
        raise ConfigError(
            f"{location} is not in S3: the Hub has no policies to set",
            hint="keep the repo private, and look at it with wmguard storage audit",
        )
    names = [*readers, *writers, *admins]
    # An account is named by digits alone: it is in the partition of whoever is named in full.
    partition = next((name.split(":")[1] for name in names if name.startswith("arn:") and name.count(":") > 1), "aws")

    def parse(texts: Iterable[str]) -> tuple[Principal, ...]:
        return tuple(parse_principal(text, partition=partition) for text in texts)

    return Lock(
        bucket=location.root,
        prefix=location.path,
        readers=parse(readers),
        writers=parse(writers),
        admins=parse(admins),
        kms_key=kms_key,
        minimum_tls=minimum_tls,
    )


class Lockdown:
    """A bucket that is to be locked.

    Args:
        lock: Who may do what.
        endpoint_url: Of an S3-compatible store; by default boto3's own settings (``AWS_ENDPOINT_URL_S3``).
    Raises:
        MissingDependencyError: boto3 is not installed.
        ConfigError: No region, or no such endpoint.
    """

    def __init__(self, lock: Lock, *, endpoint_url: str | None = None) -> None:
        self._lock = lock
        self._endpoint_url = endpoint_url
        self._client = s3_client(S3Options(endpoint_url=endpoint_url))

    def plan(self) -> Plan:
        """Return what has to change. Changes nothing.

        Raises:
            NotFoundError: No such bucket.
            StoreError: The caller may not read a setting, or the store does not answer.
        """
        settings = read_settings(self._client, self._lock.bucket)
        if settings.denied:
            raise StoreError(
                f"may not read of {self._lock.bucket}: {', '.join(settings.denied)}",
                hint="use credentials of the bucket's administrator",
            )
        return make_plan(
            self._lock,
            settings,
            self._caller(),
            plain_http=str(self._client.meta.endpoint_url).startswith("http://"),
        )

    def apply(
        self, plan: Plan, *, lock_me_out: bool = False, progress: Callable[[str], None] | None = None
    ) -> tuple[str, ...]:
        """Make every change of a plan, look again, and return the names of the settings that were changed.

        Args:
            plan: From `plan`, as somebody has seen it.
            lock_me_out: Go on although the caller could not undo it (`Plan.lock_out`).
            progress: Called with a setting's name before it is changed.
        Raises:
            UsageError: The caller could not undo it. Nothing was changed.
            StoreError: The bucket has changed since the plan was made, the store refuses something (the message says
                what was applied before), or a setting did not take effect.
        """
        if plan.lock_out and not lock_me_out:
            raise UsageError(
                f"{plan.lock_out}: you would be locked out; nothing was changed",
                hint="run it over TLS and as an administrator, named with --admin; --lock-me-out does it nevertheless",
            )
        if self.plan().changes != plan.changes:
            raise StoreError(
                f"{self._lock.bucket} has changed since the plan was made; nothing was changed here",
                hint="look at a new plan",
            )
        applied: list[str] = []
        unsupported: list[str] = []
        for change in plan.changes:
            if progress is not None:
                progress(change.setting)
            try:
                code = write_setting(self._client, self._lock.bucket, change.setting, change.after)
            except (NotFoundError, StoreError) as error:
                raise StoreError(
                    f"{change.setting}: {error.message}; applied before: {', '.join(applied) or 'nothing'}",
                    hint=f"{error.hint}; the same command goes on where this one stopped",
                ) from None
            (unsupported if code else applied).append(change.setting)
        if unsupported:
            raise StoreError(
                f"this store does not take {', '.join(unsupported)}; applied: {', '.join(applied) or 'nothing'}",
                hint="set by its own means what it does not take",
            )
        # Whoever locked themselves out cannot look.
        if applied and not plan.lock_out:
            self._look_again(applied)
        return tuple(applied)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _look_again(self, applied: list[str]) -> None:
        left = [change.setting for change in self.plan().changes]
        if left:
            raise StoreError(
                f"applied {', '.join(applied)}, but {', '.join(left)} did not take effect",
                hint="somebody else may be changing the bucket: look at a new plan",
            )

    def _caller(self) -> str | None:
        try:
            with closing(s3_client(S3Options(endpoint_url=self._endpoint_url), service="sts")) as client:
                identity, _ = ask(client, "get_caller_identity")
        except StoreError:
            # S3-compatible stores often have no STS; then nobody can say who asks.
            return None
        arn: Any = identity.get("Arn")
        return arn if isinstance(arn, str) else None
