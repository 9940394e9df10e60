"""Send a protected folder to where it is kept: one way in, whatever the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_wmguard.atomic import write_atomic
from hf_wmguard.delivery.card import write_card
from hf_wmguard.delivery.parcel import CARD_NAME, Parcel, Progress, pack
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.errors import UsageError
from hf_wmguard.evidence.manifest import MANIFEST_NAME
from hf_wmguard.stores.location import Location, parse_location

# By scheme: module and function, and the options that it alone has.
_PUSH = {
    "hub": ("hub", "push_to_hub", frozenset({"tag", "commit_message", "token"})),
    "s3": ("s3", "push_to_s3", frozenset({"kms_key", "options"})),
}


def bring_card(folder: Path, location: Location, *, token: str | None = None, tags: Sequence[str] = ()) -> None:
    """Write the card of a folder that goes to a place; where it has none, it begins from the one that is there.

    Args:
        folder: The protected folder.
        location: Where it goes.
        token: Of the Hub, instead of the client's own.
        tags: More tags for the card.
    Raises:
        NotFoundError, ManifestError, FormatError, EnvironmentFault: As `card.write_card`.
        StoreError: As `hub.fetch_card`.
    """
    if location.scheme == "hub" and not (folder / CARD_NAME).exists() and (folder / MANIFEST_NAME).is_file():
        from hf_wmguard.delivery.hub import fetch_card

        # Somebody may have written one on the website.
        there = fetch_card(location, token=token)
        if there is not None:
            write_atomic(folder / CARD_NAME, there)
    write_card(folder, address=str(location), tags=tags)


def push(
    folder: str | Path,
    uri: str,
    *,
    card: bool = True,
    tags: Sequence[str] = (),
    allow_public: bool = False,
    replace_other: bool = False,
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
        card: Bring the model card, the folder's ``README.md``, up to date before: what others wrote in it stays.
        tags: More tags for the card.
        allow_public: Send it even to where everybody can read it.
        replace_other: Send it over another signer's save, another model, or in S3 files that are no protected model.
        checked: Called with a file's name and the bytes just checked.
        started: Called with what is going to be sent.
        progress: Called with a file's name and the bytes just sent.
        options: Of one store alone: ``tag``, ``commit_message`` and ``token`` of the Hub; ``kms_key`` and ``options``
            of S3.
    Raises:
        ConfigError: Not an address.
        ManifestError: A file is not the one that was signed, or plaintext weights lie in the folder.
        ExposureError: Everybody can read what is there, or plaintext weights are there.
        OwnershipError: Something else is there.
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
    if card:
        bring_card(Path(folder), location, token=given.get("token"), tags=tags)
    parcel = pack(Path(folder), progress=checked)
    if started is not None:
        started(parcel)
    send = getattr(import_module(f"hf_wmguard.delivery.{module}"), name)
    pushed: Pushed = send(
        parcel, location, allow_public=allow_public, replace_other=replace_other, progress=progress, **given
    )
    return pushed
