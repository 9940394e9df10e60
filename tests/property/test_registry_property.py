"""Whatever is written reads back the same, and no other bytes do."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_wmguard.canonical import canonical_json, parse_canonical
from hf_wmguard.errors import FormatError, IntegrityError, ManifestError
from hf_wmguard.evidence.manifest import FileEntry, Manifest, SignatureSummary, TriggerSummary
from hf_wmguard.evidence.registry import Registry
from hf_wmguard.evidence.signing import open_envelope, sign
from hf_wmguard.keys import OwnerKey

OWNER = OwnerKey(bytes(range(32)))
TYPE = "application/vnd.test+json"

numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.text(max_size=8), values, max_size=4)

# Signatures and salts make the lengths differ from run to run; what hypothesis draws must not depend on them.
PLACES = st.integers(0, 1 << 30)


def hexes(low: int, high: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=low, max_size=high).map(bytes.hex)


def printable(high: int) -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=high).filter(str.isprintable)


names = printable(40).filter(lambda name: not set(name) & set("/\\:") and name not in (".", ".."))
times = st.datetimes(min_value=datetime.datetime(1000, 1, 1)).map(lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ"))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    committed = draw(st.booleans())
    files = {
        name: FileEntry(name=name, size_bytes=draw(st.integers(0, 1 << 53)), sha256=draw(hexes(32, 32)))
        for name in draw(st.sets(names, min_size=1, max_size=5))
    }
    return Manifest(
        model_id=draw(printable(256)),
        iteration=draw(printable(20)),
        set_id=draw(hexes(8, 64)),
        created=draw(times),
        step=draw(st.none() | st.integers(0, 1 << 40)),
        state=draw(st.sampled_from(("pending", "ramping", "complete"))),
        files=tuple(files[name] for name in sorted(files)),
        dek_commitment=draw(hexes(8, 64)),
        commitment="sha256:" + draw(hexes(32, 32)) if committed else None,
        commitment_time=draw(times) if committed else None,
        signature=draw(
            st.none()
            | st.builds(
                SignatureSummary,
                bit_error_rate=st.floats(0, 1),
                log10_p=st.floats(-1e6, 0),
                projections=st.integers(1, 1 << 30),
                payload_decoded=st.booleans(),
                weight_change=st.floats(0, 10),
            )
        ),
        triggers=draw(
            st.none()
            | st.builds(
                TriggerSummary,
                count=st.integers(1, 1000),
                candidates=st.integers(2, 1 << 20),
                match_rate=st.none() | st.floats(0, 1),
            )
        ),
        sealed_state=draw(st.none() | st.just("c2VhbGVk")),
        commitment_timestamp="dG9rZW4=" if committed and draw(st.booleans()) else None,
    )


@given(values)
def test_canonical_json_round_trip(value: Any) -> None:
    data = canonical_json(value)
    assert canonical_json(parse_canonical(data, "value", len(data))) == data


@given(st.binary(max_size=60))
def test_whatever_parses_has_one_spelling(data: bytes) -> None:
    try:
        value = parse_canonical(data, "value", 60)
    except FormatError:
        return
    assert canonical_json(value) == data


@given(manifests())
@settings(max_examples=60, deadline=None)
def test_manifest_round_trip(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data


@given(manifests(), st.data())
@settings(max_examples=60, deadline=None)
def test_cut_manifest_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    whole = manifest.to_bytes()
    with pytest.raises(ManifestError):
        Manifest.from_bytes(whole[: data.draw(PLACES) % len(whole)])


@given(values)
@settings(max_examples=60, deadline=None)
def test_any_other_json_is_refused_as_a_manifest(value: Any) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(canonical_json(value))


@given(st.binary(max_size=300), st.data())
@settings(max_examples=60, deadline=None)
def test_envelope_round_trip_and_any_changed_byte(payload: bytes, data: st.DataObject) -> None:
    envelope = sign(payload, TYPE, OWNER)
    assert open_envelope(envelope, payload_type=TYPE, signer=None).payload == payload
    changed = bytearray(envelope)
    changed[data.draw(PLACES) % len(envelope)] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ManifestError):
        open_envelope(bytes(changed), payload_type=TYPE, signer=None)


@given(st.lists(bodies, min_size=1, max_size=4), st.data())
@settings(max_examples=30, deadline=None)
def test_registry_round_trip_and_any_changed_byte(written: list[dict[str, Any]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder), OWNER)
        for body in written:
            registry.append("commitment", body)
        assert [canonical_json(dict(entry.body)) for entry in registry.entries()] == [
            canonical_json(body) for body in written
        ]
        log = Path(folder) / "log.jsonl"
        changed = bytearray(log.read_bytes())
        changed[data.draw(PLACES) % len(changed)] ^= data.draw(st.integers(1, 255))
        log.write_bytes(changed)
        with pytest.raises(IntegrityError):
            registry.entries()
