"""Signed envelopes: a payload, its type, one signature and the public key that checks it.

The shape is that of DSSE (https://github.com/secure-systems-lab/dsse): the signature covers the payload's
type together with its bytes, so that no signature made for one purpose is good for another.

What a valid envelope proves depends on who named the key:

- with a *pinned* signer (``signer=``), that the holder of that key signed this payload;
- without one, only that the payload was not changed since whoever holds the *embedded* key signed it. Anybody
  can sign a changed copy with a key of their own, so `Opened.key_id` must then be compared with one that was
  learned elsewhere before it means anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hf_wmguard.canonical import canonical_json, decode_base64, encode_base64, parse_canonical, require_object
from hf_wmguard.errors import KeyFormatError, ManifestError
from hf_wmguard.keys import OwnerKey, public_key_id, read_reference

MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
MAX_ENVELOPE_BYTES = MAX_PAYLOAD_BYTES // 3 * 4 + 4096
_ENVELOPE_FIELDS = {"payload": (str,), "payloadType": (str,), "public_key": (str,), "signatures": (list,)}
_SIGNATURE_FIELDS = {"keyid": (str,), "sig": (str,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a checked envelope held.

    Attributes:
        payload: The signed bytes.
        key_id: The signer, ``sha256:`` and 64 hex digits.
    """

    payload: bytes = field(repr=False)
    key_id: str


def pae(payload: bytes, payload_type: str) -> bytes:
    """Return the bytes that are signed: payload and type, each with its length.

    Source: DSSE protocol 1.0.0, "Pre-Authentication Encoding".
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def make_signature(payload: bytes, payload_type: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the ECDSA signature (DER) over a payload and its type.

    Deterministic, because a repeated or biased nonce gives the private key away.

    Source: FIPS 186-5, sec. 6; RFC 6979.
    """
    return key.sign(pae(payload, payload_type), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def signature_is_valid(signature: bytes, payload: bytes, payload_type: str, key: ec.EllipticCurvePublicKey) -> bool:
    """Return whether a signature (DER) is this key's over this payload and type."""
    try:
        key.verify(signature, pae(payload, payload_type), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def sign(payload: bytes, payload_type: str, owner: OwnerKey) -> bytes:
    """Return an envelope over a payload, as canonical JSON.

    Args:
        payload: At most `MAX_PAYLOAD_BYTES`.
        payload_type: A media type that says how to read the payload, of one use only.
        owner: The key that signs; its public half is embedded.
    Raises:
        ManifestError: The payload is too large to be read back.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ManifestError(
            f"payload has {len(payload)} bytes, expected at most {MAX_PAYLOAD_BYTES}",
            hint="keep large private records in the registry and only their digest here",
        )
    key = owner.signing_key()
    return canonical_json(
        {
            "payload": encode_base64(payload),
            "payloadType": payload_type,
            "public_key": _pem(key.public_key()).decode("ascii"),
            "signatures": [
                {
                    "keyid": public_key_id(key.public_key()),
                    "sig": encode_base64(make_signature(payload, payload_type, key)),
                }
            ],
        }
    )


def open_envelope(data: bytes, *, payload_type: str, signer: ec.EllipticCurvePublicKey | None) -> Opened:
    """Return the payload of an envelope whose signature holds.

    Args:
        data: The envelope as read.
        payload_type: The only type that is accepted.
        signer: The only key that is accepted. None takes the embedded key: the envelope is then whole, but
            its signer is self-asserted (see the module's docstring).
    Raises:
        ManifestError: Not an envelope, of another type, signed by another key, or changed.
    """
    what = "envelope"
    fields = require_object(
        parse_canonical(data, what, MAX_ENVELOPE_BYTES, error=ManifestError),
        _ENVELOPE_FIELDS,
        what,
        error=ManifestError,
    )
    if fields["payloadType"] != payload_type:
        raise ManifestError(
            f"envelope holds {fields['payloadType'][:100]!a}, expected {payload_type!r}",
            hint="this envelope was made for something else: check which file is read",
        )
    if len(fields["signatures"]) != 1:
        raise ManifestError(
            f"envelope has {len(fields['signatures'])} signatures, expected exactly one",
            hint="get the envelope again",
        )
    signature = require_object(fields["signatures"][0], _SIGNATURE_FIELDS, "signature", error=ManifestError)
    key = _embedded_key(fields["public_key"])
    key_id = public_key_id(key)
    if signature["keyid"] != key_id:
        raise ManifestError("envelope names another key than it embeds", hint="the envelope was edited: get it again")
    if signer is not None and key_id != public_key_id(signer):
        raise ManifestError(
            f"envelope is signed by {key_id}, expected {public_key_id(signer)}",
            hint="check --signer; if it is right, somebody else signed this file",
        )
    payload = decode_base64(fields["payload"], "envelope payload", error=ManifestError)
    raw_signature = decode_base64(signature["sig"], "envelope signature", error=ManifestError)
    if not signature_is_valid(raw_signature, payload, payload_type, key):
        raise ManifestError(
            f"the signature of {key_id} does not match the envelope's payload",
            hint="payload or signature was changed: get both files again from where they were made",
        )
    return Opened(payload=payload, key_id=key_id)


def load_signer(ref: str) -> ec.EllipticCurvePublicKey:
    """Return the public key (PEM, P-256) a reference points to, to pin a signer with.

    Raises:
        KeyFormatError: Not a PEM public key on P-256; other errors as `hf_wmguard.keys.read_reference`.
    """
    key = _parse_pem(read_reference(ref, what="signer", private=False))
    if key is None:
        raise KeyFormatError(
            "signer: not a P-256 public key in PEM",
            hint="use the .pub file that wmguard keygen owner wrote beside the key",
        )
    return key


def _embedded_key(text: str) -> ec.EllipticCurvePublicKey:
    key = _parse_pem(text.encode())
    # PEM has many spellings of one key (line ends, text around it, compressed points): one is accepted.
    if key is None or _pem(key) != text.encode():
        raise ManifestError(
            "envelope's public key is not a P-256 key in canonical PEM",
            hint="the envelope was edited: get it again",
        )
    return key


def _parse_pem(data: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) else None


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
