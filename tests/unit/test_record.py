"""The private record: what the owner needs besides the key, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_wmguard.canonical import canonical_json
from hf_wmguard.errors import AuthenticationError, FormatError, NonFiniteWeightError
from hf_wmguard.keys import OwnerKey
from hf_wmguard.watermark.baseline import Baseline
from hf_wmguard.watermark.candidates import label_candidates
from hf_wmguard.watermark.carriers import Carrier
from hf_wmguard.watermark.payload import MIN_CODE_BITS
from hf_wmguard.watermark.planner import Mix
from hf_wmguard.watermark.record import SALT_BYTES, SCHEME, WatermarkRecord, trigger_key
from hf_wmguard.watermark.triggers import TriggerSet, derive_responses, derive_texts

OWNER = OwnerKey(bytes(range(32)))
STRANGER = OwnerKey(bytes(range(1, 33)))
SALT = bytes(range(100, 100 + SALT_BYTES))
CARRIERS = tuple(
    Carrier(name=f"layers.{i}.w", shape=(40, 48), row_start=0, rows=40, sides=(17, 17), rms=0.15) for i in range(5)
)
STEPS = Mix(((0.75, 700), (1.5, 600), (5.0, 145)))


def tile_of(carrier: Carrier) -> Tensor:
    draw = torch.Generator().manual_seed(len(carrier.name) + carrier.rows)
    return carrier.rms * torch.randn(carrier.rows, carrier.shape[1], generator=draw)


def make_triggers(salt: bytes = SALT, count: int = 4) -> TriggerSet:
    key = trigger_key(OWNER, "acme/triage", "3", salt)
    texts = derive_texts(key, count=count, style="natural", task="classification")
    candidates = label_candidates(count, num_labels=5)
    responses = derive_responses(key, texts, candidates)
    return TriggerSet(task="classification", style="natural", texts=texts, candidates=candidates, responses=responses)


def make(**changes: Any) -> WatermarkRecord:
    values: dict[str, Any] = {
        "model_id": "acme/triage",
        "iteration": "3",
        "salt": SALT,
        "carriers": CARRIERS,
        "triggers": make_triggers(),
        **changes,
    }
    carriers = values["carriers"]
    signature = {"steps": STEPS.of(sum(c.projections for c in carriers)), "tile_of": tile_of} if carriers else {}
    return WatermarkRecord.create(OWNER, **{**signature, **values})


@pytest.fixture(scope="module")
def record() -> WatermarkRecord:
    return make()


def test_a_record_is_derived_and_not_chosen(record: WatermarkRecord) -> None:
    assert record == make()
    assert record.scheme == SCHEME
    assert record.slot == 0
    assert bytes.fromhex(record.salt) == SALT
    assert len(bytes.fromhex(record.payload)) == 32
    changed = [
        make(model_id="acme/other"),
        make(iteration="4"),
        make(salt=bytes(SALT_BYTES)),
        WatermarkRecord.create(
            STRANGER,
            model_id="acme/triage",
            iteration="3",
            salt=SALT,
            carriers=CARRIERS,
            steps=STEPS,
            tile_of=tile_of,
        ),
    ]
    assert len({one.payload for one in (record, *changed)}) == 5
    assert len({one.key_commitment for one in (record, *changed)}) == 5


@pytest.mark.parametrize("changes", [{}, {"triggers": None}, {"carriers": ()}])
def test_json_round_trip(changes: dict[str, Any]) -> None:
    record = make(**changes)
    value = json.loads(canonical_json(record.to_json()))
    assert WatermarkRecord.from_json(value) == record


def test_a_record_holds_no_key(record: WatermarkRecord) -> None:
    text = canonical_json(record.to_json()).decode()
    for secret in (bytes(range(32)), trigger_key(OWNER, "acme/triage", "3", SALT)):
        assert secret.hex() not in text


def test_without_a_signature_there_is_no_payload() -> None:
    record = make(carriers=())
    assert record.payload == ""
    assert record.carrier_keys(OWNER) == ()


def test_carrier_keys_spell_the_payload(record: WatermarkRecord) -> None:
    keys = record.carrier_keys(OWNER)
    assert [key.carrier for key in keys] == list(CARRIERS)
    bits = torch.cat([key.bits.flatten() for key in keys])
    assert len(bits) == 5 * 17**2
    assert record.decode_payload(OWNER, 1 - 2 * bits) == record.payload
    assert record.decode_payload(OWNER, torch.zeros_like(bits)) != record.payload


@pytest.mark.parametrize("erased", [0.3, 0.45])
def test_the_payload_is_read_with_erasures_and_errors(record: WatermarkRecord, erased: float) -> None:
    soft = 1 - 2 * torch.cat([key.bits.flatten() for key in record.carrier_keys(OWNER)])
    draw = torch.Generator().manual_seed(0)
    soft[torch.rand(len(soft), generator=draw) < 0.03] *= -1
    soft[torch.rand(len(soft), generator=draw) < erased] = 0
    assert record.decode_payload(OWNER, soft) == record.payload


def test_the_payload_is_read_without_a_whole_carrier(record: WatermarkRecord) -> None:
    soft = 1 - 2 * torch.cat([key.bits.flatten() for key in record.carrier_keys(OWNER)])
    soft[289:578] = 0
    assert record.decode_payload(OWNER, soft) == record.payload


def test_every_step_is_used_as_often_as_the_record_says(record: WatermarkRecord) -> None:
    keys = record.carrier_keys(OWNER)
    steps = torch.cat([key.step.flatten() for key in keys]) / 0.15
    found, counts = torch.unique(steps.round(decimals=9), return_counts=True)
    assert tuple(zip(found.tolist(), counts.tolist(), strict=True)) == STEPS.parts
    # Spread over all carriers, so that one that is lost takes no step with it.
    for key in keys:
        assert len(torch.unique(key.step)) == 3


def test_which_projection_has_which_step_is_secret(record: WatermarkRecord) -> None:
    one = torch.cat([key.step.flatten() for key in record.carrier_keys(OWNER)])
    other = torch.cat([key.step.flatten() for key in make(salt=bytes(SALT_BYTES)).carrier_keys(OWNER)])
    assert not torch.equal(one, other)
    # As often alike as chance has it: the sum of squared shares, 0.43.
    assert 0.35 < float((one == other).double().mean()) < 0.5


def test_baselines_are_those_of_the_tiles(record: WatermarkRecord) -> None:
    for key, baseline in zip(record.carrier_keys(OWNER), record.baselines, strict=True):
        assert baseline == Baseline.measure(tile_of(key.carrier), key)


def test_a_record_does_not_print_what_is_private(record: WatermarkRecord) -> None:
    text = repr(record)
    assert len(text) < 1000
    for secret in (record.payload, "layers.0", record.baselines[0].to_json()["projections"][:20]):
        assert secret not in text
    assert not any(part in text for trigger in (record.triggers,) for part in trigger.texts)


def test_a_damaged_tile_stops_the_record() -> None:
    with pytest.raises(NonFiniteWeightError):
        make(tile_of=lambda carrier: torch.full((carrier.rows, carrier.shape[1]), torch.nan))


def test_another_owner_is_refused(record: WatermarkRecord) -> None:
    with pytest.raises(AuthenticationError, match="another owner key"):
        record.carrier_keys(STRANGER)
    with pytest.raises(AuthenticationError, match="another owner key"):
        record.decode_payload(STRANGER, torch.zeros(MIN_CODE_BITS))


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "acme/other"},
        {"iteration": "4"},
        {"slot": 1},
        {"salt": "00" * SALT_BYTES},
        {"key_commitment": "00" * 32},
    ],
)
def test_a_changed_record_does_not_open(record: WatermarkRecord, change: dict[str, Any]) -> None:
    value = record.to_json() | change
    with pytest.raises(AuthenticationError):
        WatermarkRecord.from_json(value).carrier_keys(OWNER)


def test_two_markings_share_no_direction_and_no_dither(record: WatermarkRecord) -> None:
    other = make(salt=bytes(SALT_BYTES))
    for one, two in zip(record.carrier_keys(OWNER), other.carrier_keys(OWNER), strict=True):
        overlap = (one.left.T @ two.left).abs()
        # 289 products of 40 random signs: |overlap| = 1 would be a shared direction.
        assert float(overlap.max()) < 0.85
        assert not torch.equal(one.dither, two.dither)
    assert trigger_key(OWNER, "acme/triage", "3", SALT) != trigger_key(OWNER, "acme/triage", "3", bytes(SALT_BYTES))


def test_carriers_of_one_marking_are_independent(record: WatermarkRecord) -> None:
    keys = record.carrier_keys(OWNER)
    assert len({key.dither[0, 0].item() for key in keys}) == len(keys)
    assert len({tuple(key.left[:, 0].tolist()) for key in keys}) == len(keys)


def test_same_scheme_looks_through_salts_and_norms(record: WatermarkRecord) -> None:
    # The salt chooses other tiles, even of other matrices where there are many.
    drifted = tuple(replace(carrier, rms=1.1 * carrier.rms, name=f"x.{carrier.name}") for carrier in CARRIERS)
    salt = bytes(SALT_BYTES)
    assert record.same_scheme(record)
    assert record.same_scheme(make(salt=salt, carriers=drifted, triggers=make_triggers(salt)))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": "acme/other"},
        {"iteration": "4"},
        {"carriers": CARRIERS[1:]},
        {"carriers": ()},
        {"carriers": (replace(CARRIERS[0], shape=(64, 48)), *CARRIERS[1:])},
        {"carriers": (replace(CARRIERS[0], rows=36), *CARRIERS[1:])},
        {"carriers": (replace(CARRIERS[0], basis=bytes(48 * 20)), *CARRIERS[1:])},
        {"steps": Mix(((0.75, 701), (1.5, 599), (5.0, 145)))},
        {"steps": Mix(((2.0, 1445),))},
        {"triggers": None},
        {"triggers": make_triggers(count=5)},
    ],
)
def test_same_scheme_sees_another_model_or_config(record: WatermarkRecord, changes: dict[str, Any]) -> None:
    assert not record.same_scheme(make(**changes))
    assert not make(**changes).same_scheme(record)


def malformed() -> Iterator[tuple[str, Any]]:
    value = make().to_json()
    for name in value:
        yield f"no {name}", {key: item for key, item in value.items() if key != name}
        yield f"{name} is an object in a list", value | {name: [{}]}
    changes: dict[str, list[Any]] = {
        "scheme": ["stdm-rank1/1", "", None],
        "salt": ["", "00", "zz" * 32, "00" * 33, "AB" * 32, 5, None],
        "key_commitment": ["", "zz" * 32, None],
        "payload": ["", "00", "zz" * 32, None],
        "carriers": [[], None, "x", {}, [None], value["carriers"][:3], [*value["carriers"], value["carriers"][0]]],
        "steps": [[], None, {}, [[0.75, 700]], [[0.75, 1445.0]], [*value["steps"], [9.0, 1]], [["0.75", 1445]]],
        "baselines": [
            [],
            None,
            value["baselines"][1:],
            [value["baselines"][0] | {"row_norms": ""}, *value["baselines"][1:]],
            [value["baselines"][0] | {"column_norms": value["baselines"][0]["row_norms"]}, *value["baselines"][1:]],
        ],
        "triggers": [[], {}, "x", value["triggers"] | {"task": "other"}],
        "slot": [None, "0", 0.0, True],
        "model_id": [None, 5],
        "extra": [1],
    }
    for name, items in changes.items():
        for index, item in enumerate(items):
            yield f"{name}-{index}", value | {name: item}
    nothing = make(carriers=()).to_json()
    yield "payload without carriers", nothing | {"payload": "00" * 32}
    yield "steps without carriers", nothing | {"steps": [[2.0, 1445]]}
    yield "baselines without carriers", nothing | {"baselines": value["baselines"]}
    yield "a list", []
    yield "nothing", None


@pytest.mark.parametrize("value", [pytest.param(value, id=name) for name, value in malformed()])
def test_a_malformed_record_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        WatermarkRecord.from_json(value)
