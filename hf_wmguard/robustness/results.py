"""What an attack left of the mark, and the file in which results pile up so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_wmguard.atomic import write_atomic
from hf_wmguard.errors import EnvironmentFault, FormatError, UsageError
from hf_wmguard.robustness.utility import Utility

STREAM_NAME = "results.jsonl"
COSTLY = 0.05
"""An attack that costs the thief more than this share of the utility is no win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One attack at one strength.

    Args:
        attack: Its name.
        family: Attacks that are shown together.
        label: How the attack and its strength are written in a table.
        axis: What the strength is; empty where it is no scale.
        strength: The strength.
        verdict: As `hf_wmguard.verify` gives it.
        log10_p: Corrected for every commitment tried.
        bit_error_rate: 0 to 1.
        payload_decoded: Whether the whole payload could be read.
        utility: After the attack; None without text, or where only names and storage changed.
        utility_before: The unattacked model's figure, None where there is no utility.
        weight_change: Norm of the change over the norm of the block matrices; None where they cannot be compared.
        seconds: Of the attack, without judging it.
    """

    attack: str
    family: str
    label: str
    axis: str
    strength: float
    verdict: str
    log10_p: float
    bit_error_rate: float
    payload_decoded: bool
    utility: Utility | None
    utility_before: float | None
    weight_change: float | None
    seconds: float

    @property
    def costly(self) -> bool:
        """Whether the attack cost so much utility that it is no win."""
        return self.utility is not None and self.utility.loss > COSTLY

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """Return the result in a plain dictionary; TypeError where it is none."""
        utility = value["utility"]
        return cls(**{**value, "utility": None if utility is None else Utility(**utility)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """An attack that was not run.

    Args:
        attack: Its name.
        family: As in `Result`.
        reason: What it lacks.
    """

    attack: str
    family: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A whole run.

    Args:
        subject: What was attacked and with what; the same in every line of a folder's results.
        results: In the order of the suite, the unattacked model first.
        skipped: What was asked for and could not be run.
    """

    subject: dict[str, Any]
    results: tuple[Result, ...]
    skipped: tuple[Skipped, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what ``results.json`` holds."""
        return asdict(self)


class ResultStream:
    """Results as lines of a file: the first says what was attacked, the others are results.

    Args:
        folder: Made where it does not exist.
        subject: What is attacked.
    Raises:
        UsageError: The folder holds results of something else, or files that no run of the suite left.
        FormatError: A line is damaged. Of the last one a killed run may have written half; it is dropped.
    """

    def __init__(self, folder: Path, subject: dict[str, Any]) -> None:
        self._path = folder / STREAM_NAME
        self.results: dict[tuple[str, float], Result] = {}
        header = json.dumps({"subject": subject}, sort_keys=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"cannot make {folder}: {error.strerror}", hint="choose another folder") from None
        if not self._path.exists():
            if any(folder.iterdir()):
                raise UsageError(f"{folder} is not empty and holds no run of the suite", hint="choose another folder")
            write_atomic(self._path, f"{header}\n".encode())
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        _check_same(folder, lines[0], subject)
        for line in lines[1:-1]:
            self._take(line)
        # What follows the last newline is half a line.
        if lines[-1]:
            write_atomic(self._path, "".join(f"{line}\n" for line in lines[:-1]).encode())

    def _take(self, line: str) -> None:
        try:
            result = Result.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{self._path} holds a damaged line: {error}", hint="start in a new folder") from None
        self.results[result.attack, result.strength] = result

    def add(self, result: Result) -> None:
        """Write one result; it is on the disk when this returns."""
        line = json.dumps(result.to_json(), sort_keys=True, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[result.attack, result.strength] = result


def _check_same(folder: Path, line: str, subject: dict[str, Any]) -> None:
    try:
        before = json.loads(line)["subject"]
        differ = sorted(key for key in {*before, *subject} if before.get(key) != subject.get(key))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FormatError(f"{folder / STREAM_NAME} is not a run of the suite", hint="choose another folder") from None
    if differ:
        raise UsageError(
            f"{folder} holds results of another run: {', '.join(differ)} differ",
            hint="choose another folder, or run it with the same model, key, text and other models",
        )
