"""What is open of a repo on the Hub: who can read it, and what lies in any revision of its history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from huggingface_hub import HfApi

from hf_wmguard.errors import NotFoundError, StoreError
from hf_wmguard.storage.contents import judge_file, judge_manifest, needs_reading
from hf_wmguard.storage.findings import Audit, Finding, make_audit
from hf_wmguard.stores.hub import HubStore
from hf_wmguard.stores.hub_errors import hub_errors
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.remote import RemoteFile

MAX_COMMITS = 1000
_SHORT = 8


def audit_hub(location: Location, note: Callable[[str], None]) -> Audit:
    """Return what is open of a repo; see `hf_wmguard.storage.audit.audit`."""
    api, repo = HfApi(), Location(scheme="hub", root=location.root)
    note("who can read it")
    with hub_errors(str(repo)):
        info = api.model_info(repo.root)
    found = list(_judge_access(info))
    public = info.private is not True and not info.gated
    heads, commits, unchecked = _history(api, repo)
    found += unchecked
    seen: set[tuple[str, str]] = set()
    for number, commit in enumerate(commits, start=1):
        note(f"commit {number} of {len(commits)}")
        found += _judge_commit(repo.at(commit), heads.get(commit), public, seen)
    return make_audit(str(repo), found)


def _judge_access(info: Any) -> Iterator[Finding]:
    if info.private is True:
        return
    if info.gated:
        detail = f"public, gated ({info.gated}): whoever is let in reads it, and everybody sees the names of its files"
        yield Finding(
            severity="medium", what="gated", where="repo", detail=detail, remedy="make it private in its settings"
        )
    else:
        detail = "everybody can read every revision of it"
        yield Finding(
            severity="critical", what="public", where="repo", detail=detail, remedy="make it private in its settings"
        )


def _history(api: HfApi, repo: Location) -> tuple[dict[str, str], list[str], list[Finding]]:
    """Return the commits that branches, tags and pull requests point to, with their names; all commits; and what could
    not be looked at."""
    with hub_errors(str(repo)):
        try:
            refs = api.list_repo_refs(repo.root, include_pull_requests=True)
            unchecked = []
        except ValueError:
            # Some servers know no pull requests.
            refs, unchecked = api.list_repo_refs(repo.root), [_unchecked("pull requests", "this server does not say")]
    named = [*refs.branches, *refs.tags, *refs.converts, *(refs.pull_requests or ())]
    heads: dict[str, str] = {}
    commits: dict[str, None] = {}
    for ref in named:
        try:
            with hub_errors(f"{repo}@{ref.name}"):
                # By commit and not by name: a branch may move meanwhile.
                log = [one.commit_id for one in api.list_repo_commits(repo.root, revision=ref.target_commit)]
        except (NotFoundError, StoreError) as error:
            unchecked.append(_unchecked(ref.ref, error.message))
            log = [ref.target_commit]
        if log:
            heads.setdefault(log[0], ref.name)
        commits |= dict.fromkeys(log)
    if len(commits) > MAX_COMMITS:
        unchecked.append(_unchecked("history", f"only {MAX_COMMITS} of {len(commits)} commits were looked at"))
    # What branches point to is looked at first, so that a file that is still there is named as such.
    ordered = [*heads, *(one for one in commits if one not in heads)]
    return heads, ordered[:MAX_COMMITS], unchecked


def _judge_commit(location: Location, head: str | None, public: bool, seen: set[tuple[str, str]]) -> Iterator[Finding]:
    """Judge the files of a commit that no commit before had."""
    revision = head or f"commit {str(location.revision)[:_SHORT]}, in the history"
    try:
        store = HubStore(location)
    except NotFoundError:
        # A commit without files.
        return
    except StoreError as error:
        yield _unchecked(revision, error.message)
        return
    files: Mapping[str, Any] = store.files()
    for name, stored in files.items():
        if (name, stored.tag) in seen or not needs_reading(name, stored.size_bytes):
            continue
        seen.add((name, stored.tag))
        where = f"{name} ({revision})"
        try:
            yield from judge_file(name, where, RemoteFile(store, name), public=public)
        except (NotFoundError, StoreError) as error:
            yield _unchecked(where, error.message)
    if head is None:
        return
    try:
        yield from judge_manifest(revision, files, lambda name: RemoteFile(store, name))
    except (NotFoundError, StoreError) as error:
        yield _unchecked(f"manifest ({revision})", error.message)


def _unchecked(where: str, detail: str) -> Finding:
    return Finding(
        severity="info", what="unchecked", where=where, detail=detail, remedy="use a token that may read it all"
    )
