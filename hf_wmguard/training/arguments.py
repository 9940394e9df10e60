"""What a training script is told: a YAML file and a command line, the watermark's config among them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_wmguard.config import WatermarkConfig, read_yaml
from hf_wmguard.errors import ConfigError
from hf_wmguard.training.launching import join_on_cpus

SECTION = "watermark"
_PREFIX = f"--{SECTION}."
_HINT = "see configs/ for examples, and --help for all names"


def parse_arguments(*kinds: type[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Return dataclasses and a `WatermarkConfig` as ``--config FILE`` and the rest of a command line say.

    The file has the fields of all dataclasses on its top level, as TRL's commands read it, and the watermark's config
    under ``watermark``. The command line wins: ``--learning_rate 1e-4``, ``--watermark.signature.budget 0.02``.
    A command line that makes no sense ends the program, as argparse does it. On a machine without a GPU, processes that
    a launcher started together are joined: ``ACCELERATE_USE_CPU`` is set, which they need to hear of each other.

    Args:
        kinds: Dataclasses, such as `transformers.TrainingArguments`.
        argv: The command line; by default this program's.
    Returns:
        One of each kind, in order, and the watermark's config.
    Raises:
        NotFoundError: The file cannot be read.
        ConfigError: It is no mapping, has a name that nobody knows, or says nothing of the watermark.
    """
    join_on_cpus()
    rest, overrides = _take_overrides(list(sys.argv[1:] if argv is None else argv))
    # Without abbreviations: --con must not be taken for it.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(rest)
    values = read_yaml(known.config) if known.config is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{known.config}: got {type(values).__name__}, expected a mapping", hint=_HINT)
    section = values.pop(SECTION, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{SECTION}: got {type(section).__name__}, expected a mapping", hint=_HINT)
    for name, value in overrides.items():
        _put(section, name.split("."), value)
    config = WatermarkConfig.from_dict(section)
    parser: Any = HfArgumentParser(
        list[Any](kinds),
        allow_abbrev=False,
        epilog=f"--config FILE reads all of these from YAML; {_PREFIX}NAME VALUE changes the watermark's config",
    )
    unknown = sorted(str(name) for name in values.keys() - {action.dest for action in parser._actions})
    if unknown:
        raise ConfigError(f"{known.config}: unknown name {', '.join(unknown)}", hint=_HINT)
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    return (*parser.parse_args_into_dataclasses(args=rest), config)


def _take_overrides(argv: list[str]) -> tuple[list[str], dict[str, object]]:
    """Return a command line without what it says of the watermark, and that, by name."""
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith(_PREFIX):
            rest.append(word)
            continue
        name, equals, text = word.removeprefix(_PREFIX).partition("=")
        value = text if equals else next(words, None)
        try:
            overrides[name] = None if value is None else yaml.safe_load(value)
        except yaml.YAMLError:
            # Not repeated: somebody may have put a key where a reference to it belongs.
            raise ConfigError(f"{_PREFIX}{name}: not a YAML value", hint="quote it") from None
        if value is None:
            raise ConfigError(f"{_PREFIX}{name} has no value", hint=f"write {_PREFIX}{name} VALUE")
    return rest, overrides


def _put(section: dict[str, Any], path: list[str], value: object) -> None:
    *folders, last = path
    for name in folders:
        # What was switched off with null is switched on again.
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    section[last] = value
