"""Cleaning removes what runs have left, but never while a step is running."""

import pytest

from components.pipeline.clean import clean
from engine import run, start, wait_for
from univigu.errors import BusyError


def test_what_runs_left_goes_and_what_is_someone_elses_stays(root):
    run(root)
    run(root, "second")
    (root / "data/second/mine.txt").write_text("mine")
    answers = root / ".univigu/answers/first/kept.sqlite"
    answers.parent.mkdir(parents=True)
    answers.write_text("paid")
    clean(root)
    assert not (root / "data/first").exists()
    assert [path.name for path in (root / "data/second").iterdir()] == ["mine.txt"]
    assert {path.name for path in (root / ".univigu").iterdir()} == {"locks", "answers"}
    assert run(root)["rows_out"] == 12


@pytest.mark.slow
def test_a_step_that_is_under_way_is_left_alone(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    with pytest.raises(BusyError, match="'first' is running"):
        clean(root)
    assert process.wait() == 0
    assert (root / "data/first/manifest.json").is_file()
