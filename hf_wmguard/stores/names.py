"""What a file in a store may be called: its name becomes a path here, and must lead nowhere else."""

from __future__ import annotations

MAX_PART_BYTES = 255
MAX_NAME_BYTES = 1024


def is_safe_name(name: str) -> bool:
    """Return whether a name, joined to a folder, stays inside of it on every system."""
    parts = name.split("/")
    # Backslash and colon are separators elsewhere; isprintable() also shuts out surrogates and bidi marks.
    return (
        name.isprintable()
        and not any(mark in name for mark in "\\:")
        and all(part not in ("", ".", "..") and len(part.encode()) <= MAX_PART_BYTES for part in parts)
        and len(name.encode()) <= MAX_NAME_BYTES
    )
