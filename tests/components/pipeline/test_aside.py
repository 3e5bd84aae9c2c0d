"""Work that doesn't fit the recipe any more is set aside, named, and taken up again when asked to."""

import json
import shutil
import signal

import pytest

from components.pipeline import aside, freshness, runner
from components.pipeline.manifests import MANIFEST
from components.pipeline.workspace import Part
from engine import PROFILE, made, run, snapshot, start, wait_for
from univigu.errors import BadInputError, MissingInputError

OTHER = {**PROFILE, "double": {"factor": 3, "max_rejected_share": 0.5}}


def edit(root, before="% 256", after="% 255"):
    path = root / "steps_under_test.py"
    path.write_text(path.read_text().replace(before, after))


def kill_after_first_shard(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "4")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert made(root) == ["0"]


def leave_checkpoint(root, step, content="weights"):
    """What a training that was killed leaves in its scratch, with the key and recipe that the last run noted."""
    folder = root / ".univigu/scratch" / step / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step-00000004").write_text(content)


def stop_halfway(root, profile, monkeypatch):
    monkeypatch.setenv("FAIL", "2")  # ENOENT: an unexpected failure
    with pytest.raises(OSError, match="no room"):
        run(root, "second", profile)
    monkeypatch.delenv("FAIL")


def test_shards_of_a_killed_run_are_set_aside_when_the_code_changes_and_taken_up_again(root, capfd):
    kill_after_first_shard(root)
    edit(root)
    run(root)
    assert made(root) == ["0", "4", "8"]
    (place,) = aside.list_kept(root, "first")
    assert (place / "shards/00000/data.bin").read_bytes() == bytes([0, 2, 4, 6])
    said = capfd.readouterr().err
    assert f"Its finished work is kept in {place}; `univigu run first --resume-from {place}`" in said

    shutil.rmtree(root / "data/first")
    shutil.rmtree(root / ".univigu/shards")
    runner.resume("first", PROFILE, root, place)
    manifest = run(root)
    assert made(root) == ["4", "8"]
    assert [key[:12] for key in manifest["resumed_from"]] == [place.name]
    assert freshness.finished("first", PROFILE, root) == manifest


def test_finished_shards_of_the_output_are_kept_when_the_same_rows_are_made_in_another_way(root, capfd):
    run(root)
    before = snapshot(root / "data/first/shards")
    made(root)
    run(root, profile=OTHER)
    (place,) = aside.list_kept(root, "first")
    assert snapshot(place / "shards") == before
    assert "first starts again: double.factor (2 -> 3). Its finished work is kept in" in capfd.readouterr().err
    made(root)
    runner.resume("first", PROFILE, root, place)
    run(root)
    assert made(root) == []
    assert snapshot(root / "data/first/shards") == before


def test_shards_of_other_rows_are_replaced_without_a_word(root, capfd):
    run(root)
    (root / "numbers.json").write_text(json.dumps([*range(50, 62)]))
    run(root)
    assert aside.list_kept(root) == []
    assert "kept" not in capfd.readouterr().err


def test_an_outputs_own_shards_can_be_taken_over_when_only_code_has_changed(root):
    run(root)
    before = snapshot(root / "data/first/shards")
    made(root)
    edit(root)
    runner.resume("first", PROFILE, root, root / "data/first")
    manifest = run(root)
    assert made(root) == []
    assert snapshot(root / "data/first/shards") == before
    assert len(manifest["resumed_from"]) == 1


def test_checkpoints_are_moved_aside_and_named_never_deleted(root, monkeypatch, capfd):
    run(root)
    stop_halfway(root, PROFILE, monkeypatch)
    leave_checkpoint(root, "second")
    run(root, "second", OTHER)
    (place,) = aside.list_kept(root, "second")
    assert (place / "scratch/checkpoints/step-00000004").read_text() == "weights"
    assert (
        f"second starts again: double.factor (2 -> 3). Its finished work is kept in {place}" in capfd.readouterr().err
    )


