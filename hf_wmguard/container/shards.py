"""How the safetensors files of one model are named, and the index that says which tensor lies in which."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_wmguard.canonical import canonical_json

SHARD = re.compile(r"(.+?)(?:-(\d{5})-of-(\d{5}))?\.safetensors")
"""A file's name: stem, and of a shard its number and how many there are."""
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = f"model{INDEX_SUFFIX}"


def shard_number(name: str) -> tuple[int, int]:
    """Return which shard of how many a file is by its name; a file that is not numbered is the only one."""
    match = SHARD.fullmatch(name)
    return (int(match[2]), int(match[3])) if match and match[2] else (1, 1)


def encode_index(files: Mapping[str, Mapping[str, int]]) -> tuple[str, bytes]:
    """Return name and contents of the index of some shards.

    Args:
        files: Of every file the sizes of its tensors, in bytes, by name.
    """
    match = SHARD.fullmatch(next(iter(files)))
    index = {
        "metadata": {"total_size": sum(sum(sizes.values()) for sizes in files.values())},
        "weight_map": {tensor: name for name, sizes in files.items() for tensor in sizes},
    }
    return f"{match[1] if match else 'model'}{INDEX_SUFFIX}", canonical_json(index)
