"""Owner keys that do not lie in plaintext: in the keyring, or sealed in a file by a passphrase or a key service.

``file:PATH`` and ``env:NAME`` are read by `hf_wmguard.keys`. Here come

- ``keyring:SERVICE/NAME``: the entry holds the 32 bytes in base64;
- ``KEY@file:PATH``: KEY is any key that wraps and unwraps (``passphrase:prompt``, ``awskms:alias/owner``,
  ``vault:transit/owner``, ``gcpkms:``, ``azurekv:``, ``pkcs11:``), PATH the file that
  ``wmguard keygen owner --sealed KEY --out PATH`` wrote.

A sealed file holds one stanza, as recipients have it: in the place of the DEK the owner's secret, in the place of
the save the owner's public name. What comes out must give that name again, so that a file that was replaced is
noticed.
"""

from __future__ import annotations

from pathlib import Path

from hf_wmguard.canonical import canonical_json, parse_canonical, require_object
from hf_wmguard.container.checks import reading
from hf_wmguard.container.kinds import parse_stanza
from hf_wmguard.container.providers.keyring import read_entry
from hf_wmguard.container.references import SYMMETRIC, Wrapping, decode_entry, symmetric_key
from hf_wmguard.container.stanzas import WrapContext
from hf_wmguard.errors import AuthenticationError, ConfigError, FormatError
from hf_wmguard.keys import MAX_KEY_FILE_BYTES, OwnerKey, read_reference, write_key_pair

_SET_ID = "owner key"
_VERSION = 1
_BEFORE_FILE = "@file:"


def load_owner(ref: str) -> OwnerKey:
    """Return the owner key a reference points to.

    Raises:
        ConfigError: The reference has no known scheme, or names no file where one is needed.
        KeyFormatError, KeyPermissionError, NotFoundError: The key cannot be read, or is none.
        FormatError, AuthenticationError: The sealed file is malformed, or this key does not open it.
        KeyServiceError, MissingDependencyError: What must open it does not answer, or is not installed.
    """
    scheme, _, rest = ref.partition(":")
    if scheme == "keyring":
        return OwnerKey(decode_entry(read_entry(rest, "owner key"), "owner key"))
    if scheme not in SYMMETRIC:
        return OwnerKey.load(ref)
    key, where = _split(ref)
    return _unseal(read_reference(f"file:{where}", what="owner key", private=True), key)


def write_sealed(owner: OwnerKey, path: Path, ref: str) -> None:
    """Write an owner key sealed (mode 0600), and ``PATH.pub`` as `OwnerKey.write` does.

    Args:
        owner: The key.
        path: A new file.
        ref: Reference to the key that seals it, without a file.
    Raises:
        UsageError: One of the two files exists.
        ConfigError, AuthenticationError, KeyServiceError: As `load_owner`.
    """
    key, context = symmetric_key(ref, new=True), _context(owner.key_id())
    stanza = owner.wrapped(lambda secret: key.wrap(secret, context))
    document = {"version": _VERSION, "owner": owner.key_id(), "stanza": stanza}
    write_key_pair(path, canonical_json(document), owner.public_pem())


def _split(ref: str) -> tuple[Wrapping, str]:
    name, at, where = ref.rpartition(_BEFORE_FILE)
    if not at or not where:
        raise ConfigError(
            "owner key: the reference names no sealed file",
            hint="write KEY@file:PATH, the file from: wmguard keygen owner --sealed KEY --out PATH",
        )
    return symmetric_key(name), where


def _context(key_id: str) -> WrapContext:
    return WrapContext(set_id=_SET_ID, model_id=key_id)


def _unseal(data: bytes, key: Wrapping) -> OwnerKey:
    what = "sealed owner key"
    if not data.startswith(b"{"):
        raise FormatError(f"{what}: the file is not sealed", hint="read it with file:PATH, or seal a new one")
    document = require_object(
        parse_canonical(data, what, MAX_KEY_FILE_BYTES), {"version": (int,), "owner": (str,), "stanza": (dict,)}, what
    )
    if document["version"] != _VERSION:
        raise FormatError(f"{what}: version {document['version']}, expected {_VERSION}", hint="update hf-wmguard")
    with reading(what):
        stanza, context = parse_stanza(document["stanza"]), _context(document["owner"])
        secret = key.unwrap(stanza, context)
    if secret is None:
        raise AuthenticationError(f"{what}: this key does not open it", hint="use the key that sealed it")
    owner = OwnerKey(secret)
    if owner.key_id() != document["owner"]:
        raise AuthenticationError(f"{what}: it holds another key than it names", hint="restore it from a backup")
    return owner
