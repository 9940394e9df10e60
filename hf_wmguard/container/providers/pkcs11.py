"""A key in a PKCS#11 token: ``pkcs11:token=LABEL;object=LABEL?pin-source=file:PATH&module-path=LIBRARY``.

The token holds an AES key that cannot be extracted, and encrypts with AES-GCM: model and set id are associated data.

Source: RFC 7512 for the URI.
Deviation: ``pin-source`` may also be ``env:NAME``; a PIN in the URI (``pin-value``) is refused, because references are
    written into configs and logs. Without ``module-path`` the library is in ``PKCS11_MODULE``.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hf_wmguard.canonical import canonical_json
from hf_wmguard.container.services import missing, no_such_key, refused, unavailable
from hf_wmguard.errors import ConfigError, KeyFormatError, NotFoundError
from hf_wmguard.keys import read_reference

KIND = "pkcs11"
_PATH = frozenset({"token", "object", "id", "serial"})
_NONCE_BYTES = 12


class Pkcs11:
    """An AES key in a token; a `WrappingService`.

    Args:
        uri: What stands behind ``pkcs11:``.
    Raises:
        ConfigError: Not such a URI.
    """

    kind = KIND

    def __init__(self, uri: str) -> None:
        path, _, query = uri.partition("?")
        self._where = _attributes(path, ";", _PATH)
        options = _attributes(query, "&", {"pin-source", "module-path"}) if query else {}
        if not {"token", "serial"} & self._where.keys() or not {"object", "id"} & self._where.keys():
            raise ConfigError("pkcs11: no token or no key", hint="write pkcs11:token=LABEL;object=LABEL?pin-source=...")
        # Order and library differ between machines; the key does not.
        self.name = ";".join(f"{name}={value}" for name, value in sorted(self._where.items()))
        self._pin_source = options.get("pin-source")
        self._module = options.get("module-path")

    def wrap(self, key: bytes, context: Mapping[str, str]) -> bytes:
        """Return a nonce and the key encrypted by the token; errors as `WrappingService.wrap`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._crypt("wrap", key, nonce, context)

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return the key decrypted by the token; errors as `WrappingService.unwrap`."""
        return self._crypt("unwrap", wrapped[_NONCE_BYTES:], wrapped[:_NONCE_BYTES], context)

    def _crypt(self, verb: str, data: bytes, nonce: bytes, context: Mapping[str, str]) -> bytes:
        try:
            import pkcs11
        except ImportError:
            raise missing(KIND, "python-pkcs11") from None
        module = self._module or os.environ.get("PKCS11_MODULE")
        if not module:
            raise ConfigError("pkcs11: no library", hint="add module-path=LIBRARY to the URI, or set PKCS11_MODULE")
        if not Path(module).is_file():
            raise NotFoundError(f"pkcs11: no library at {module}", hint="check module-path")
        pin = _pin(self._pin_source)
        problems = pkcs11.exceptions
        parameters = pkcs11.GCMParams(nonce, canonical_json(dict(context)), 128)
        options = {"mechanism": pkcs11.Mechanism.AES_GCM, "mechanism_param": parameters}
        try:
            with self._key(pkcs11, module, pin) as key:
                return bytes(key.encrypt(data, **options) if verb == "wrap" else key.decrypt(data, **options))
        except (
            problems.NoSuchToken,
            problems.NoSuchKey,
            problems.MultipleObjectsReturned,
            problems.MultipleTokensReturned,
        ):
            raise no_such_key(KIND) from None
        except (
            problems.DeviceError,
            problems.DeviceRemoved,
            problems.DeviceMemory,
            problems.HostMemory,
            problems.SessionCount,
            problems.TokenNotPresent,
        ) as error:
            raise unavailable(KIND, type(error).__name__) from None
        except problems.PKCS11Error as error:
            # A wrong PIN, a key that may not do this, a changed tag: which of them is for the token to say.
            raise refused(KIND, verb, type(error).__name__) from None
        except RuntimeError:
            raise NotFoundError("pkcs11: the library cannot be loaded", hint="check module-path") from None

    @contextmanager
    def _key(self, pkcs11: Any, module: str, pin: str | None) -> Iterator[Any]:
        library = pkcs11.lib(module)
        where: dict[str, Any] = {}
        if "token" in self._where:
            where["token_label"] = unquote(self._where["token"])
        if "serial" in self._where:
            where["token_serial"] = unquote(self._where["serial"]).encode()
        what: dict[str, Any] = {"object_class": pkcs11.ObjectClass.SECRET_KEY}
        if "object" in self._where:
            what["label"] = unquote(self._where["object"])
        if "id" in self._where:
            what["id"] = unquote(self._where["id"], encoding="latin-1").encode("latin-1")
        with library.get_token(**where).open(user_pin=pin) as session:
            yield session.get_key(**what)


def _attributes(text: str, separator: str, known: set[str] | frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(separator):
        name, equals, value = part.partition("=")
        if name == "pin-value":
            raise ConfigError(
                "pkcs11: the PIN stands in the URI", hint="write pin-source=file:PATH or pin-source=env:NAME"
            )
        # The value is not repeated: it may be a PIN in the wrong place.
        if name not in known or not equals or not re.fullmatch(r"[\x21-\x7e]+", value) or name in found:
            raise ConfigError(
                "pkcs11: an attribute that is unknown, empty or given twice",
                hint=f"known: {', '.join(sorted(known))}; see RFC 7512",
            )
        found[name] = value
    return found


def _pin(source: str | None) -> str | None:
    if source is None:
        return None
    source = unquote(source)
    if source.startswith("env:"):
        value = os.environ.get(source.removeprefix("env:"))
        if value is None:
            raise NotFoundError(
                f"pkcs11: environment variable {source.removeprefix('env:')} is not set", hint="set the PIN"
            )
        return value
    if source.startswith("file:"):
        try:
            return read_reference(source, what="PIN", private=True).decode().strip("\r\n")
        except UnicodeDecodeError:
            raise KeyFormatError("pkcs11: the PIN is not text", hint="write the PIN on one line") from None
    raise ConfigError("pkcs11: pin-source is not a reference", hint="write pin-source=file:PATH or pin-source=env:NAME")
