"""What a file begins like, whatever it is called: weights can lie behind any name. Pure."""

from __future__ import annotations

BEGIN_BYTES = 4096
# By what they are called in messages. Source: the formats' own descriptions.
_MAGIC = {
    "GGUF": b"GGUF",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "an array of NumPy": b"\x93NUMPY",
}
_PICKLE = tuple(bytes((0x80, protocol)) for protocol in (2, 3, 4, 5))


def begins_like(begin: bytes) -> str | None:
    """Return what weights a file begins like, in words; None for anything else.

    Args:
        begin: Its first bytes, `BEGIN_BYTES` of them where it has so many.
    """
    # Eight bytes of length, the upper ones zero, and then JSON.
    if begin[5:9] == b"\0\0\0{":
        return "safetensors"
    # What torch.save writes is a zip whose first member is the pickle.
    if begin.startswith(_PICKLE) or (begin.startswith(b"PK\x03\x04") and b"data.pkl" in begin[:512]):
        return "a pickle of PyTorch"
    return next((what for what, magic in _MAGIC.items() if begin.startswith(magic)), None)
