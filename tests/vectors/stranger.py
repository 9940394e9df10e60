"""A reader of protected files written from docs/format.md alone: nothing of the package is imported.

It shows that the document is complete, and that the package reads what the document says. It does not refuse all that
a reader must refuse, and is for tests only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

CIPHERS = {"AES-256-GCM": AESGCM, "ChaCha20-Poly1305": ChaCha20Poly1305}
NOT_IN_THE_BODY = ("commitment", "inner", "mac")


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def derive(dek: bytes, salt: bytes, *info: str) -> bytes:
    text = canonical(["hf-wmguard/1/container", *info])
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=text).derive(dek)


def keys_of(dek: bytes, public: dict[str, Any], table: dict[str, Any]) -> dict[str, bytes]:
    salt = bytes.fromhex(public["salt"])
    body = {name: value for name, value in public.items() if name not in NOT_IN_THE_BODY}
    body_hash = hashlib.sha256(canonical([body, table])).hexdigest()
    inner_hash = hashlib.sha256(base64.b64decode(public["inner"])).hexdigest()
    return {
        "chunks": derive(dek, salt, "chunks", body_hash, inner_hash),
        "inner": derive(dek, salt, "inner", body_hash),
        "mac": derive(dek, salt, "mac", body_hash),
    }


def read(file: bytes, dek: bytes) -> tuple[dict[str, bytes], dict[str, Any], dict[str, str]]:
    """Return the keys, the tensors (dtype, shape, data in hex) and the metadata of a good file."""
    start = 8 + int.from_bytes(file[:8], "little")
    table = json.loads(file[8:start])
    public = json.loads(table.pop("__metadata__")["wmguard"])
    assert derive(dek, bytes.fromhex(public["salt"]), "commitment").hex() == public["commitment"]
    keys = keys_of(dek, public, table)
    unsigned = {name: value for name, value in public.items() if name != "mac"}
    assert hmac.digest(keys["mac"], canonical([unsigned, table]), "sha256").hex() == public["mac"]
    cipher = CIPHERS[public["suite"]]
    inner = json.loads(cipher(keys["inner"]).decrypt(bytes(12), base64.b64decode(public["inner"]), None))
    data, size = file[start:], public["chunk_bytes"]
    tensors = inner["tensors"]
    if public["hidden_bytes"] is None:
        blobs = {name: data[slice(*entry["data_offsets"])] for name, entry in table.items()}
        plain = {
            name: open_blob(cipher(keys["chunks"]), blobs[name], name, index, size)
            for index, name in enumerate(sorted(blobs))
        }
    else:
        stream = open_blob(cipher(keys["chunks"]), data, "", 0, size)
        assert len(stream) == public["hidden_bytes"]
        plain, stop = {}, 0
        for name in sorted(tensors):
            begin = -(-stop // 64) * 64
            assert not any(stream[stop:begin])
            stop = begin + tensors[name]["size_bytes"]
            plain[name] = stream[begin:stop]
        assert not any(stream[stop:])
    found = {
        name: {"dtype": one["dtype"], "shape": one["shape"], "data": plain[name].hex()} for name, one in tensors.items()
    }
    return keys, found, inner["metadata"]


def open_blob(cipher: Any, blob: bytes, name: str, index: int, chunk_bytes: int) -> bytes:
    step = chunk_bytes + 16
    pieces = [blob[at : at + step] for at in range(0, len(blob), step)]
    plain = b""
    for chunk, piece in enumerate(pieces):
        last = bytes([chunk == len(pieces) - 1])
        nonce = index.to_bytes(4, "big") + chunk.to_bytes(7, "big") + last
        plain += cipher.decrypt(nonce, piece, chunk.to_bytes(8, "big") + name.encode())
    return plain
