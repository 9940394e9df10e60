"""The settings that docs/quality.md shows are the defaults."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from hf_wmguard.config import QualityConfig

DOCS = (Path(__file__).parent.parent / "docs" / "quality.md").read_text()


def test_the_documented_defaults_are_the_defaults() -> None:
    found = re.search(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    assert found is not None
    assert QualityConfig(**yaml.safe_load(found[1])["quality"]) == QualityConfig()
