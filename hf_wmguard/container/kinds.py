"""The kinds of stanzas that this version knows, and their fields. A new kind of recipient is one more entry."""

from __future__ import annotations

from collections.abc import Mapping

from hf_wmguard.canonical import require_object
from hf_wmguard.container.hybrid import HYBRID_KIND
from hf_wmguard.container.passphrase import PASSPHRASE_KIND, check_stanza
from hf_wmguard.container.providers import SERVICE_KINDS
from hf_wmguard.container.stanzas import Stanza
from hf_wmguard.container.symmetric import RAW_KIND
from hf_wmguard.container.x25519 import X25519_KIND
from hf_wmguard.errors import FormatError

_BASE = ("kind", "recipient", "ciphertext")
STANZA_FIELDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((X25519_KIND, HYBRID_KIND, RAW_KIND), _BASE),
    PASSPHRASE_KIND: (*_BASE, "memory_kib", "passes", "lanes", "salt"),
    **dict.fromkeys(SERVICE_KINDS, (*_BASE, "wrapped")),
}


def parse_stanza(entry: object) -> Stanza:
    """Return a parsed object that is a stanza, well formed but not yet authentic.

    Raises:
        FormatError: Of no known kind, or with other fields.
        UsageError: A cost outside its limits; whoever reads a file makes it a FormatError (`checks.reading`).
    """
    kind = entry.get("kind") if isinstance(entry, dict) else None
    fields = STANZA_FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise FormatError(f"a stanza of kind {kind!r}, expected {', '.join(STANZA_FIELDS)}", hint="update hf-wmguard")
    stanza = require_object(entry, dict.fromkeys(fields, (str,)), "stanza")
    if kind == PASSPHRASE_KIND:
        check_stanza(stanza)
    return stanza
