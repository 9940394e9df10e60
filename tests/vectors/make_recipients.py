"""Make ``recipients.json``: recipients files, who opens them, and which error the others are.

    python tests/vectors/make_recipients.py

Every released version's vectors are kept: make new ones only beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_wmguard.canonical import canonical_json, encode_base64
from hf_wmguard.container.hybrid import HybridIdentity
from hf_wmguard.container.passphrase import Cost, Passphrase
from hf_wmguard.container.recipients import RecipientsFile, WrapContext, X25519Identity
from hf_wmguard.container.symmetric import RawKey

DEK = bytes(range(32))
CONTEXT = WrapContext(set_id="5e" * 16, model_id="acme/triage")
SECRETS = {"x25519": b"anna" * 8, "mlkem768-x25519": bytes(range(96)), "rawkey": bytes(range(1, 33))}
WORDS = "correct horse battery"


def main() -> None:
    """Write the file."""
    hybrid = HybridIdentity(SECRETS["mlkem768-x25519"])
    recipients = {
        "x25519": X25519Identity.from_bytes(SECRETS["x25519"]).recipient(),
        "mlkem768-x25519": hybrid.recipient(),
        "rawkey": RawKey(SECRETS["rawkey"]),
        "passphrase": Passphrase(WORDS, cost=Cost(memory_kib=19 * 1024, passes=1, lanes=1)),
    }
    stanzas = {kind: one.wrap(DEK, CONTEXT) for kind, one in recipients.items()}
    whole = RecipientsFile.sealed(DEK, CONTEXT, list(stanzas.values())).encode()
    vectors = [_vector(f"{kind} opens", whole, kind, "opens") for kind in stanzas]

    def changed(name: str, kind: str, expect: str, edit: Callable[[Any], object]) -> None:
        document = json.loads(whole)
        edit(document)
        vectors.append(_vector(name, canonical_json(document), kind, expect))

    def stanza(document: Any, kind: str) -> Any:
        return next(one for one in document["stanzas"] if one["kind"] == kind)

    for kind in stanzas:
        other = recipients[kind].wrap(DEK, WrapContext(set_id="07" * 16, model_id="acme/triage"))
        alien = recipients[kind].wrap(bytes(32), CONTEXT)
        changed(
            f"{kind} moved from another save",
            kind,
            "AuthenticationError",
            lambda d, o=other, k=kind: stanza(d, k).update(o),
        )
        changed(
            f"{kind} wraps another key", kind, "AuthenticationError", lambda d, o=alien, k=kind: stanza(d, k).update(o)
        )
        changed(f"{kind} without ciphertext", kind, "FormatError", lambda d, k=kind: stanza(d, k).pop("ciphertext"))
        changed(
            f"{kind} with empty ciphertext",
            kind,
            "AuthenticationError",
            lambda d, k=kind: stanza(d, k).update(ciphertext=""),
        )
        changed(
            f"{kind} with a number as ciphertext",
            kind,
            "FormatError",
            lambda d, k=kind: stanza(d, k).update(ciphertext=1),
        )
        changed(f"{kind} not in base64", kind, "FormatError", lambda d, k=kind: stanza(d, k).update(ciphertext="*"))
        changed(f"{kind} with one field more", kind, "FormatError", lambda d, k=kind: stanza(d, k).update(note="x"))
        changed(f"{kind} removed", kind, "AuthenticationError", lambda d, k=kind: d["stanzas"].remove(stanza(d, k)))
    for name, value in (
        ("memory_kib", "1048577"),
        ("memory_kib", "19455"),
        ("passes", "11"),
        ("lanes", "0"),
        ("passes", "+1"),
        ("lanes", "01"),
        ("salt", "QQ=="),
        ("memory_kib", "9" * 400),
    ):
        changed(
            f"passphrase with {name} {value[:8]}",
            "rawkey",
            "FormatError",
            lambda d, n=name, v=value: stanza(d, "passphrase").update({n: v}),
        )
    changed("unknown kind", "rawkey", "FormatError", lambda d: stanza(d, "x25519").update(kind="scrypt"))
    changed(
        "a service's stanza without what it wrapped",
        "rawkey",
        "FormatError",
        lambda d: stanza(d, "x25519").update(kind="vault"),
    )
    changed("version 2", "rawkey", "FormatError", lambda d: d.update(version=2))
    changed("version true", "rawkey", "FormatError", lambda d: d.update(version=True))
    changed("no stanza", "rawkey", "FormatError", lambda d: d.update(stanzas=[]))
    changed("one stanza twice", "rawkey", "FormatError", lambda d: d["stanzas"].append(d["stanzas"][0]))
    changed("another order", "rawkey", "AuthenticationError", lambda d: d["stanzas"].reverse())
    changed("another model", "rawkey", "AuthenticationError", lambda d: d.update(model_id="acme/other"))
    changed("another MAC", "rawkey", "AuthenticationError", lambda d: d.update(mac="0" * 64))
    changed("another commitment", "rawkey", "AuthenticationError", lambda d: d.update(dek_commitment="0" * 64))
    vectors.append(_vector("spaces", json.dumps(json.loads(whole)).encode(), "rawkey", "FormatError"))
    vectors.append(_vector("cut", whole[:-1], "rawkey", "FormatError"))
    vectors.append(_vector("empty", b"", "rawkey", "FormatError"))
    document = {
        "dek": DEK.hex(),
        "identities": {**{kind: secret.hex() for kind, secret in SECRETS.items()}, "passphrase": WORDS},
        "vectors": vectors,
    }
    Path(__file__).with_name("recipients.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _vector(name: str, data: bytes, identity: str, expect: str) -> dict[str, str]:
    return {"name": name, "identity": identity, "expect": expect, "file": encode_base64(data)}


if __name__ == "__main__":
    main()
