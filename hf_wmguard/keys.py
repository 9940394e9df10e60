"""Owner keys: reading them by reference, and deriving one subkey per use.

A *reference* (``file:owner.key``, ``env:OWNER_KEY``) stands wherever a key is needed; configs and
commands never hold a key. One owner key is 32 random bytes. Everything else is derived from it with
HKDF-SHA256 (RFC 5869), one independent subkey per label, model, iteration and slot, so that showing one
subkey shows nothing of another.

This room never prints a secret: `OwnerKey` has no field that is shown, compared or pickled.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hf_wmguard.errors import (
    AuthenticationError,
    ConfigError,
    KeyFormatError,
    KeyPermissionError,
    NotFoundError,
    UsageError,
)

T = TypeVar("T")
OWNER_KEY_BYTES = 32
MAX_KEY_FILE_BYTES = 64 * 1024
_SCHEMES = ("file:", "env:")
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_SALT_BYTES = 32


def read_reference(ref: str, *, what: str, private: bool) -> bytes:
    """Return the bytes a key reference points to.

    Args:
        ref: ``file:PATH`` or ``env:NAME`` (the variable holds base64).
        what: The thing that is looked for, for the error message ("owner key").
        private: Whether the file must be closed to group and others (mode 0600).
    Raises:
        ConfigError: The reference has no known scheme, or looks like a key itself.
        NotFoundError: The file or the variable does not exist.
        KeyPermissionError: The file is readable by group or others.
        KeyFormatError: The file is larger than any key, or the variable is not base64.
    """
    if ref.startswith("file:"):
        return _read_key_file(_expanded(Path(ref.removeprefix("file:")), what), what=what, private=private)
    if ref.startswith("env:"):
        name = ref.removeprefix("env:")
        value = os.environ.get(name)
        if value is None:
            raise NotFoundError(
                f"{what}: environment variable {name} is not set", hint=f"set {name} to the key in base64"
            )
        try:
            return base64.b64decode(value.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise KeyFormatError(
                f"{what}: environment variable {name} is not base64",
                hint=f"set {name} to the output of: base64 -w0 KEYFILE",
            ) from None
    # The reference itself is not repeated: somebody may have pasted a key where a reference belongs.
    raise ConfigError(
        f"{what}: not a key reference; expected one of {', '.join(_SCHEMES)}",
        hint="write file:PATH or env:NAME, never the key itself",
    )


def _expanded(path: Path, what: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise NotFoundError(f"{what}: no home folder for {path.parts[0]}", hint="write the whole path") from None


def _read_key_file(path: Path, *, what: str, private: bool) -> bytes:
    try:
        # O_NONBLOCK: a named pipe without a writer must be an error, not a wait without end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(
            f"{what}: no file at {path}", hint="make one with: wmguard keygen owner|recipient --out FILE"
        ) from None
    except OSError as error:
        raise NotFoundError(
            f"{what}: cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from None
    # The mode is taken from the open descriptor, so that the file cannot be swapped between check and read.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise KeyFormatError(f"{what}: {path} is not a regular file", hint="point the reference at the key file")
    with os.fdopen(descriptor, "rb") as file:
        if private and status.st_mode & 0o077:
            raise KeyPermissionError(
                f"{what}: {path} is readable by others (mode {stat.S_IMODE(status.st_mode):04o}, expected 0600)",
                hint=f"run: chmod 600 {path}; if others may have read it, make a new key",
            )
        data = file.read(MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise KeyFormatError(f"{what}: {path} is larger than {MAX_KEY_FILE_BYTES} bytes", hint="this is not a key file")
    return data


class OwnerKey:
    """The owner's secret, and everything derived from it.

    Raises:
        KeyFormatError: The secret is not exactly 32 bytes, or all of them are alike.
    Source: HKDF, RFC 5869; labels are this project's own.
    """

    __slots__ = ("__secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != OWNER_KEY_BYTES:
            raise KeyFormatError(
                f"owner key has {len(secret)} bytes, expected {OWNER_KEY_BYTES}",
                hint="make one with: wmguard keygen owner --out FILE",
            )
        if len(set(secret)) == 1:
            raise KeyFormatError(
                "owner key is one byte repeated", hint="make one with: wmguard keygen owner --out FILE"
            )
        self.__secret = bytes(secret)

    @classmethod
    def load(cls, ref: str) -> OwnerKey:
        """Return the key a reference points to; errors as `read_reference`."""
        return cls(read_reference(ref, what="owner key", private=True))

    @classmethod
    def generate(cls) -> OwnerKey:
        """Return a fresh random key."""
        return cls(secrets.token_bytes(OWNER_KEY_BYTES))

    def write(self, path: Path) -> None:
        """Write the key (32 raw bytes, mode 0600) and ``PATH.pub``, the public half that checks signatures.

        Raises:
            UsageError: One of the two files exists; keys are never overwritten.
        """
        write_key_pair(path, self.__secret, self.public_pem())

    def wrapped(self, wrap: Callable[[bytes], T]) -> T:
        """Return what a wrapping function makes of the secret: beside `write` the only way in which it leaves."""
        return wrap(self.__secret)

    def derive(
        self,
        label: str,
        *,
        model_id: str = "",
        iteration: str = "",
        slot: int = 0,
        salt: bytes = b"",
        length_bytes: int = 32,
    ) -> bytes:
        """Return a subkey bound to a use, a model, an iteration and a slot.

        The info string is a JSON list, so that no two different tuples give the same bytes.
        """
        info = json.dumps(["hf-wmguard/1", label, model_id, iteration, slot], separators=(",", ":")).encode()
        return HKDF(algorithm=hashes.SHA256(), length=length_bytes, salt=salt or None, info=info).derive(self.__secret)

    def signing_key(self) -> ec.EllipticCurvePrivateKey:
        """Return the ECDSA P-256 key that signs manifests and registry entries.

        48 derived bytes reduced modulo the group order: the bias is below 2^-128 (FIPS 186-5, A.2.1).
        """
        scalar = int.from_bytes(self.derive("signing", length_bytes=48), "big") % (_P256_ORDER - 1) + 1
        return ec.derive_private_key(scalar, ec.SECP256R1())

    def public_pem(self) -> bytes:
        """Return the public signing key as PEM (SubjectPublicKeyInfo)."""
        return (
            self.signing_key()
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def key_id(self) -> str:
        """Return the public name of this owner: ``sha256:`` and the hex digest of the public signing key (DER)."""
        return public_key_id(self.signing_key().public_key())

    def seal(self, label: str, plaintext: bytes, *, aad: bytes) -> bytes:
        """Return plaintext encrypted for the owner alone: 32 bytes of salt, then AES-256-GCM.

        Each call derives a key of its own from 32 random bytes of salt, so that the fixed nonce is used once per key.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        return salt + AESGCM(self.derive(label, salt=salt)).encrypt(bytes(12), plaintext, aad)

    def open(self, label: str, sealed: bytes, *, aad: bytes) -> bytes:
        """Return what `seal` encrypted.

        Raises:
            AuthenticationError: Another key, another use, or changed bytes.
        """
        salt, ciphertext = sealed[:_SALT_BYTES], sealed[_SALT_BYTES:]
        try:
            return AESGCM(self.derive(label, salt=salt)).decrypt(bytes(12), ciphertext, aad)
        except (InvalidTag, ValueError):
            raise AuthenticationError(
                f"cannot open {label} data with this owner key",
                hint="check --owner-key; if it is right, the data was changed",
            ) from None

    def __repr__(self) -> str:
        return "OwnerKey(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an OwnerKey is never pickled: pass a reference and load it where it is needed")


def public_key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Return the public name of a signing key: ``sha256:`` and the hex digest of its DER bytes."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(der).hexdigest()


def write_key_pair(path: Path, private: bytes, public: bytes) -> None:
    """Write a private key (mode 0600) and, beside it, ``PATH.pub``: both or neither.

    Raises:
        UsageError: One of the two files exists; keys are never overwritten.
        NotFoundError: The folder does not exist.
    """
    write_new_file(path, private, mode=0o600)
    try:
        write_new_file(path.with_name(path.name + ".pub"), public, mode=0o644)
    except BaseException:
        path.unlink()
        raise


def write_new_file(path: Path, data: bytes, *, mode: int) -> None:
    """Write a file that must not exist yet, with its final mode from the first byte on.

    Raises:
        UsageError: The file exists.
        NotFoundError: Its folder does not.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise UsageError(
            f"{path} exists and is not overwritten", hint="choose another --out, or move the old file away"
        ) from None
    except OSError as error:
        raise NotFoundError(f"cannot write {path}: {error.strerror}", hint="create its folder first") from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
