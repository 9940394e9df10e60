"""The repo on the Hub that a push goes to: made private where it is missing, and looked at before anything is sent."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_wmguard.delivery.hub_client import ask
from hf_wmguard.errors import ExposureError, OwnershipError, StoreError, UsageError, WmguardError
from hf_wmguard.evidence.manifest import ENVELOPE_NAME, MANIFEST_NAME, Manifest, read_manifest
from hf_wmguard.stores.location import Location

MAIN = "main"
# What the Hub itself puts into a new repo.
_EMPTY = (".gitattributes",)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest version of a branch: its commit, and what it holds."""

    branch: str
    commit: str
    files: Mapping[str, RepoFile]
    tags: Mapping[str, str]


def open_repo(api: HfApi, location: Location, allow_public: bool, *, claim: bool = False) -> None:
    """Check that the repo is private, and make it if there is none.

    Args:
        api: The client.
        location: The repo.
        allow_public: Whether it may be public.
        claim: Make a public repo private that holds nothing yet.

    Raises:
        ExposureError: It is public, and that is not allowed.
    """
    try:
        info = ask(lambda: api.model_info(location.root))
    except RepositoryNotFoundError:
        try:
            ask(lambda: api.create_repo(location.root, private=True))
        except HfHubHTTPError as error:
            # Somebody else has made it just now; or it is there, but not for this token: then the next call says so.
            if error.response.status_code != 409:
                raise
        info = ask(lambda: api.model_info(location.root))
    if info.private is True or allow_public:
        return
    if claim and all(one.rfilename in _EMPTY for one in info.siblings or ()):
        ask(lambda: api.update_repo_settings(location.root, private=True))
        info = ask(lambda: api.model_info(location.root))
    if info.private is not True:
        raise ExposureError(
            f"{location.root} is public: everybody could fetch the ciphertext, and nothing was sent",
            hint="make it private in its settings, choose another repo, or allow it with --allow-public",
        )


def open_branch(api: HfApi, location: Location, allow_public: bool) -> Head:
    """Return the head of the branch that an address names; the branch is made if there is none.

    Raises:
        ExposureError: The repo is public, and that is not allowed.
        UsageError: The revision is a commit or a tag.
        StoreError: The branch cannot be made.
    """
    open_repo(api, location, allow_public)
    branch = location.revision or MAIN
    refs = ask(lambda: api.list_repo_refs(location.root))
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if branch not in branches:
        if branch in tags or _COMMIT.fullmatch(branch) or branch.startswith("refs/"):
            raise UsageError(
                f"{branch} of {location.root} is no branch, and cannot be pushed to",
                hint="name a branch; --tag names the new version",
            )
        ask(lambda: api.create_branch(location.root, branch=branch, exist_ok=True))
        refs = ask(lambda: api.list_repo_refs(location.root))
        branches = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in branches:
        raise StoreError(f"{location.root} has no branch {branch}", hint="make the branch, or name another")
    commit = branches[branch]
    return Head(branch=branch, commit=commit, files=list_files(api, location, commit), tags=tags)


def list_files(api: HfApi, location: Location, commit: str) -> dict[str, RepoFile]:
    """Return every file of a commit by its path in the repo."""
    found = ask(lambda: list(api.list_repo_tree(location.root, recursive=True, revision=commit)))
    return {one.path: one for one in found if isinstance(one, RepoFile)}


def read_old(api: HfApi, location: Location, head: Head) -> tuple[Manifest, str] | None:
    """Return what is protected there now, and who signed it; None where nothing is.

    Raises:
        OwnershipError: A manifest is there whose envelope does not hold.
    """
    names = [location.key(name) for name in (MANIFEST_NAME, ENVELOPE_NAME)]
    if not all(name in head.files for name in names):
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                ask(
                    lambda name=name: api.hf_hub_download(  # type: ignore[misc]
                        location.root, name, revision=head.commit, local_dir=folder
                    )
                )
        except RemoteEntryNotFoundError:
            return None
        try:
            return read_manifest(Path(folder) / location.path)
        except WmguardError as error:
            raise OwnershipError(
                f"{location} holds a manifest that does not hold: {error.message}",
                hint="push to another repo, or delete what is there first",
            ) from None
