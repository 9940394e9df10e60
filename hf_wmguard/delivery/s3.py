"""Push a protected folder to S3: readers see the old version or the new one, whole, whenever it is interrupted.

Everything big is sent in parts that nobody sees; then, in a moment, the parts become objects under the canonical names,
manifest last; then the pointer names them. While the names are replaced, the pointer names the old version elsewhere:
the versions that the bucket keeps, or copies made inside the store. See ``docs/adr/0015-s3.md``.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from hf_wmguard.delivery.parcel import Parcel, Progress
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.delivery.s3_commit import (
    DIGEST,
    check_conditions,
    clear_old,
    entry_of,
    head,
    holds,
    remove_strays,
    step_aside,
    write_once,
    write_pointer,
)
from hf_wmguard.delivery.s3_exposure import check_not_public
from hf_wmguard.delivery.s3_parts import (
    MIN_PART_BYTES,
    PART_BYTES,
    Upload,
    begin,
    changed,
    part_size,
    send_all,
    unfinished,
)
from hf_wmguard.errors import ConfigError, ManifestError, NotFoundError, OwnershipError
from hf_wmguard.evidence.manifest import ENVELOPE_NAME, MANIFEST_NAME, MANIFEST_TYPE, Manifest, digest_file
from hf_wmguard.evidence.signing import MAX_ENVELOPE_BYTES, open_envelope
from hf_wmguard.stores.location import Location
from hf_wmguard.stores.s3 import ABSENT, CHANGED, MAX_THREADS, S3Options, S3Place, listed
from hf_wmguard.stores.s3_errors import failure
from hf_wmguard.stores.s3_pointer import KEPT, Entry, Pointer, Save, revision_of

_WEIGHTS = ".safetensors"
# Up to this a file is put in one piece, and all of these wait in memory: shards must not be among them.
_SMALL_BYTES = 1 << 20
_REPLACE = "choose another prefix, or replace what is there with --replace-other"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is sent, and what was there when the push began, by name: of the old version's files too."""

    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    found: Mapping[str, Any]
    same: frozenset[str]
    extra: Mapping[str, Any]
    part_bytes: int
    threads: int
    progress: Progress | None

    def uploads(self, parcel: Parcel, location: Location) -> list[Upload]:
        return [
            Upload(
                name=name,
                path=parcel.folder / name,
                key=location.key(name),
                size_bytes=size,
                sha256=self.digests[name],
                stamp=parcel.stamps.get(name),
                part_bytes=part_size(size, self.part_bytes),
            )
            for name, size in self.sizes.items()
            if size > _SMALL_BYTES and name not in self.same
        ]

    def told(self, name: str, sha256: str) -> dict[str, Any]:
        return {"Metadata": {DIGEST: sha256}, **self.extra}


def push_to_s3(
    parcel: Parcel,
    location: Location,
    *,
    options: S3Options | None = None,
    kms_key: str | None = None,
    allow_public: bool = False,
    replace_other: bool = False,
    threads: int = 8,
    part_bytes: int = PART_BYTES,
    progress: Progress | None = None,
) -> Pushed:
    """Make a packed folder the version that readers of a prefix see; pushing the same again sends nothing.

    Args:
        parcel: What `pack` found fit to be sent.
        location: Bucket and prefix.
        options: How S3 is asked.
        kms_key: Id, ARN or alias of a KMS key with which S3 encrypts once more; by default as the bucket does.
        allow_public: Push to a bucket that everybody may read.
        replace_other: Push over another signer's save, another model, or files that are no protected model.
        threads: How many parts are sent at once, 1 to 16. Each takes ``part_bytes`` of memory.
        part_bytes: Of a part, at least 5 MiB; files of more than 10,000 parts have larger ones.
        progress: Called with a file's name and the bytes that are there, from this thread.
    Raises:
        ExposureError: The bucket is public.
        OwnershipError: Something else is there.
        ManifestError: A file was changed meanwhile.
        StoreError: S3 refuses, does not answer, or somebody else pushed meanwhile.
        NotFoundError: No such bucket.
    """
    if not 1 <= threads <= MAX_THREADS or part_bytes < MIN_PART_BYTES:
        raise ConfigError(
            f"S3 threads {threads}, part_bytes {part_bytes}",
            hint=f"1 to {MAX_THREADS} threads, parts of at least {MIN_PART_BYTES} bytes",
        )
    extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
    with closing(S3Place(location, options)) as place:
        unchecked = check_not_public(place, allow_public=allow_public)
        notes: list[str] = []
        pointer, etag = _present(place, parcel, replace_other, notes)
        if not replace_other:
            _check_ours(place, pointer, parcel)
        plan = _plan(place, parcel, _replaced(pointer), extra, part_bytes, threads, progress)
        revision = revision_of(plan.digests)
        if not _is_done(pointer, revision, plan):
            uploads = _send(place, parcel, plan)
            pointer = _commit(place, parcel, plan, uploads, pointer, etag, notes)
            skipped = [*plan.same, *(one.name for one in uploads if one.reused_bytes == one.size_bytes)]
        else:
            skipped = list(parcel.names)
        if pointer is not None:
            notes += clear_old(place, pointer, lambda: _dead_uploads(place, parcel))
    return Pushed(
        uri=str(location),
        revision=revision,
        files=parcel.names,
        size_bytes=sum(plan.sizes.values()),
        skipped=tuple(name for name in parcel.names if name in skipped),
        left_out=parcel.left_out,
        unchecked=unchecked,
        notes=tuple(notes),
    )