def test_checkpoints_are_taken_up_again_by_another_recipe(root, monkeypatch):
    run(root)
    stop_halfway(root, PROFILE, monkeypatch)
    leave_checkpoint(root, "second")
    stop_halfway(root, OTHER, monkeypatch)
    (place,) = aside.list_kept(root, "second")
    runner.resume("second", OTHER, root, place)
    assert (root / ".univigu/scratch/second/checkpoints/step-00000004").read_text() == "weights"
    manifest = run(root, "second", OTHER)
    assert len(manifest["resumed_from"]) == 1
    assert (place / "scratch/checkpoints/step-00000004").read_text() == "weights"


def test_checkpoints_of_the_same_recipe_stay_where_they_are(root, monkeypatch):
    run(root)
    stop_halfway(root, PROFILE, monkeypatch)
    leave_checkpoint(root, "second")
    stop_halfway(root, PROFILE, monkeypatch)
    assert (root / ".univigu/scratch/second/checkpoints/step-00000004").exists()
    assert aside.list_kept(root) == []


def test_two_lots_of_the_same_recipe_are_both_kept(root, monkeypatch):
    run(root)
    for content in ("first lot", "second lot"):
        stop_halfway(root, PROFILE, monkeypatch)
        leave_checkpoint(root, "second", content)
        run(root, "second", OTHER)
    kept = [place / "scratch/checkpoints/step-00000004" for place in aside.list_kept(root, "second")]
    assert {path.read_text() for path in kept} == {"first lot", "second lot"}


def test_a_fresh_start_sets_everything_aside_also_what_was_paid_for(root):
    run(root)
    made(root)
    answers = root / ".univigu/answers/first/kept.sqlite"
    answers.parent.mkdir(parents=True)
    answers.write_text("paid")
    runner.restart("first", PROFILE, root)
    assert not answers.exists()
    run(root)
    assert made(root) == ["0", "4", "8"]
    (place,) = aside.list_kept(root, "first")
    assert (place / "answers/kept.sqlite").read_text() == "paid"
    runner.resume("first", PROFILE, root, place)
    assert answers.read_text() == "paid"


def test_parts_set_aside_what_another_recipe_left(root):
    assert runner.run_part("first", PROFILE, root, Part(1, 2)) == {"made": 2, "kept": 0}
    edit(root)
    assert runner.run_part("first", PROFILE, root, Part(2, 2)) == {"made": 1, "kept": 0}
    (place,) = aside.list_kept(root, "first")
    assert {path.name for path in (place / "shards").iterdir()} == {"00000", "00002"}


def test_nothing_to_go_on_from_is_said_with_what_there_is(root):
    run(root)
    with pytest.raises(MissingInputError, match="none of its work is set aside"):
        runner.resume("first", PROFILE, root, root / "data")
    run(root, profile=OTHER)
    with pytest.raises(MissingInputError, match=r"its set-aside work is in .*aside/first/"):
        runner.resume("first", PROFILE, root, root / "data")


def test_the_place_where_a_step_works_is_no_place_to_resume_from(root, monkeypatch):
    run(root)
    stop_halfway(root, PROFILE, monkeypatch)
    leave_checkpoint(root, "second")
    with pytest.raises(BadInputError, match="run it without --resume-from"):
        runner.resume("second", PROFILE, root, root / ".univigu/scratch/second")


def test_a_damaged_output_is_set_aside_for_a_person(root, capfd):
    run(root)
    table = root / "data/first/captions.parquet"
    table.write_bytes(b"damaged")
    run(root)
    (place,) = aside.list_kept(root, "first")
    assert (place / "output/captions.parquet").read_bytes() == b"damaged"
    assert (place / "output" / MANIFEST).is_file()
    assert f"the damaged output is set aside in {place}" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"{}", b"[1]", b'{"parameters": 1}'])
def test_notes_that_are_damaged_are_no_reason_to_fail_or_to_delete(root, monkeypatch, content):
    run(root)
    stop_halfway(root, PROFILE, monkeypatch)
    leave_checkpoint(root, "second")
    for name in (aside.KEY_FILE, aside.RECIPE_FILE, aside.RESUMED_FILE):
        (root / ".univigu/scratch/second" / name).write_bytes(content)
    run(root, "second")
    (place,) = aside.list_kept(root, "second")
    assert (place / "scratch/checkpoints/step-00000004").read_text() == "weights"
