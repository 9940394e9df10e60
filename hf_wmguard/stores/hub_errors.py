"""What the Hub's client raises, under this package's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_wmguard.errors import ConfigError, NotFoundError, StoreError, WmguardError

try:
    import httpx2 as httpx
except ImportError:
    # Before version 2 huggingface_hub was built on httpx itself.
    import httpx  # type: ignore[no-redef]

TRANSPORT_ERRORS = (httpx.TransportError, httpx.StreamError)
"""The connection failed or was cut: worth another try."""
_LOGIN = "check its name; for a private one run hf auth login or set HF_TOKEN, with a token that may see it"
# What to do, by HTTP status.
_HINTS = {
    400: "the Hub does not accept the request as it is: update huggingface_hub, or see what it says",
    401: "run hf auth login, or set HF_TOKEN to a token that is valid",
    403: "use a token that may write here; a fine-grained token needs access to this repo",
    409: "somebody else is changing the repo: try again",
    412: "somebody else has changed the repo meanwhile: look at it, and run the command again",
    413: "the Hub refuses files of this size: protect with --max-shard-size",
    429: "the Hub limits requests: wait, and run the same command again",
}
_SERVER = "the Hub has trouble of its own: run the same command again later"


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Raise what goes wrong with the Hub as an error of this package.

    Args:
        where: What is being asked, for messages.
    Raises:
        NotFoundError: No such repo, revision or file, or none that this token may see.
        ConfigError: A name that cannot be one of the Hub's.
        StoreError: Anything else.
    """
    try:
        yield
    # Most special first: all of these are of the same few classes.
    except OfflineModeIsEnabled:
        raise StoreError(f"{where} is not asked: HF_HUB_OFFLINE is set", hint="unset it to reach the Hub") from None
    except LocalTokenNotFoundError:
        raise StoreError(f"no token for {where}", hint=_HINTS[401]) from None
    except HFValidationError:
        raise ConfigError(f"{where} is not a name that the Hub knows", hint="write hub://org/name") from None
    except GatedRepoError:
        raise NotFoundError(
            f"{where} is gated", hint="ask for access on its page, and use that account's token"
        ) from None
    except RepositoryNotFoundError:
        raise NotFoundError(f"{where} does not exist, or is hidden from this token", hint=_LOGIN) from None
    except RevisionNotFoundError:
        raise NotFoundError(f"{where}: no such revision", hint="give a branch, tag or commit of this repo") from None
    except EntryNotFoundError:
        raise NotFoundError(f"{where}: no such file", hint="the repo has changed, or its listing is wrong") from None
    except HfHubHTTPError as error:
        raise of_status(where, error.response.status_code, error.server_message) from None
    except httpx.HTTPError as error:
        raise StoreError(
            f"{where} cannot be reached: {type(error).__name__}",
            hint="check the network, HF_ENDPOINT and proxies; an interrupted transfer goes on where it was",
        ) from None
    except (KeyError, TypeError, ValueError):
        # What the client makes of a web page, or of JSON that is not what it expects. Not repeated: a stranger's words.
        raise StoreError(
            f"{where} answers with something that is none of the Hub's answers",
            hint="check HF_ENDPOINT, and proxies or login pages in between",
        ) from None
    except RuntimeError as error:
        # A transfer by hf_xet that breaks off is one of these.
        raise StoreError(
            f"{where}: the transfer broke off ({type(error).__name__})",
            hint="check free space, and run the same command again: what has arrived is not fetched twice",
        ) from None


def of_status(where: str, status: int, says: str | None = None) -> WmguardError:
    """Return the error for an HTTP status, with what the server says of it."""
    # A stranger's words: one short line of them.
    said = f": {' '.join(says.split())[:200]}" if says else ""
    hint = _HINTS.get(status, _SERVER if status >= 500 else "see what the server says")
    return StoreError(f"{where} answers HTTP {status}{said}", hint=hint)