def _present(
    place: S3Place, parcel: Parcel, replace_other: bool, notes: list[str]
) -> tuple[Pointer | None, str | None]:
    """Return the pointer; where there is none but a protected folder is, one that names its files as they are.

    Raises:
        OwnershipError: Files are there that are no protected model, and are not to be replaced.
    """
    pointer, etag = place.read_pointer()
    if pointer is not None:
        return pointer, etag
    try:
        # What lies in folders below may be other models, and is nobody's business here.
        entries = {name: entry for name, entry in listed(place).items() if "/" not in name or name in parcel.names}
    except NotFoundError:
        return None, None
    others = [name for name in entries if name not in parcel.names]
    if others:
        notes.append(f"not of this folder, and left where it is: {', '.join(others[:5])}")
    if not {ENVELOPE_NAME, MANIFEST_NAME} <= entries.keys():
        if entries and not replace_other:
            raise OwnershipError(f"{place.location} holds files that are no protected model", hint=_REPLACE)
        # No copy is kept of what may be plaintext.
        return None, None
    revision = revision_of({name: entry.etag for name, entry in entries.items()})
    found = Save(revision=revision, entries=tuple(entries.values()))
    return Pointer(current=found, previous=None, push="", done=True, writes=()), None


def _check_ours(place: S3Place, pointer: Pointer | None, parcel: Parcel) -> None:
    """Check that a push replaces nothing but an earlier save of the same signer's same model.

    Raises:
        OwnershipError: It would.
    """
    if pointer is None or pointer.current is None:
        return
    entries = pointer.current.files()
    if not {ENVELOPE_NAME, MANIFEST_NAME} <= entries.keys():
        raise OwnershipError(f"{place.location} holds files that are no protected model", hint=_REPLACE)
    try:
        opened = open_envelope(_read(place, entries[ENVELOPE_NAME]), payload_type=MANIFEST_TYPE, signer=None)
        manifest = Manifest.from_bytes(opened.payload)
    except ManifestError as error:
        raise OwnershipError(
            f"{place.location} holds an envelope that does not hold: {error.message}", hint=_REPLACE
        ) from None
    if (opened.key_id, manifest.model_id) != (parcel.signer, parcel.manifest.model_id):
        raise OwnershipError(
            f"{place.location} holds {manifest.model_id} signed by {opened.key_id}, not {parcel.manifest.model_id} "
            f"signed by {parcel.signer}",
            hint=_REPLACE,
        )


def _read(place: S3Place, entry: Entry) -> bytes:
    version = {"VersionId": entry.version} if entry.version else {}
    key = place.location.key(entry.key)
    answer = place.call("get_object", allow=(*ABSENT, *CHANGED), Key=key, IfMatch=entry.etag, **version)
    if answer is None:
        raise OwnershipError(
            f"{entry.name} in {place.location} was replaced by something else than a push", hint=_REPLACE
        )
    try:
        with closing(answer["Body"]) as body:
            data: bytes = body.read(MAX_ENVELOPE_BYTES + 1)
    except place.cut as error:
        raise failure(str(place.location), error) from None
    return data


def _replaced(pointer: Pointer | None) -> set[str]:
    """Return the names of the version that is there, and of a push that was interrupted while it wrote them."""
    if pointer is None or not pointer.push:
        return set()
    return {*(pointer.current.files() if pointer.current else ()), *pointer.writes}


def _plan(
    place: S3Place,
    parcel: Parcel,
    replaced: set[str],
    extra: Mapping[str, Any],
    part_bytes: int,
    threads: int,
    progress: Progress | None,
) -> _Plan:
    signed = {entry.name: entry for entry in parcel.manifest.files}
    # Only sizes and digests are looked at: no entry may be called as the manifest is.
    files = {name: signed.get(name) or digest_file(parcel.folder / name, "unsigned") for name in parcel.names}
    with ThreadPoolExecutor(threads) as pool:
        names = sorted(replaced.union(parcel.names))
        found = dict(zip(names, pool.map(lambda name: head(place, place.location.key(name)), names), strict=True))
    same = {name for name, file in files.items() if holds(found[name], file.size_bytes, file.sha256, extra)}
    return _Plan(
        sizes={name: file.size_bytes for name, file in files.items()},
        digests={name: file.sha256 for name, file in files.items()},
        found=found,
        same=frozenset(same),
        extra=extra,
        part_bytes=part_bytes,
        threads=threads,
        progress=progress,
    )


