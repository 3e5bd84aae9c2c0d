"""People's edits: a file that only grows, and that is an input of a step as long as an edit is in force."""

import json
from dataclasses import replace

import pytest

import engine
from components.pipeline import freshness, stages
from components.pipeline.edits import Edit, add_edit, in_force, read_edits, settle, text_digest
from components.pipeline.fingerprint import code_digest
from components.pipeline.stages import EDITS
from engine import PROFILE, run
from univigu.errors import BusyError, ConfigError, CorruptDataError

HOOK = """
def edit(step, name, table):
    dropped = [edit.id for edit in step.edits]
    for clip in dropped:
        step.reject(clip, "excluded")
    return table.filter([clip not in dropped for clip in table["clip_id"].to_pylist()])
"""
VIDEO = "a" * 64


@pytest.fixture
def edited(root, monkeypatch):
    """The engine's steps, of which `second` obeys edits."""
    (root / "steps_under_test.py").write_text(engine.MODULE + HOOK)
    second = replace(engine.SECOND, edits="steps_under_test:edit")
    monkeypatch.setattr(stages, "STAGES", (engine.FIRST, second, engine.BATCHES))
    return root


def exclude(root, clip, seen=0):
    return add_edit(root, {"action": "exclude", "id": clip, "of": VIDEO, "by": "Ann"}, seen)


def test_an_edit_starts_its_step_again_and_an_undone_one_leaves_the_key_as_it_was(edited):
    run(edited)
    before = run(edited, "second")
    write = (edited / EDITS).write_text
    for empty in (None, '{"version": 1, "entries": []}'):
        if empty:
            write(empty)
        assert freshness.finished("second", PROFILE, edited) == before
    recipes = freshness.recipes(PROFILE, edited)
    exclude(edited, "003")
    assert freshness.finished("first", PROFILE, edited)
    why = freshness.why_not_finished("second", PROFILE, edited)
    assert why == "would start again: the input 'edits'; steps_under_test.py (edit)"
    after = freshness.recipes(PROFILE, edited)
    assert (after["first"], after["second"] != recipes["second"]) == (recipes["first"], True)
    manifest = run(edited, "second")
    assert (manifest["rows_in"], manifest["rows_out"], manifest["reasons"]) == (12, 11, {"excluded": 1})
    add_edit(edited, {"action": "undo", "id": "003", "undoes": 1}, 1)
    assert freshness.recipes(PROFILE, edited) == recipes
    again = run(edited, "second")
    assert [again[name] for name in ("digest", "inputs")] == [before[name] for name in ("digest", "inputs")]
    assert code_digest(again["code"]) == code_digest(before["code"])


def test_what_people_exclude_fails_no_gate(edited):
    run(edited)
    for number in range(11):
        exclude(edited, f"{number:03d}")
    assert run(edited, "second")["rows_out"] == 1


def test_captions_replace_what_they_were_made_against_and_nothing_else():
    first = Edit(number=1, action="caption", id="c", of=text_digest("old"), caption="new")
    second = Edit(number=2, action="caption", id="c", of=text_digest("new"), caption="newer")
    gone = Edit(number=3, action="exclude", id="c", of=VIDEO)
    assert settle([first, second, gone], "old", VIDEO) == (True, "newer", ())
    assert settle([first, second, gone], "made anew", "b" * 64) == (False, None, (1, 2, 3))
    assert settle([second], None, VIDEO) == (False, None, (2,))
    assert settle([Edit(number=1, action="caption", id="c", caption="x")], None, VIDEO).caption == "x"


def test_of_two_who_edit_the_same_clip_the_second_is_told(tmp_path):
    exclude(tmp_path, "c")
    with pytest.raises(BusyError, match="clip 'c' was edited after you opened it"):
        add_edit(tmp_path, {"action": "undo", "id": "c", "undoes": 1}, 0)
    assert exclude(tmp_path, "another").number == 2
    add_edit(tmp_path, {"action": "undo", "id": "c", "undoes": 1}, 1)
    lines = read_edits(tmp_path)
    assert [line.action for line in lines] == ["exclude", "exclude", "undo"]
    assert [line.number for line in in_force(lines)] == [2]


def test_a_damaged_or_unbounded_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"caption: String should have at most 8000"):
        add_edit(tmp_path, {"action": "caption", "id": "c", "caption": "a" * 8001}, 0)
    good = {"number": 1, "action": "exclude", "id": "c", "of": VIDEO}
    (tmp_path / EDITS).parent.mkdir(exist_ok=True)
    for entries, said in (
        ([good | {"number": 2}], "line 1 has the number 2"),
        ([good | {"more": 1}], "more: Extra inputs"),
        ([good | {"of": "x"}], "of: String should match"),
        ([good, {"number": 2, "action": "undo", "id": "d", "undoes": 1}], "not the last edit of its clip"),
        (7, "not a list of at most"),
    ):
        (tmp_path / EDITS).write_text(json.dumps({"version": 1, "entries": entries}))
        with pytest.raises(CorruptDataError, match=said):
            read_edits(tmp_path)
    for content in ("{", "[]", '{"version": 2, "entries": []}'):
        (tmp_path / EDITS).write_text(content)
        with pytest.raises(CorruptDataError, match="holds people's edits and can't be read"):
            read_edits(tmp_path)
