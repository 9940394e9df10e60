"""Addresses of stores."""

from __future__ import annotations

import pytest

from hf_wmguard.errors import ConfigError
from hf_wmguard.stores.location import Location, is_location, parse_location


@pytest.mark.parametrize(
    ("text", "root", "path", "revision"),
    [
        ("hub://acme/triage", "acme/triage", "", None),
        ("hub://acme/triage@v1.0", "acme/triage", "", "v1.0"),
        ("hub://acme/triage@refs/pr/3", "acme/triage", "", "refs/pr/3"),
        ("hub://acme/triage/checkpoint-10@main", "acme/triage", "checkpoint-10", "main"),
        ("s3://models", "models", "", None),
        ("s3://models/acme/triage/", "models", "acme/triage", None),
        ("hub://acme/triage/", "acme/triage", "", None),
        ("s3://models/a@b", "models", "a@b", None),
    ],
)
def test_an_address_is_read_and_written(text: str, root: str, path: str, revision: str | None) -> None:
    location = parse_location(text)
    assert (location.root, location.path, location.revision) == (root, path, revision)
    assert str(location) == text.rstrip("/")
    assert parse_location(str(location)) == location


@pytest.mark.parametrize(
    "text",
    [
        "",
        "folder",
        "ftp://host/x",
        "hub://",
        "hub://name",
        "hub://org/name@",
        "hub://org/name@../x",
        "hub://org/../name",
        "hub://org/name/../x",
        "hub://org/name/a//b",
        "s3://",
        "s3://B",
        "s3://bucket/a/../b",
        "s3://bucket/a\nb",
        "s3://" + "b" * 3000,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_location(text)


def test_a_file_lies_below_the_path() -> None:
    assert Location(scheme="s3", root="b", path="p").key("x.json") == "p/x.json"
    assert Location(scheme="s3", root="b").key("x.json") == "x.json"


@pytest.mark.parametrize(("value", "expected"), [("hub://x", True), ("s3://b/p", True), ("a/b", False), (None, False)])
def test_an_address_is_told_from_a_path(value: object, expected: bool) -> None:
    assert is_location(value) is expected
