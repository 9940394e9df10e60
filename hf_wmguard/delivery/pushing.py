"""Send a protected folder to where it is kept: one way in, whatever the store."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_wmguard.delivery.parcel import Parcel, Progress, pack
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.errors import UsageError
from hf_wmguard.stores.location import parse_location

# By scheme: module and function, and the options that it alone has.
_PUSH = {
    "hub": ("hub", "push_to_hub", frozenset({"tag", "commit_message", "token"})),
    "s3": ("s3", "push_to_s3", frozenset({"kms_key", "keep"})),
}


def push(
    folder: str | Path,
    uri: str,
    *,
    allow_public: bool = False,
    checked: Progress | None = None,
    started: Callable[[Parcel], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Pushed:
    """Send a protected folder: ciphertext, manifest, envelope, recipients, config, tokenizer and card, nothing else.

    Readers see the old version or the new one, whole, at every moment, and after a push that was killed as well.

    Args:
        folder: The protected folder; every signed file is checked before anything is sent.
        uri: ``hub://org/name`` (``@branch``) or ``s3://bucket/prefix``.
        allow_public: Send it even to where everybody can read it.
        checked: Called with a file's name and the bytes just checked.
        started: Called with what is going to be sent.
        progress: Called with a file's name and the bytes just sent.
        options: Of one store alone: ``tag``, ``commit_message`` and ``token`` of the Hub; ``kms_key`` and ``keep`` of
            S3.
    Raises:
        ConfigError: Not an address.
        ManifestError: A file is not the one that was signed, or plaintext weights lie in the folder.
        ExposureError: Everybody can read what is there, or plaintext weights are there.
        OwnershipError: Another model is there.
        StoreError: The store refuses, does not answer, or somebody else has pushed meanwhile.
        UsageError: An option that this store does not have.
    """
    location = parse_location(uri)
    module, name, own = _PUSH[location.scheme]
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - own):
        raise UsageError(
            f"{location.scheme}:// has no option {', '.join(unknown)}", hint=f"it has {', '.join(sorted(own))}"
        )
    parcel = pack(Path(folder), progress=checked)
    if started is not None:
        started(parcel)
    send = getattr(import_module(f"hf_wmguard.delivery.{module}"), name)
    pushed: Pushed = send(parcel, location, allow_public=allow_public, progress=progress, **given)
    return pushed
