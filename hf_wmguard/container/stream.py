"""Plaintext as a stream of encrypted chunks: arithmetic of sizes, nonces and tags. No I/O, no headers.

A blob is the plaintext cut into chunks of ``chunk_bytes`` (the last one may be shorter), each followed by its
16-byte tag. An empty tensor is one empty chunk, so that its absence of data is authenticated too. This is the
STREAM construction: a counter and a last-chunk flag in the nonce, so that chunks cannot be reordered, dropped
or appended, and a blob cannot be cut at a chunk border.

Source: Hoang, Reyhanitabar, Rogaway & Vizar 2015, sec. 7 (STREAM).
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_wmguard.container.suites import Cipher

TAG_BYTES = 16
MIN_CHUNK_BYTES = 16
MAX_CHUNK_BYTES = 16 * 1024 * 1024
DEFAULT_CHUNK_BYTES = 4 * 1024 * 1024


def chunk_count(size_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks a tensor of ``size_bytes`` plaintext bytes has; at least one."""
    return max(1, -(-size_bytes // chunk_bytes))


def blob_bytes(size_bytes: int, chunk_bytes: int) -> int:
    """Return the ciphertext size, in bytes, of a tensor of ``size_bytes`` plaintext bytes."""
    return size_bytes + TAG_BYTES * chunk_count(size_bytes, chunk_bytes)


def plaintext_bytes(blob_size_bytes: int, chunk_bytes: int) -> int | None:
    """Return the plaintext size, in bytes, of a blob, or None where no tensor has a blob of that size."""
    chunks = max(1, -(-blob_size_bytes // (chunk_bytes + TAG_BYTES)))
    size_bytes = blob_size_bytes - TAG_BYTES * chunks
    if size_bytes < 0 or blob_bytes(size_bytes, chunk_bytes) != blob_size_bytes:
        return None
    return size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkStream:
    """Encrypts and decrypts the chunks of one stream of one file: a tensor, or all tensors of a file that hides them.

    Attributes:
        cipher: Under the file's own chunk key.
        name: The tensor's name; empty where all are hidden.
        index: Position of the stream in the file, 0 to 2^32 - 1.
        size_bytes: Plaintext size of the stream.
        chunk_bytes: Plaintext size of every chunk but the last.
    """

    cipher: Cipher
    name: str
    index: int
    size_bytes: int
    chunk_bytes: int

    @property
    def count(self) -> int:
        """The number of chunks, at least one."""
        return chunk_count(self.size_bytes, self.chunk_bytes)

    def span(self, chunk: int) -> tuple[int, int]:
        """Return where a chunk's plaintext starts and stops in the stream, in bytes."""
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.size_bytes)

    def offset(self, chunk: int) -> int:
        """Return where a chunk's ciphertext starts in the blob, in bytes."""
        return chunk * (self.chunk_bytes + TAG_BYTES)

    def seal(self, chunk: int, data: memoryview, out: memoryview) -> None:
        """Encrypt one chunk: ``out`` is ``TAG_BYTES`` longer than ``data``."""
        self.cipher.encrypt_into(self._nonce(chunk), data, self._aad(chunk), out)

    def open(self, chunk: int, ciphertext: memoryview, out: memoryview) -> None:
        """Decrypt one chunk: ``out`` is ``TAG_BYTES`` shorter than ``ciphertext``.

        Raises:
            InvalidTag: The chunk is not authentic. ``out`` then holds unauthenticated bytes: wipe it.
        """
        self.cipher.decrypt_into(self._nonce(chunk), ciphertext, self._aad(chunk), out)

    def _nonce(self, chunk: int) -> bytes:
        # Both ciphers break when a nonce repeats under one key. The key is new for every file (a fresh random salt
        # goes into it), and inside a file (stream, chunk) names one chunk, so a counter can never repeat
        # where a random 96-bit nonce would only be unlikely to.
        last = chunk == self.count - 1
        return self.index.to_bytes(4, "big") + chunk.to_bytes(7, "big") + bytes([last])

    def _aad(self, chunk: int) -> bytes:
        # The fixed-width counter stands first, so that no (chunk, name) can be read as another. All else that
        # must be bound (model, set, shard, sizes, order, dtypes, shapes) is in the header, whose hash is in the key.
        return chunk.to_bytes(8, "big") + self.name.encode()
