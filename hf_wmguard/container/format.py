"""The header of a protected file: what it says, its canonical bytes, its keys. No I/O.

A protected file is a valid safetensors file, so that every tool lists it and no tool loads it by mistake:

    8 bytes   header length N, little-endian
    N bytes   canonical JSON, padded with spaces to a multiple of 8
    data      one blob per tensor, in the order of their names, without gaps (see `stream`)

Every tensor stands under its own name as a 1-D U8 blob, or all of them lie hidden in one stream (see `layout`).
``__metadata__`` has one entry, ``wmguard``: the *public header*, canonical JSON as a string. There is no
``format`` entry, so that a loader which looks for ``pt`` refuses; the caller's own entry is kept in the
encrypted inner header. ``docs/format.md`` is the normative description.

Why it is safe:

- *Keys*: HKDF-SHA256 over (DEK, 32 random bytes of salt per file, label). Chunks, inner header and MAC each
  have a key of their own, and each of these also takes the hash of the *body*: the public header without
  commitment, inner header and MAC, and the table of names and offsets. The chunks' key takes the hash of the
  encrypted inner header too. So every field, and every dtype and shape, is bound to every chunk: a changed one
  gives another key. What the body leaves out is computed with keys that come from it.
- *Commitment*: depends on DEK and salt alone and is compared first. Neither suite commits to its key, this
  does: one file cannot be opened under two DEKs, and a wrong DEK is told from a changed file.
- *MAC*: over all of the header. Nothing is decrypted before it is checked.
- *One encoding*: a header is decoded, encoded again, and must give the same bytes. This alone refuses
  duplicate keys, other spellings, gaps, overlaps, other orders and any other padding.

Whoever holds the DEK can forge a file: digests in a signed manifest stand against that, not this module.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hf_wmguard.canonical import (
    canonical_json,
    decode_base64,
    encode_base64,
    parse_canonical,
    require_object,
)
from hf_wmguard.container.checks import check_text, decode_hex, reading
from hf_wmguard.container.inner import MAX_TENSOR_BYTES, TensorInfo, decode_inner, encode_inner
from hf_wmguard.container.layout import MAX_HIDDEN_BYTES, MIN_HIDDEN_BYTES, hidden_starts, padme
from hf_wmguard.container.stream import (
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    blob_bytes,
    plaintext_bytes,
)
from hf_wmguard.container.suites import SUITES, check_suite, cipher_of
from hf_wmguard.errors import AuthenticationError, FormatError, KeyFormatError, UsageError

VERSION = 1
DEK_BYTES = 32
SALT_BYTES = 32
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_SHARDS = 99_999
METADATA = "__metadata__"
PUBLIC_HEADER = "wmguard"
_DIGEST_BYTES = 32
_ALIGNMENT_BYTES = 8
_INNER_NONCE = bytes(12)
_NUMBERS = ("version", "chunk_bytes", "index", "total")
_TEXTS = ("suite", "salt", "model_id", "iteration", "set_id", "role", "commitment", "inner", "mac")
_PUBLIC_FIELDS = {
    **dict.fromkeys(_NUMBERS, (int,)),
    **dict.fromkeys(_TEXTS, (str,)),
    "hidden_bytes": (int, type(None)),
}


def derive_key(dek: bytes, label: str, *context: str, salt: bytes | None = None) -> bytes:
    """Return a 32-byte subkey of a DEK for one use.

    The info string is a JSON list, so that no two (label, context) give the same bytes.

    Raises:
        KeyFormatError: The DEK is not 32 bytes.
    Source: HKDF-SHA256, RFC 5869.
    """
    if len(dek) != DEK_BYTES:
        raise KeyFormatError(f"DEK has {len(dek)} bytes, expected {DEK_BYTES}", hint="use secrets.token_bytes(32)")
    info = canonical_json(["hf-wmguard/1/container", label, *context])
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(dek)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContext:
    """What a file is part of; bound to every chunk in it.

    Attributes:
        model_id: The model ("acme/triage").
        iteration: Which training of it ("3").
        set_id: The save: files of different saves never mix.
        role: What the file holds.
        index: Number of this shard, from 1.
        total: Number of shards in the save.
    Raises:
        UsageError: An empty or overlong text, or an index outside 1 to total.
    """

    model_id: str
    iteration: str
    set_id: str
    role: str = "weights"
    index: int = 1
    total: int = 1

    def __post_init__(self) -> None:
        for what in ("model_id", "iteration", "set_id", "role"):
            check_text(getattr(self, what), what)
        if not 1 <= self.index <= self.total <= MAX_SHARDS:
            raise UsageError(
                f"shard {self.index} of {self.total}, expected 1 <= index <= total <= {MAX_SHARDS}",
                hint="number the shards from 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKeys:
    """The subkeys of one file, 32 bytes each; never shown."""

    chunks: bytes = field(repr=False)
    inner: bytes = field(repr=False)
    mac: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All that a protected file shows without keys.

    Attributes:
        context: What the file is part of.
        chunk_bytes: Plaintext size of a chunk.
        salt: 32 random bytes.
        sizes: Plaintext size of every tensor in bytes, in the order of the names; empty where they are hidden.
        suite: One of `suites.SUITES`.
        hidden_bytes: Padded plaintext size of the one stream that hides all tensors, or None where they show.
        commitment: 32 bytes that only the right DEK gives.
        inner: Encrypted canonical JSON: true dtypes, shapes, sizes and the caller's metadata.
        mac: HMAC-SHA256 over the rest of the header.
    Raises:
        UsageError: A tensor's name is empty, overlong, not Unicode, or the one safetensors keeps; an unknown suite,
            a chunk size outside the limits, or a hidden size that no file has.
    """

    context: FileContext
    chunk_bytes: int
    salt: bytes
    sizes: dict[str, int]
    suite: str
    hidden_bytes: int | None = None
    commitment: bytes = b""
    inner: bytes = b""
    mac: bytes = b""

    def __post_init__(self) -> None:
        check_suite(self.suite)
        _check_chunk_bytes(self.chunk_bytes)
        _check_names(self.sizes)
        if self.hidden_bytes is not None:
            _check_hidden_bytes(self.hidden_bytes)
            if self.sizes:
                raise UsageError("tensors show in a file that hides them", hint="fetch the file again")

    def body(self) -> dict[str, object]:
        """Return the fields whose hash is in the keys."""
        return {
            "version": VERSION,
            "suite": self.suite,
            "chunk_bytes": self.chunk_bytes,
            "hidden_bytes": self.hidden_bytes,
            "salt": self.salt.hex(),
            **dataclasses.asdict(self.context),
        }

    def table(self) -> dict[str, object]:
        """Return the safetensors entries: one 1-D U8 blob per tensor, without gaps, in the order of names."""
        entries: dict[str, object] = {}
        stop = 0
        for name, size_bytes in self.sizes.items():
            start, stop = stop, stop + blob_bytes(size_bytes, self.chunk_bytes)
            entries[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        return entries

    def data_bytes(self) -> int:
        """Return the size of all blobs together."""
        if self.hidden_bytes is not None:
            return blob_bytes(self.hidden_bytes, self.chunk_bytes)
        return sum(blob_bytes(size_bytes, self.chunk_bytes) for size_bytes in self.sizes.values())

    def sealed_fields(self) -> dict[str, object]:
        """Return the public header without its MAC."""
        inner = encode_base64(self.inner)
        return {**self.body(), "commitment": self.commitment.hex(), "inner": inner}

    def encode(self) -> bytes:
        """Return the bytes a file starts with: length, JSON, padding."""
        public = canonical_json({**self.sealed_fields(), "mac": self.mac.hex()}).decode()
        text = canonical_json({**self.table(), METADATA: {PUBLIC_HEADER: public}})
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    def expected_commitment(self, dek: bytes) -> bytes:
        """Return the commitment that this DEK gives for this file."""
        return derive_key(dek, "commitment", salt=self.salt)

    def keys(self, dek: bytes) -> FileKeys:
        """Return the subkeys that this DEK gives for this header; the chunks' one once ``inner`` is there."""
        body_hash = hashlib.sha256(canonical_json([self.body(), self.table()])).hexdigest()
        # Under a given key the sealed bytes open to one inner header only: their hash stands for dtypes and shapes.
        inner_hash = hashlib.sha256(self.inner).hexdigest()
        return FileKeys(
            chunks=derive_key(dek, "chunks", body_hash, inner_hash, salt=self.salt),
            inner=derive_key(dek, "inner", body_hash, salt=self.salt),
            mac=derive_key(dek, "mac", body_hash, salt=self.salt),
        )

    def expected_mac(self, keys: FileKeys) -> bytes:
        """Return the MAC that these keys give for this header."""
        return hmac.digest(keys.mac, canonical_json([self.sealed_fields(), self.table()]), "sha256")


def seal_header(
    dek: bytes,
    context: FileContext,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    suite: str,
    chunk_bytes: int,
    hidden: bool = False,
    salt: bytes | None = None,
) -> tuple[Header, FileKeys]:
    """Return a finished header, and the keys of its file.

    Args:
        dek: 32 bytes.
        context: What the file is part of.
        tensors: What every tensor is.
        metadata: The caller's own.
        suite: One of `suites.SUITES`.
        chunk_bytes: Plaintext bytes of a chunk.
        hidden: Whether names and sizes are hidden.
        salt: Fresh and random by default. A salt is never used twice with one DEK; test vectors set their own.
    Raises:
        UsageError: A name, size or chunk size outside the limits, metadata that are not strings, or a header
            over ``MAX_HEADER_BYTES``.
        KeyFormatError: The DEK is not 32 bytes.
    """
    if not all(isinstance(text, str) for text in (*metadata, *metadata.values())):
        raise UsageError("the metadata are not strings", hint="safetensors metadata map strings to strings")
    _check_names(tensors)
    header = Header(
        context=context,
        suite=suite,
        chunk_bytes=chunk_bytes,
        salt=secrets.token_bytes(SALT_BYTES) if salt is None else salt,
        sizes={} if hidden else {name: tensors[name].size_bytes for name in sorted(tensors)},
        hidden_bytes=hidden_starts(tensors)[1] if hidden else None,
    )
    # The zero nonce is used once: the key comes from this file's salt, and a file has one inner header.
    sealer = cipher_of(suite, header.keys(dek).inner)
    inner = sealer.encrypt(_INNER_NONCE, encode_inner(tensors, metadata), None)
    header = dataclasses.replace(header, commitment=header.expected_commitment(dek), inner=inner)
    keys = header.keys(dek)
    header = dataclasses.replace(header, mac=header.expected_mac(keys))
    if len(header.encode()) - LENGTH_BYTES > MAX_HEADER_BYTES:
        raise UsageError(
            f"the header is over {MAX_HEADER_BYTES} bytes",
            hint="write fewer tensors, or less metadata, per file",
        )
    return header, keys


def parse_header(raw: bytes, *, file_size_bytes: int) -> Header:
    """Return the header of a file, well formed but not yet authentic.

    Args:
        raw: The first bytes of the file, length field and padding included.
        file_size_bytes: Size of the whole file.
    Raises:
        FormatError: Not a protected file, another version or suite, not the canonical encoding, or a file of
            another size than the header implies.
    """
    document = parse_canonical(raw[LENGTH_BYTES:].rstrip(b" "), "header", MAX_HEADER_BYTES)
    table = dict(document) if isinstance(document, dict) else {}
    metadata = require_object(table.pop(METADATA, None), {PUBLIC_HEADER: (str,)}, METADATA)
    public = parse_canonical(metadata[PUBLIC_HEADER].encode(), "public header", MAX_HEADER_BYTES)
    # Before the fields: another version may well have others.
    version = public.get("version") if isinstance(public, dict) else None
    if type(version) is not int or version != VERSION:
        raise FormatError(f"format version {version!r}, expected {VERSION}", hint="update hf-wmguard")
    public = require_object(public, _PUBLIC_FIELDS, "public header")
    if public["suite"] not in SUITES:
        raise FormatError(f"the cipher suite is none of {', '.join(SUITES)}", hint="update hf-wmguard")
    with reading("header"):
        header = _decode_header(public, table)
        canonical = header.encode()
    if canonical != raw:
        raise FormatError("the header is not in canonical form", hint="the file was changed; fetch it again")
    expected = len(raw) + header.data_bytes()
    if file_size_bytes != expected:
        raise FormatError(
            f"the file has {file_size_bytes} bytes, its header implies {expected}",
            hint="the file was cut or something was added; fetch it again",
        )
    return header


def open_header(header: Header, dek: bytes) -> tuple[FileKeys, dict[str, TensorInfo], dict[str, str]]:
    """Return the keys, the true tensors and the caller's metadata of an authentic header.

    Raises:
        AuthenticationError: Another DEK, or a header that was changed.
        FormatError: An authentic inner header that does not fit the file (a faulty writer).
        KeyFormatError: The DEK is not 32 bytes.
    """
    if not hmac.compare_digest(header.expected_commitment(dek), header.commitment):
        raise AuthenticationError(
            "this is not the key of this file",
            hint="use the key of this save; if it is, the file was changed",
        )
    keys = header.keys(dek)
    if not hmac.compare_digest(header.expected_mac(keys), header.mac):
        raise AuthenticationError("the header was changed", hint="fetch the file again from a source you trust")
    try:
        plaintext = cipher_of(header.suite, keys.inner).decrypt(_INNER_NONCE, header.inner, None)
    except InvalidTag:
        raise AuthenticationError("the inner header was changed", hint="fetch the file again") from None
    tensors, metadata = decode_inner(plaintext)
    with reading("inner header"):
        _check_names(tensors)
        fits = (
            {name: info.size_bytes for name, info in tensors.items()} == header.sizes
            if header.hidden_bytes is None
            else hidden_starts(tensors)[1] == header.hidden_bytes
        )
    if not fits:
        raise FormatError("the inner header names other tensors than the file", hint="write the file again")
    return keys, tensors, metadata


def _decode_header(public: Mapping[str, Any], table: Mapping[str, Any]) -> Header:
    chunk_bytes = public["chunk_bytes"]
    _check_chunk_bytes(chunk_bytes)
    return Header(
        suite=public["suite"],
        hidden_bytes=public["hidden_bytes"],
        context=FileContext(**{item.name: public[item.name] for item in dataclasses.fields(FileContext)}),
        chunk_bytes=chunk_bytes,
        salt=decode_hex(public["salt"], SALT_BYTES, "salt"),
        sizes={name: _decode_size(name, entry, chunk_bytes) for name, entry in table.items()},
        commitment=decode_hex(public["commitment"], _DIGEST_BYTES, "commitment"),
        inner=decode_base64(public["inner"], "inner header"),
        mac=decode_hex(public["mac"], _DIGEST_BYTES, "MAC"),
    )


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        check_text(name, "tensor name")
        if name == METADATA:
            raise UsageError(f"a tensor is named {METADATA}", hint="safetensors keeps that name for itself")


def _check_hidden_bytes(size_bytes: int) -> None:
    if not MIN_HIDDEN_BYTES <= size_bytes <= MAX_HIDDEN_BYTES or padme(size_bytes) != size_bytes:
        raise UsageError(f"{size_bytes} bytes are not a padded size", hint="fetch the file again")


def _check_chunk_bytes(chunk_bytes: int) -> None:
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise UsageError(f"chunk_bytes is {chunk_bytes}", hint=f"choose {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes")


def _decode_size(name: str, value: object, chunk_bytes: int) -> int:
    """Return the plaintext size from the shape of a blob; encoding again checks dtype and offsets."""
    entry = require_object(value, {"dtype": (str,), "shape": (list,), "data_offsets": (list,)}, "tensor entry")
    shape = entry["shape"]
    if len(shape) != 1 or type(shape[0]) is not int:
        raise FormatError(f"{name!r}: not a 1-D blob", hint="the file is damaged or is not protected")
    size_bytes = plaintext_bytes(shape[0], chunk_bytes)
    if size_bytes is None or size_bytes > MAX_TENSOR_BYTES:
        raise FormatError(f"{name!r}: no tensor has a blob of this size", hint="the file is damaged")
    return size_bytes
