"""The file of results: what a killed run leaves is taken up, what is not ours is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_wmguard.errors import EnvironmentFault, FormatError, UsageError
from hf_wmguard.robustness.results import STREAM_NAME, Result, ResultStream
from hf_wmguard.robustness.utility import Utility

SUBJECT = {"sha256": "ab", "quick": False}
RESULT = Result(
    attack="noise",
    family="noise",
    label="Gaussian 0.1 x rms",
    axis="noise, x rms",
    strength=0.1,
    verdict="detected",
    log10_p=-100.5,
    bit_error_rate=0.25,
    payload_decoded=True,
    utility=Utility(name="accuracy", value=0.9, loss=0.1),
    utility_before=1.0,
    weight_change=None,
    seconds=0.5,
)


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    stream = ResultStream(tmp_path / "new" / "out", SUBJECT)
    plain = replace(RESULT, attack="bf16", strength=0, utility=None, utility_before=None, weight_change=0.1)
    for result in (RESULT, plain):
        stream.add(result)
    again = ResultStream(tmp_path / "new" / "out", dict(SUBJECT))
    assert again.results == {("noise", 0.1): RESULT, ("bf16", 0): plain}
    assert (RESULT.costly, plain.costly) == (True, False)
    assert not replace(RESULT, utility=Utility(name="accuracy", value=0.95, loss=0.05)).costly


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_half_a_line_is_dropped_and_the_run_goes_on(tmp_path: Path, cut: int) -> None:
    stream = ResultStream(tmp_path, SUBJECT)
    stream.add(RESULT)
    stream.add(replace(RESULT, strength=0.3))
    path = tmp_path / STREAM_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    again = ResultStream(tmp_path, SUBJECT)
    assert set(again.results) == {("noise", 0.1)}
    again.add(replace(RESULT, strength=0.3))
    assert [json.loads(line).get("strength") for line in path.read_text().splitlines()] == [None, 0.1, 0.3]


@pytest.mark.parametrize("changed", [{"sha256": "cd"}, {"quick": True}, {"base": "x"}])
def test_results_of_something_else_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    ResultStream(tmp_path, SUBJECT).add(RESULT)
    with pytest.raises(UsageError, match=next(iter(changed))):
        ResultStream(tmp_path, {**SUBJECT, **changed})


@pytest.mark.parametrize("line", ["not json", "[]", '{"attack": "noise"}', json.dumps(RESULT.to_json() | {"more": 1})])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    ResultStream(tmp_path, SUBJECT).add(RESULT)
    path = tmp_path / STREAM_NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1], ""]))
    with pytest.raises(FormatError, match="damaged line"):
        ResultStream(tmp_path, SUBJECT)


@pytest.mark.parametrize("first", ["", "[]\n", '{"x": 1}\n', '{"subject": 1}\n'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, first: str) -> None:
    (tmp_path / STREAM_NAME).write_text(first)
    with pytest.raises(FormatError, match="not a run of the suite"):
        ResultStream(tmp_path, SUBJECT)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        ResultStream(tmp_path, SUBJECT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(EnvironmentFault):
        ResultStream(tmp_path / "thesis.txt", SUBJECT)
