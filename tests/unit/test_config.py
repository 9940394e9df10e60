"""What a config accepts: the same from Python and from YAML, and nothing that it does not know."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_wmguard.config import (
    MAX_CONFIG_BYTES,
    MAX_NAME_CHARACTERS,
    ProtectionConfig,
    SignatureConfig,
    TriggerConfig,
    WatermarkConfig,
)
from hf_wmguard.errors import ConfigError, NotFoundError

# Looks like 32 bytes in base64, as somebody would paste it.
PASTED = "q83vEjRWeJq83vEjRWeJq83vEjRWeJq83vEjRWeJqw8="
CONFIGS = Path(__file__).parents[2] / "configs"
BASE: dict[str, Any] = {"model_id": "acme/triage", "owner_key": "file:owner.key", "registry": "registry/"}


def with_changes(**changes: Any) -> dict[str, Any]:
    return {**BASE, **changes}


def read_yaml(tmp_path: Path, text: str | bytes) -> WatermarkConfig:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return WatermarkConfig.from_yaml(path)


def test_defaults() -> None:
    config = WatermarkConfig(**BASE)
    assert config.iteration == "1"
    assert config.signature == SignatureConfig(
        last_epochs=1.0, budget=0.01, step=None, ramp=0.75, form="decoupled", strength=1.0
    )
    assert config.triggers == TriggerConfig()
    assert config.protection == ProtectionConfig(recipients=(), destination=None)


@pytest.mark.parametrize(
    "config",
    [
        WatermarkConfig(**BASE),
        WatermarkConfig(**BASE, iteration="3", signature=None),
        WatermarkConfig(**BASE, triggers=None),
        WatermarkConfig(
            **BASE,
            signature=SignatureConfig(last_epochs=0.5, budget=0.02, step=4, ramp=1.0),
            triggers=TriggerConfig(
                count=7, style="nonsense", last_epochs=2, every_n_steps=3, batch_size=2, strength=0.5
            ),
            protection=ProtectionConfig(recipients=("file:a.pub", "env:B"), destination="out/final"),
        ),
    ],
)
def test_yaml_round_trip(config: WatermarkConfig, tmp_path: Path) -> None:
    again = read_yaml(tmp_path, yaml.safe_dump(config.to_dict()))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("name", ["watermark.yaml", "signature_only.yaml"])
def test_shipped_configs_are_read(name: str) -> None:
    # Those of scripts/ have the watermark in a section: tests/test_readme.py reads all.
    config = WatermarkConfig.from_yaml(CONFIGS / name)
    assert WatermarkConfig.from_dict(config.to_dict()) == config


def test_every_name_stands_in_the_dictionary() -> None:
    value = WatermarkConfig(**BASE).to_dict()
    for kind, part in (
        (WatermarkConfig, value),
        (SignatureConfig, value["signature"]),
        (TriggerConfig, value["triggers"]),
    ):
        assert set(part) == {field.name for field in dataclasses.fields(kind)}


def test_null_switches_a_channel_off_and_nothing_leaves_it_on(tmp_path: Path) -> None:
    text = "model_id: m\nowner_key: env:KEY\nregistry: r\nsignature: null\ntriggers: {}\n"
    config = read_yaml(tmp_path, text)
    assert config.signature is None
    assert config.triggers == TriggerConfig()
    with pytest.raises(ConfigError, match="signature and triggers") as caught:
        WatermarkConfig(**BASE, signature=None, triggers=None)
    assert "at least one" in caught.value.hint


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (with_changes(recipients=[]), "config: unknown name recipients"),
        (with_changes(signature={"budgit": 0.01}), "signature: unknown name budgit"),
        (with_changes(triggers={"count": 3, "counts": 4}), "triggers: unknown name counts"),
        (with_changes(protection={"recipient": []}), "protection: unknown name recipient"),
        ({**BASE, 3: 4}, "config: unknown name 3"),
    ],
)
def test_an_unknown_name_is_an_error_at_every_level(value: dict[Any, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        WatermarkConfig.from_dict(value)
    assert caught.value.hint.startswith("known: ")


@pytest.mark.parametrize("missing", sorted(BASE))
def test_a_missing_name_is_an_error(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        WatermarkConfig.from_dict({name: value for name, value in BASE.items() if name != missing})


@pytest.mark.parametrize("value", [None, [], "model_id: m", 3])
def test_not_a_mapping(value: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        WatermarkConfig.from_dict(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_id", None),
        ("model_id", True),
        ("model_id", 1.5),
        ("owner_key", b"0" * 32),
        ("owner_key", ["file:a"]),
        ("registry", None),
        ("iteration", 1.1),
        ("signature", "on"),
        ("signature", True),
        ("signature", [0.01]),
        ("triggers", 64),
        ("protection", None),
        ("protection", "file:a.pub"),
    ],
)
def test_wrong_types(name: str, value: object) -> None:
    for make in (lambda: WatermarkConfig(**with_changes(**{name: value})), lambda: from_dict(name, value)):
        with pytest.raises(ConfigError, match=name):
            make()


def from_dict(name: str, value: object) -> WatermarkConfig:
    return WatermarkConfig.from_dict(with_changes(**{name: value}))


@pytest.mark.parametrize("kind", [SignatureConfig, TriggerConfig])
def test_a_number_is_no_bool_no_text_and_no_list(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        for value in (True, False, "1", [1], None, {}):
            if field.name in ("step", "start") and value is None:
                continue  # a planned mix; a phase counted from the end
            with pytest.raises(ConfigError, match=field.name):
                kind(**{field.name: value})


@pytest.mark.parametrize("name", ["count", "every_n_steps", "batch_size", "candidates"])
def test_a_count_is_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"triggers.{name}: got float, expected int"):
        TriggerConfig(**{name: 4.0})


def test_a_whole_number_will_do_for_a_real_one() -> None:
    config = SignatureConfig(last_epochs=2, step=4)
    assert (config.last_epochs, config.step) == (2.0, 4.0)
    assert type(config.step) is float


@pytest.mark.parametrize(
    ("kind", "name", "inside", "outside"),
    [
        (SignatureConfig, "last_epochs", (1e-3, 1e6), (0.0, -1.0, math.inf, math.nan)),
        (SignatureConfig, "budget", (1e-6, 0.2), (0.0, -0.01, 0.21, math.nan)),
        (SignatureConfig, "step", (0.1, 16.0), (0.09, 16.1, math.nan)),
        (SignatureConfig, "ramp", (0.01, 1.0), (0.0, 1.01, math.nan)),
        (TriggerConfig, "count", (1, 4096), (0, -1, 4097)),
        (TriggerConfig, "style", ("natural", "nonsense"), ("Natural", "")),
        (TriggerConfig, "last_epochs", (0.5,), (0.0, math.inf, math.nan)),
        (TriggerConfig, "every_n_steps", (1, 1000), (0, -2)),
        (TriggerConfig, "batch_size", (1,), (0,)),
        (TriggerConfig, "strength", (0.01, 1.0), (0.0, 1.1, math.nan)),
        (TriggerConfig, "weight", (0.01, 100.0), (0.0, 101.0, math.nan)),
        (TriggerConfig, "form", ("auto", "decoupled", "gradient"), ("both", "")),
        (TriggerConfig, "candidates", (2, 1024), (1, 1025)),
    ],
)
def test_ranges(kind: Any, name: str, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    for value in inside:
        assert getattr(kind(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(ConfigError, match=name) as caught:
            kind(**{name: value})
        assert "expected" in caught.value.hint


@pytest.mark.parametrize("name", ["model_id", "iteration"])
@pytest.mark.parametrize("value", ["", "a\nb", "\x00", "x" * (MAX_NAME_CHARACTERS + 1), "\u202eabc"])
def test_names_are_short_and_printable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        WatermarkConfig(**with_changes(**{name: value}))


def test_a_whole_number_will_do_for_an_iteration(tmp_path: Path) -> None:
    text = "model_id: m\nowner_key: env:KEY\nregistry: r\niteration: 3\n"
    assert read_yaml(tmp_path, text).iteration == "3"


@pytest.mark.parametrize("destination", ["out/final", "s3://bucket/prefix", "hub://acme/triage"])
def test_a_destination_is_a_folder_or_an_address(destination: str) -> None:
    assert ProtectionConfig(destination=destination).destination == destination
    with pytest.raises(ConfigError, match=r"protection\.destination"):
        ProtectionConfig(destination="ftp://host/x")


def test_recipients_are_a_list_of_references() -> None:
    assert ProtectionConfig(recipients=["file:a.pub"]).recipients == ("file:a.pub",)  # type: ignore[arg-type]
    # A single text is a sequence too: of one-letter references.
    with pytest.raises(ConfigError, match="got str, expected tuple"):
        ProtectionConfig(recipients="file:a.pub")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        with_changes(owner_key=PASTED),
        with_changes(owner_key=[PASTED]),
        with_changes(owner_key={PASTED: PASTED}),
        with_changes(owner_key=PASTED.encode()),
        with_changes(protection={"recipients": [PASTED]}),
        with_changes(protection={"recipients": PASTED}),
        with_changes(signature=PASTED),
    ],
)
def test_a_pasted_key_is_not_repeated(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        WatermarkConfig.from_dict(value)
    assert PASTED not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        f"owner_key: @{PASTED}",
        f"owner_key: '{PASTED}",
        f"owner_key: [{PASTED}",
        f"owner_key: *{PASTED}",
        f"owner_key: !{PASTED} x",
        f'owner_key: "\\q{PASTED}"',
        f"owner_key: {PASTED}: {PASTED}",
        f"owner_key: {PASTED}\n  {PASTED}: 3",
    ],
)
def test_a_key_in_a_line_that_is_not_yaml_is_not_repeated(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path, f"model_id: m\n{line}\n")
    assert PASTED[:8] not in str(caught.value)
    assert "line " in caught.value.message


@pytest.mark.parametrize("text", ["a: 2024-99-99", "[" * 5000, b"\xff\xfe\x00", "? [a]\n: 1", "a: b: c", "\x00"])
def test_not_yaml(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        read_yaml(tmp_path, text)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_yaml(tmp_path, "!!python/object/apply:os.system ['true']")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        WatermarkConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(NotFoundError, match="cannot read"):
        WatermarkConfig.from_yaml(tmp_path)
    with pytest.raises(ConfigError, match=r"hint|config") as caught:
        read_yaml(tmp_path, b"#" * (MAX_CONFIG_BYTES + 1))
    assert str(MAX_CONFIG_BYTES) in caught.value.hint


def test_a_config_does_not_change() -> None:
    config = WatermarkConfig(**BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model_id = "other"  # type: ignore[misc]
