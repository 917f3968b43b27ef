"""The record of evaluations: added to, whole at every moment, and never in place of something else."""

import json
import math
from pathlib import Path

import pytest

from lit_recon.evaluate.record import add, check_record, read_record


def test_an_evaluation_is_added_behind_the_others_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "evaluations.json"
    add(path, {"checkpoint": "a", "nats": math.nan})
    add(path, {"checkpoint": "b", "perplexity": [math.inf, 1.5]})
    expected = [{"checkpoint": "a", "nats": None}, {"checkpoint": "b", "perplexity": [None, 1.5]}]
    assert json.loads(path.read_text()) == {"version": 1, "evaluations": expected}
    assert [one.name for one in path.parent.iterdir()] == [path.name], "nothing else is left"


def test_keys_of_later_versions_stay(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.json"
    path.write_text(json.dumps({"version": 1, "evaluations": [{"checkpoint": "a", "new": {"key": 1}}]}))
    add(path, {"checkpoint": "b"})
    assert read_record(path)[0] == {"checkpoint": "a", "new": {"key": 1}}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"evaluations": {}}', '{"version": 1}', "\0" * 100, "[" * 100_000])
def test_a_file_that_is_no_record_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "evaluations.json"
    path.write_text(content)
    for refuse in (read_record, check_record, lambda path: add(path, {})):
        with pytest.raises(ValueError, match="is no record of evaluations .*; move it away, or give record=<file>"):
            refuse(path)
    assert path.read_text() == content


def test_a_record_in_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give record=<file>"):
        check_record(tmp_path / "file" / "evaluations.json")
