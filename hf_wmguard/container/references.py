"""From a reference to a key: one entry per scheme.

Nothing here contacts a service: that happens when a key is wrapped or unwrapped.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Protocol

from hf_wmguard.container.hybrid import HYBRID_KIND, HybridIdentity, HybridRecipient
from hf_wmguard.container.lines import KEYGEN, identity_prefix, recipient_prefix
from hf_wmguard.container.passphrase import load_passphrase
from hf_wmguard.container.providers.awskms import AwsKms
from hf_wmguard.container.providers.azurekv import AzureKeyVault
from hf_wmguard.container.providers.gcpkms import GcpKms
from hf_wmguard.container.providers.keyring import read_entry
from hf_wmguard.container.providers.pkcs11 import Pkcs11
from hf_wmguard.container.providers.vault import Vault
from hf_wmguard.container.services import ServiceKey, WrappingService
from hf_wmguard.container.stanzas import Identity, Recipient
from hf_wmguard.container.symmetric import RawKey
from hf_wmguard.container.x25519 import X25519Identity, X25519Recipient
from hf_wmguard.errors import ConfigError, KeyFormatError
from hf_wmguard.keys import read_reference


class Wrapping(Recipient, Identity, Protocol):
    """A key that both wraps and unwraps."""


# In this order: a line that begins like neither is an error of the first, ordinary kind.
_RECIPIENT_LINES: Mapping[str, Callable[[str], Recipient]] = {
    recipient_prefix(HYBRID_KIND): HybridRecipient.parse,
    "": X25519Recipient.parse,
}
_IDENTITY_LINES: Mapping[str, Callable[[str], Identity]] = {
    identity_prefix(HYBRID_KIND): HybridIdentity.parse,
    "": X25519Identity.parse,
}


def _service(make: Callable[[str], WrappingService]) -> Callable[[str], Wrapping]:
    return lambda rest: ServiceKey(make(rest))


SYMMETRIC: Mapping[str, Callable[[str], Wrapping]] = {
    "awskms": _service(AwsKms),
    "azurekv": _service(AzureKeyVault),
    "gcpkms": _service(GcpKms),
    "passphrase": load_passphrase,
    "pkcs11": _service(Pkcs11),
    "rawkey": lambda rest: RawKey(read_reference(rest, what="raw key", private=True)),
    "vault": _service(Vault),
}
RECIPIENTS: Mapping[str, Callable[[str], Recipient]] = {
    "env": lambda rest: _recipient_of(_read_line(f"env:{rest}", what="recipient", private=False)),
    "file": lambda rest: _recipient_of(_read_line(f"file:{rest}", what="recipient", private=False)),
    "keyring": lambda rest: _keyring_recipient(read_entry(rest, "recipient")),
    **SYMMETRIC,
    "passphrase": lambda rest: load_passphrase(rest, new=True),
}
IDENTITIES: Mapping[str, Callable[[str], Identity]] = {
    "env": lambda rest: _identity_of(_read_line(f"env:{rest}", what="identity", private=True)),
    "file": lambda rest: _identity_of(_read_line(f"file:{rest}", what="identity", private=True)),
    "keyring": lambda rest: _keyring_identity(read_entry(rest, "identity")),
    **SYMMETRIC,
}


def load_recipient(ref: str) -> Recipient:
    """Return the recipient a reference points to.

    Raises:
        ConfigError: The reference has no known scheme, or is malformed.
        KeyFormatError, KeyPermissionError, NotFoundError: The key cannot be read, or is none.
        KeyServiceError, MissingDependencyError: A keyring that does not answer, a package that is not installed.
    """
    scheme, rest = _split(ref, "recipient", RECIPIENTS)
    return RECIPIENTS[scheme](rest)


def load_identity(ref: str) -> Identity:
    """Return the identity a reference points to; errors as `load_recipient`."""
    scheme, rest = _split(ref, "identity", IDENTITIES)
    return IDENTITIES[scheme](rest)


def symmetric_key(ref: str, *, new: bool = False) -> Wrapping:
    """Return the key a reference points to, of those that both wrap and unwrap; errors as `load_recipient`.

    Args:
        ref: The reference.
        new: Whether it is going to wrap: a person who is asked for a passphrase types it twice.
    """
    scheme, rest = _split(ref, "sealing key", SYMMETRIC)
    return load_passphrase(rest, new=new) if scheme == "passphrase" else SYMMETRIC[scheme](rest)


def _split(ref: str, what: str, known: Mapping[str, object]) -> tuple[str, str]:
    scheme, colon, rest = ref.partition(":")
    if not colon or scheme not in known or not rest:
        # The reference itself is not repeated: somebody may have pasted a key where a reference belongs.
        raise ConfigError(
            f"{what}: not a key reference; expected one of {', '.join(f'{name}:' for name in sorted(known))}",
            hint="write file:PATH or another reference, never the key itself; see docs/keys.md",
        )
    return scheme, rest


def _read_line(ref: str, *, what: str, private: bool) -> str:
    try:
        return read_reference(ref, what=what, private=private).decode("ascii")
    except UnicodeDecodeError:
        raise KeyFormatError(f"{what}: not a line of text; an owner key is not {what}", hint=KEYGEN) from None


def _recipient_of(text: str) -> Recipient:
    return next(parse for prefix, parse in _RECIPIENT_LINES.items() if text.strip().startswith(prefix))(text)


def _identity_of(text: str) -> Identity:
    return next(parse for prefix, parse in _IDENTITY_LINES.items() if text.strip().startswith(prefix))(text)


def _keyring_recipient(text: str) -> Recipient:
    if text.startswith("wmguard-identity-"):
        identity = _identity_of(text)
        return identity.recipient()  # type: ignore[attr-defined,no-any-return]
    return _recipient_of(text) if text.startswith("wmguard-") else RawKey(decode_entry(text, "recipient"))


def _keyring_identity(text: str) -> Identity:
    return _identity_of(text) if text.startswith("wmguard-") else RawKey(decode_entry(text, "identity"))


def decode_entry(text: str, what: str) -> bytes:
    """Return the key that a keyring entry holds in base64.

    Raises:
        KeyFormatError: Not base64. The text is not repeated.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise KeyFormatError(
            f"{what}: the keyring's entry is not a key", hint="store a line of wmguard keygen, or 32 bytes in base64"
        ) from None
