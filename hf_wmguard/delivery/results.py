"""What a push did, the same for every store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What is at the destination now.

    Args:
        uri: The address that readers open.
        revision: What the store calls this version: of the Hub the commit, of S3 the save.
        files: Names of all files of this version.
        size_bytes: Of all these files together.
        skipped: Those of them that were there already, whole or in part, and were not sent again as a whole.
        left_out: What lies in the folder too and was not sent.
        url: Where a browser finds it, None where it does not.
        unchecked: What could not be asked about the place, such as whether it is public.
        notes: What else a person should know.
    """

    uri: str
    revision: str
    files: tuple[str, ...]
    size_bytes: int
    skipped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    url: str | None = None
    unchecked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return asdict(self)
