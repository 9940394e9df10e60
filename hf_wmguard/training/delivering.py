"""Deliver what a guarded model saved: the one place where training meets the stores."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_wmguard.delivery.hub import open_hub
from hf_wmguard.delivery.pushing import push
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.errors import ExposureError, UnsupportedError, WmguardError
from hf_wmguard.stores.location import Location

DELIVERY = "delivery"
"""Folder in the output folder for a finished model that is sent, or waits to be."""


def deliver_folder(folder: Path, location: Location, *, allow_public: bool) -> Pushed:
    """Send a protected folder that nobody writes into now, with a card; it stays in any case.

    Raises:
        WmguardError: As `push`; its hint says how to send the folder later.
    """
    try:
        return push(folder, str(location), allow_public=allow_public)
    except WmguardError as error:
        raise later(error, folder, location) from error


def push_saved(folder: Path, repo: str, options: Mapping[str, Any], *, allow_public: bool) -> Pushed:
    """Push a folder that was just saved, with the options of ``model.push_to_hub``.

    Raises:
        UnsupportedError: A pull request is asked for.
        WmguardError: As `push`.
    """
    if options.get("create_pr"):
        raise UnsupportedError("create_pr is not supported: a push is one commit to a branch", hint="name a revision")
    token = options.get("token")
    token = token if isinstance(token, str) else None
    check_private(options.get("private"), allow_public)
    location = open_hub(repo, revision=options.get("revision"), allow_public=allow_public, token=token)
    message = options.get("commit_message") or "Upload model"
    tags = tuple(options.get("tags") or ())
    return push(folder, str(location), tags=tags, allow_public=allow_public, commit_message=message, token=token)


def check_private(private: object, allow_public: bool) -> None:
    """Refuse a wish for a public repo, unless public ones are allowed; even then a new one is made private.

    Raises:
        ExposureError: It is refused.
    """
    if private is False and not allow_public:
        raise ExposureError(
            "a public repo is asked for",
            hint="leave out private=False (hub_private_repo), or set protection.allow_public",
        )


def later(error: WmguardError, folder: Path, location: Location) -> WmguardError:
    """Return the same error with a hint how to send a folder that is whole on the disk."""
    command = shlex.join(["wmguard", "push", str(folder), str(location)])
    return type(error)(error.message, hint=f"{error.hint}; {command} sends what was saved")


def save_finished(folder: Path, model: Any, processing_class: Any) -> None:
    """Save a guarded model and its tokenizer."""
    model.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
