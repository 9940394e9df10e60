"""The operating system's keyring: ``keyring:SERVICE/NAME``, by the package keyring.

An entry holds text: the line of an identity, or 32 bytes in base64. Put it there with ``keyring set SERVICE NAME``.
"""

from __future__ import annotations

from hf_wmguard.container.services import missing, quiet_logs, unavailable
from hf_wmguard.errors import ConfigError, NotFoundError

KIND = "keyring"


def read_entry(name: str, what: str) -> str:
    """Return the text of an entry.

    Args:
        name: ``SERVICE/NAME``; the service ends at the last slash.
        what: The thing that is looked for, for the error message.
    Raises:
        ConfigError: Not a service and a name.
        NotFoundError: No such entry.
        KeyServiceError: There is no keyring, or it stays locked.
        MissingDependencyError: The package is not installed.
    """
    service, _, user = name.rpartition("/")
    if not service or not user:
        raise ConfigError(f"{what}: not a keyring entry", hint="write keyring:SERVICE/NAME")
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        raise missing(KIND, "keyring") from None
    try:
        with quiet_logs():
            value = keyring.get_password(service, user)
    except KeyringError as error:
        raise unavailable(KIND, type(error).__name__) from None
    if value is None:
        raise NotFoundError(f"{what}: the keyring has no entry {name}", hint=f"run: keyring set {service} {user}")
    return str(value).strip()
