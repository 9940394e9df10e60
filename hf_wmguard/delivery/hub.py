"""Push a protected folder to the Hub: to a private repo, ciphertext first, then all of it in one commit."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_wmguard.delivery.hub_client import FAILED, ask, calling, open_client, without_bars
from hf_wmguard.delivery.hub_repo import MAIN, Head, list_files, open_branch, open_repo, read_old
from hf_wmguard.delivery.parcel import CARD_NAME, FIGURES, Parcel, Progress, stamp
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.errors import ExposureError, ManifestError, OwnershipError, StoreError, UsageError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    MANIFEST_TYPE,
    WEIGHT_SUFFIXES,
    Manifest,
    is_trainer_state,
)
from hf_wmguard.evidence.signing import open_envelope
from hf_wmguard.stores.location import Location

MAX_STATE_BYTES = 1 << 20
"""What the Trainer keeps beside the weights is smaller; a larger file of such a name is something else."""
_SMALL_BYTES = 1 << 20
_THREADS = 5
_PROBE = "README.md"
CommitOperation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


def open_hub(
    name: str, *, revision: str | None = None, allow_public: bool = False, token: str | None = None
) -> Location:
    """Return the address of a repo that the Trainer pushes to, after it was made or made private.

    Args:
        name: ``org/name``, or a name in the token's own namespace.
        revision: The branch.
        allow_public: Leave a public repo as it is. Otherwise one that is public and still empty, as the Trainer makes
            it, is made private.
        token: Instead of the client's own.
    Raises:
        ExposureError: The repo is public and not empty.
        StoreError: No token, one that may not do this, or no answer.
    """
    wanted = Location(scheme="hub", root=name, revision=revision)
    api = open_client(wanted, token)
    with calling(wanted):
        root = name if "/" in name else f"{ask(api.whoami)['name']}/{name}"
        location = Location(scheme="hub", root=root, revision=revision)
        open_repo(api, location, allow_public, claim=True)
    return location


def check_hub(location: Location, *, allow_public: bool = False, token: str | None = None) -> None:
    """Check, before hours of work and not after them, that a push to a place will be let in. Makes the repo if need be.

    Raises:
        StoreError: No token, one that may not write, or no answer.
        ExposureError: The repo is public.
    """
    api = open_client(location, token)
    with calling(location):
        open_repo(api, location, allow_public)
        # A commit begins with this question, which is refused to whoever may not write; nothing is changed by it.
        probe = CommitOperationAdd(path_in_repo=_PROBE, path_or_fileobj=b"#\n")
        ask(lambda: api.preupload_lfs_files(location.root, additions=[probe], revision=MAIN))


def fetch_card(location: Location, *, token: str | None = None) -> bytes | None:
    """Return the README that is on the branch now, None if there is none; errors as `push_to_hub`."""
    api = open_client(location, token)
    with calling(location), tempfile.TemporaryDirectory() as folder:
        try:
            path = ask(
                lambda: api.hf_hub_download(
                    location.root, location.key(CARD_NAME), revision=location.revision, local_dir=folder
                )
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
            return None
        return Path(path).read_bytes()


def _without_user(url: str) -> str:
    """Return an address without the name and the password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def push_to_hub(
    parcel: Parcel,
    location: Location,
    *,
    allow_public: bool = False,
    replace_other: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Send a protected folder to the Hub. Afterwards the branch holds the whole of it, or is what it was.

    The repo is made private if it does not exist, and its branch if it has another name than ``main``. A push that was
    cut off is simply run again: what has arrived is not sent twice.

    Args:
        parcel: From `pack`.
        location: The repo, the folder in it, and the branch.
        allow_public: Push even to a repo that everybody can read.
        replace_other: Push over another signer's save, or another model.
        tag: Name of the new version, which must not name another yet.
        commit_message: By default one that names model and iteration.
        token: Instead of the client's own.
        progress: Called with a file's name and the bytes just sent.
    Raises:
        StoreError: The Hub refuses or does not answer, or somebody else has pushed meanwhile.
        ExposureError: The repo is public, or holds plaintext weights.
        OwnershipError: Another signer's save, or another model, is there.
        ManifestError: A file has changed since it was packed.
        UsageError: The revision is a commit or a tag, or the tag names another version.
    """
    api = open_client(location, token)
    with calling(location):
        head = open_branch(api, location, allow_public)
        old = read_old(api, location, head)
        if not replace_other:
            _check_ours(parcel, location, old)
        notes: tuple[str, ...] = ()
        _check_plaintext(parcel, location, head, old)
        changed = [name for name in parcel.names if not _is_there(parcel, name, head.files.get(location.key(name)))]
        stale = _stale(parcel, location, head, old[0] if old else None)
        if tag is not None and tag in head.tags and (changed or stale or head.tags[tag] != head.commit):
            raise UsageError(
                f"{tag} of {location.root} names another version: nothing was sent", hint="choose another tag"
            )
        commit = head.commit
        if changed or stale:
            message = commit_message or f"Push {parcel.manifest.model_id} {parcel.manifest.iteration}"
            commit = _commit(api, parcel, location, head, changed, stale, message, progress)
        else:
            notes = ("this version was there already: nothing was sent",)
        if tag is not None and tag not in head.tags:
            ask(lambda: api.create_tag(location.root, tag=tag, revision=commit))
    return Pushed(
        uri=str(location.at(tag) if tag else location),
        revision=commit,
        files=parcel.names,
        size_bytes=parcel.size_bytes,
        skipped=tuple(name for name in parcel.names if name not in changed),
        left_out=parcel.left_out,
        url=f"{_without_user(api.endpoint)}/{location.root}/tree/{quote(tag or head.branch, safe='')}"
        + (f"/{quote(location.path)}" if location.path else ""),
        notes=notes,
    )


def _check_ours(parcel: Parcel, location: Location, old: tuple[Manifest, str] | None) -> None:
    if old is None:
        return
    manifest, signer = old
    if (signer, manifest.model_id) != (parcel.signer, parcel.manifest.model_id):
        raise OwnershipError(
            f"{location} holds {manifest.model_id} signed by {signer}, not {parcel.manifest.model_id} "
            f"signed by {parcel.signer}",
            hint="push to another repo, or replace it with --replace-other; who protects without --owner-key signs "
            "with a new key each time",
        )


def _check_plaintext(parcel: Parcel, location: Location, head: Head, old: tuple[Manifest, str] | None) -> None:
    """Refuse a repo with weights at its head that no manifest covers: whoever can read it needs no ciphertext."""
    known = (*(old[0].files if old is not None else ()), *parcel.manifest.files)
    digests = {(location.key(entry.name), entry.sha256) for entry in known}
    covered = {path.rpartition("/")[0] for path in head.files if path.rpartition("/")[2] == MANIFEST_NAME}
    exposed = []
    for path, file in head.files.items():
        folder, _, name = path.rpartition("/")
        if Path(name).suffix.lower() not in WEIGHT_SUFFIXES:
            continue
        if is_trainer_state(name):
            if file.size > MAX_STATE_BYTES:
                exposed.append(path)
        # A folder of its own, such as a checkpoint's, was judged when it was pushed.
        elif not (folder in covered and folder != location.path) and (path, _sha256(file)) not in digests:
            exposed.append(path)
    if exposed:
        raise ExposureError(
            f"{location.root} holds weights that no manifest covers, perhaps plaintext: {', '.join(exposed[:5])}",
            hint=f"see wmguard storage audit hub://{location.root}; deleted files stay in its history: use a new repo",
        )


def _sha256(file: RepoFile) -> str | None:
    return file.lfs.sha256 if file.lfs is not None else None


def _is_there(parcel: Parcel, name: str, remote: RepoFile | None) -> bool:
    path = parcel.folder / name
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is not None:
        signed = {entry.name: entry.sha256 for entry in parcel.manifest.files}.get(name)
        return remote.lfs.sha256 == (signed or hashlib.sha256(path.read_bytes()).hexdigest())
    data = path.read_bytes()
    # What git calls a file: not for security, and nothing else is told about files outside LFS.
    return remote.blob_id == hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


def _stale(parcel: Parcel, location: Location, head: Head, old: Manifest | None) -> list[str]:
    """Return what the version before listed and the new one does not: it is deleted in the same commit."""
    ours = {entry.name for entry in old.files} if old is not None else set()
    ours |= {
        path.removeprefix(location.key(""))
        for path in head.files
        if path.startswith(location.key("")) and fnmatchcase(path.removeprefix(location.key("")), FIGURES)
    }
    gone = ours - set(parcel.names)
    return sorted(name for name in gone if location.key(name) in head.files)


def _additions(parcel: Parcel, location: Location, names: list[str]) -> Iterator[CommitOperationAdd]:
    """Yield the files to send, each known to be the one that was packed.

    Raises:
        ManifestError: One is not.
    """
    signed = {entry.name: entry.sha256 for entry in parcel.manifest.files}
    for name in names:
        path = parcel.folder / name
        small = path.stat().st_size <= _SMALL_BYTES
        # A small one is read once: what is checked is what is sent.
        add = CommitOperationAdd(
            path_in_repo=location.key(name), path_or_fileobj=path.read_bytes() if small else str(path)
        )
        digest = signed.get(name)
        if digest is not None:
            if not getattr(add.upload_info, "is_hashed", True) and parcel.stamps.get(name) == stamp(path):
                add.upload_info.sha256 = bytes.fromhex(digest)
            if add.upload_info.sha256.hex() != digest:
                raise _changed(name)
        if name == MANIFEST_NAME and path.read_bytes() != parcel.manifest.to_bytes():
            raise _changed(name)
        if name == ENVELOPE_NAME:
            opened = open_envelope(path.read_bytes(), payload_type=MANIFEST_TYPE, signer=None)
            if opened.payload != parcel.manifest.to_bytes():
                raise _changed(name)
        yield add


def _changed(name: str) -> ManifestError:
    return ManifestError(
        f"{name} changed while it was being pushed: nothing was committed", hint="let saves end first, then push again"
    )


def _commit(
    api: HfApi,
    parcel: Parcel,
    location: Location,
    head: Head,
    changed: list[str],
    stale: list[str],
    message: str,
    progress: Progress | None,
) -> str:
    """Send what changed, then show all of it at once; return the new commit."""
    additions = list(_additions(parcel, location, changed))
    with without_bars() if progress is not None else nullcontext():
        _preupload(api, location, head, additions, progress)
        for name, before in parcel.stamps.items():
            if name in changed and stamp(parcel.folder / name) != before:
                raise _changed(name)
        operations: list[CommitOperation] = [
            *additions,
            *(CommitOperationDelete(location.key(name), is_folder=False) for name in stale),
        ]
        try:
            # The parent keeps two pushes apart: the second is refused, whatever it was about to change.
            info = ask(
                lambda: api.create_commit(
                    location.root,
                    operations,
                    commit_message=message,
                    revision=head.branch,
                    parent_commit=head.commit,
                    num_threads=_THREADS,
                )
            )
        except FAILED as error:
            commit = _landed(api, parcel, location, head, stale)
            if commit is None:
                raise error
            return commit
    missing = _missing(parcel, location, list_files(api, location, info.oid), stale)
    if missing:
        raise StoreError(
            f"{location} was changed, but not as asked: {', '.join(missing[:5])}",
            hint="look at the repo's .gitignore, then push again",
        )
    return str(info.oid)


def _preupload(
    api: HfApi, location: Location, head: Head, additions: list[CommitOperationAdd], progress: Progress | None
) -> None:
    """Send the large files, which nobody sees before the commit; a few at a time where progress is shown."""
    left = iter(additions)
    while some := list(islice(left, _THREADS if progress is not None else None)):
        ask(
            lambda some=some: api.preupload_lfs_files(  # type: ignore[misc]
                location.root, additions=some, revision=head.branch, free_memory=False, num_threads=_THREADS
            )
        )
        for add in some if progress is not None else ():
            progress(add.path_in_repo, add.upload_info.size)  # type: ignore[misc]


def _missing(parcel: Parcel, location: Location, files: Mapping[str, RepoFile], stale: list[str]) -> list[str]:
    wrong = [name for name in parcel.names if not _is_there(parcel, name, files.get(location.key(name)))]
    return wrong + [name for name in stale if location.key(name) in files]


def _landed(api: HfApi, parcel: Parcel, location: Location, head: Head, stale: list[str]) -> str | None:
    """Return the commit that holds all of it, if the answer to a push that went through was lost."""
    try:
        branches = {ref.name: ref.target_commit for ref in api.list_repo_refs(location.root).branches}
        commit = branches.get(head.branch)
        if commit is None or commit == head.commit:
            return None
        return None if _missing(parcel, location, list_files(api, location, commit), stale) else commit
    except FAILED:
        return None
