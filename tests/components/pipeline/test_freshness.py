"""When a step doesn't have to run, and what is said where it does."""

import shutil

import pytest

from components.pipeline import freshness
from engine import PROFILE, run
from univigu.errors import CorruptDataError


def edit(root, before, after):
    path = root / "steps_under_test.py"
    path.write_text(path.read_text().replace(before, after))


def test_a_step_is_finished_until_its_inputs_parameters_code_or_bytes_change(root):
    assert freshness.finished("first", PROFILE, root) is None
    manifest = run(root)
    assert freshness.finished("first", PROFILE, root) == manifest
    assert freshness.finished("first", {**PROFILE, "double": {"factor": 3}}, root) is None
    numbers = (root / "numbers.json").read_text()
    (root / "numbers.json").write_text("[1]")
    assert freshness.finished("first", PROFILE, root) is None
    (root / "numbers.json").write_text(numbers)
    assert freshness.finished("first", PROFILE, root) == manifest
    edit(root, "% 256", "% 255")
    assert freshness.finished("first", PROFILE, root) is None
    run(root)
    (root / "data/first/shards/00001/data.bin").write_bytes(b"damaged")
    assert freshness.finished("first", PROFILE, root) is None


def test_an_output_that_was_put_back_is_finished_whoever_put_it_there(root, tmp_path_factory):
    manifest = run(root)
    kept = tmp_path_factory.mktemp("cache") / "first"
    shutil.copytree(root / "data/first", kept)
    run(root, profile={**PROFILE, "double": {"factor": 3, "max_rejected_share": 0.5}})
    shutil.rmtree(root / "data/first")
    shutil.copytree(kept, root / "data/first")
    assert freshness.finished("first", PROFILE, root) == manifest
    shutil.rmtree(root / ".univigu")
    assert freshness.finished("first", PROFILE, root) == manifest


def test_a_step_whose_input_is_damaged_is_not_called_finished(root):
    run(root)
    run(root, "second")
    (root / "data/first/captions.parquet").write_bytes(b"damaged")
    with pytest.raises(CorruptDataError, match="SHA-256"):
        freshness.finished("second", PROFILE, root)


def test_what_would_start_a_step_again_is_said_by_name(root):
    assert freshness.why_not_finished("first", PROFILE, root) == "has not run"
    assert freshness.why_not_finished("second", PROFILE, root).startswith("can't run yet: There is no finished output")
    run(root)
    assert freshness.why_not_finished("first", PROFILE, root) == ""
    other = {**PROFILE, "double": {"factor": 3, "max_rejected_share": 0.5}}
    assert freshness.why_not_finished("first", other, root) == "would start again: double.factor (2 -> 3)"
    edit(root, "% 256", "% 255")
    assert freshness.why_not_finished("first", PROFILE, root) == "would start again: steps_under_test.py (double)"
    (root / "numbers.json").write_text("[1]")
    assert "the input 'raw'; steps_under_test.py (double)" in freshness.why_not_finished("first", PROFILE, root)
    (root / "data/first/manifest.json").write_text("{}")
    assert "would run again: The manifest of" in freshness.why_not_finished("first", PROFILE, root)


def test_a_recipe_holds_what_decides_a_steps_output_from_the_start_and_nothing_else(root):
    before = freshness.recipes(PROFILE, root)
    assert set(before) == {"first", "second", "batches"}
    run(root)
    assert freshness.recipes({**PROFILE, "unrelated": 1}, root) == before
    (root / "numbers.json").write_text("[1]")
    changed = freshness.recipes(PROFILE, root)
    assert all(changed[name] != before[name] for name in before)
    (root / "numbers.json").unlink()
    assert freshness.recipes(PROFILE, root)["first"] not in (before["first"], changed["first"])