def _is_done(pointer: Pointer | None, revision: str, plan: _Plan) -> bool:
    """Return whether readers see this very version already, under its canonical names."""
    if pointer is None or not pointer.done or pointer.current is None or pointer.current.revision != revision:
        return False
    entries = pointer.current.files()
    return plan.sizes.keys() == entries.keys() == plan.same and all(
        entry.etag == plan.found[name]["ETag"] for name, entry in entries.items()
    )


def _send(place: S3Place, parcel: Parcel, plan: _Plan) -> list[Upload]:
    uploads = plan.uploads(parcel, place.location)
    there = unfinished(place, place.location.key("")) if uploads else {}
    for upload in uploads:
        begin(place, upload, there.get(upload.key, ()), plan.told(upload.name, upload.sha256))
    send_all(place, uploads, threads=plan.threads, progress=plan.progress)
    return uploads


def _commit(
    place: S3Place,
    parcel: Parcel,
    plan: _Plan,
    uploads: list[Upload],
    before: Pointer | None,
    etag: str | None,
    notes: list[str],
) -> Pointer:
    """Let the new version take its place. Until the last line readers see the old one."""
    sent = {upload.name: upload for upload in uploads}
    small = {name: _read_small(parcel, plan, name) for name in plan.sizes if name not in sent and name not in plan.same}
    current = before.current if before else None
    names = set(parcel.names)
    if current is not None:
        touched = {name for name in plan.found if name in sent or name in small or name not in names}
        current = step_aside(place, current, touched, plan.found, plan.extra)
    claim = Pointer(
        current=current,
        previous=before.previous if before else None,
        push=secrets.token_hex(16),
        done=False,
        writes=parcel.names,
    )
    etag = write_pointer(place, claim, etag, plan.extra)
    check_conditions(place, claim, plan.extra)
    # Side by side: each takes the store a while, and meanwhile the names are a mix of two versions.
    with ThreadPoolExecutor(plan.threads) as pool:
        shown = dict(zip(sent, pool.map(lambda upload: _complete(place, plan, upload), uploads), strict=True))
    entries = []
    for name in parcel.names:
        told = (name, plan.found[name], plan.sizes[name], plan.digests[name])
        if name in sent:
            entries.append(shown[name])
        elif name in plan.same:
            entries.append(entry_of(name, *told))
        else:
            request = {"Body": small[name], "ChecksumAlgorithm": "SHA256", **plan.told(name, plan.digests[name])}
            entries.append(write_once(place, "put_object", *told, **request))
        if name not in sent and plan.progress is not None:
            plan.progress(name, plan.sizes[name])
    notes += [
        f"{name} of an earlier version could not be deleted: delete it, or a plain copy of the folder is refused"
        for name in remove_strays(place, {name: plan.found[name] for name in _replaced(before) - names})
    ]
    new = Save(revision=revision_of(plan.digests), entries=tuple(entries))
    done = Pointer(current=new, previous=_other(new, current, claim.previous), push=claim.push, done=True, writes=())
    write_pointer(place, done, etag, plan.extra)
    return done


def _complete(place: S3Place, plan: _Plan, upload: Upload) -> Entry:
    parts = {"Parts": [upload.parts[number] for number in sorted(upload.parts)]}
    told = (upload.name, plan.found[upload.name], upload.size_bytes, upload.sha256)
    return write_once(place, "complete_multipart_upload", *told, UploadId=upload.upload_id, MultipartUpload=parts)


def _other(new: Save, *saves: Save | None) -> Save | None:
    """Return what readers may still be reading: the version before, or the one before that where it is the same."""
    return next((save for save in saves if save is not None and save.revision != new.revision), None)


def _read_small(parcel: Parcel, plan: _Plan, name: str) -> bytes:
    try:
        data = (parcel.folder / name).read_bytes()
    except OSError as error:
        raise NotFoundError(f"cannot read {name}: {error.strerror}", hint="check its permissions") from None
    if hashlib.sha256(data).hexdigest() != plan.digests[name]:
        raise changed(name)
    return data


def _dead_uploads(place: S3Place, parcel: Parcel) -> dict[str, list[str]]:
    """Return the uploads of this folder that nobody will finish: whoever sends them fails, for this push came first."""
    prefix = place.location.key("")
    found = {}
    for key, ids in unfinished(place, prefix).items():
        name = key.removeprefix(prefix)
        if name in parcel.names or name.startswith(KEPT) or ("/" not in name and name.endswith(_WEIGHTS)):
            found[key] = ids
    return found
