"""Talk to the Hub through its own client, patiently, and say in named errors what went wrong.

Endpoint, token and offline mode are the client's: ``HF_ENDPOINT``, ``HF_TOKEN`` or what ``hf auth login`` stored,
``HF_HUB_OFFLINE``. Its error messages are not repeated: the addresses in them may be signed, and open what they name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_wmguard.errors import EnvironmentFault, StoreError
from hf_wmguard.stores.hub_errors import TRANSPORT_ERRORS, hub_errors
from hf_wmguard.stores.location import Location

T = TypeVar("T")
FAILED = (HfHubHTTPError, *TRANSPORT_ERRORS)
"""The Hub refused, or could not be asked."""
MAX_TRIES = 5
MAX_WAIT_S = 60.0
_BUSY = (408, 429, 500, 502, 503, 504)
_MAX_SAID_CHARACTERS = 200


def open_client(location: Location, token: str | None = None) -> HfApi:
    """Return the client that is to write to a place.

    Args:
        location: Where to.
        token: Instead of the client's own.
    Raises:
        StoreError: The client is offline, or has no token.
    """
    if constants.is_offline_mode():
        raise StoreError(
            f"{location} was not reached: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE to push, or push later"
        )
    if token is None and get_token() is None:
        raise StoreError(
            f"no token for {location}", hint="run hf auth login with a token that may write, or set HF_TOKEN"
        )
    return HfApi(token=token, library_name="hf-wmguard")


def ask(call: Callable[[], T]) -> T:
    """Return what a call gives, trying again a few times where the Hub is busy, as long after as it says.

    The client does so by itself for a part of its calls only.
    """
    tries = 1
    while True:
        try:
            return call()
        except HfHubHTTPError as error:
            wait = retry_after_s(error)
            if wait is None:
                wait = float(2 ** (tries - 1))
            if _status(error) not in _BUSY or tries >= MAX_TRIES or wait > MAX_WAIT_S:
                raise
        time.sleep(wait)
        tries += 1


def retry_after_s(error: HfHubHTTPError) -> float | None:
    """Return the seconds after which the Hub wants to be asked again, None where it does not say."""
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 8 else None


@contextmanager
def calling(location: Location) -> Iterator[None]:
    """Turn whatever the client raises into an error of ours.

    Raises:
        StoreError: The Hub refuses, does not answer, is busy, or somebody else has pushed meanwhile.
        NotFoundError: No such repo, or none that this token may see.
        ConfigError: A name that no repo or branch can have.
        EnvironmentFault: A local file cannot be read.
    """
    with hub_errors(str(location)):
        try:
            yield
        except (HFValidationError, OfflineModeIsEnabled, LocalTokenNotFoundError, EntryNotFoundError):
            raise
        except (*FAILED, OSError, RuntimeError, ValueError) as error:
            # Not chained: what the client says about a failed upload holds the signed address it went to.
            raise _named(location, error) from None


def _named(location: Location, error: BaseException) -> BaseException:
    """Return an error of ours, or the client's own that an upload's was made from."""
    cause = next((one for one in _chain(error) if isinstance(one, FAILED)), None)
    if isinstance(cause, HfHubHTTPError) and _status(cause) in _BUSY:
        wait = retry_after_s(cause)
        later = f"in {wait:.0f} seconds" if wait is not None else "later"
        return StoreError(
            f"the Hub is too busy for {location} (HTTP {_status(cause)})",
            hint=f"run the same command again {later}: what has arrived is not sent twice",
        )
    if cause is not None:
        return cause
    if isinstance(error, OSError) and error.filename:
        return EnvironmentFault(f"cannot read {error.filename}: {error.strerror}", hint="check the file")
    if isinstance(error, UnicodeEncodeError):
        return StoreError(f"the token for {location} is none of the Hub's", hint="set HF_TOKEN, or run hf auth login")
    if isinstance(error, json.JSONDecodeError):
        return StoreError(f"{location}: the answers are not the Hub's", hint="check HF_ENDPOINT and proxies")
    said = " ".join(str(error).split())
    if isinstance(error, ValueError) and said and "://" not in said:
        return StoreError(f"{location}: {said[:_MAX_SAID_CHARACTERS]}", hint="mend what it names, then push again")
    # An upload by hf_xet that breaks off is one of these.
    return StoreError(
        f"{location}: the transfer broke off ({type(error).__name__})",
        hint="run the same command again: what has arrived is not sent twice",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the client's own progress bars off the terminal, for whoever shows progress themselves."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
