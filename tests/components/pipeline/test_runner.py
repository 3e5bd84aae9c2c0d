"""What running a step promises: an output is absent, or complete and verified."""

import errno
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from components.pipeline import runner, stages
from components.pipeline.manifests import read_manifest, write_manifest
from components.pipeline.tables import read_table
from components.pipeline.workspace import Part
from engine import FIRST, PROFILE, SECOND, made, run, snapshot, start, wait_for
from univigu.errors import (
    BadInputError,
    BusyError,
    ConfigError,
    CorruptDataError,
    DiskFullError,
    GateFailedError,
    MissingInputError,
)


def test_an_output_is_complete_and_its_manifest_names_every_file(root):
    manifest = run(root)
    home = root / "data/first"
    assert set(manifest["files"]) == set(snapshot(home)) - {"manifest.json"}
    assert runner.verify(home, "first") == manifest
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (12, 12, 0)
    assert [row["text"] for row in read_table(home, "captions").to_pylist()] == [str(2 * n) for n in range(12)]


def test_equal_inputs_give_equal_bytes_elsewhere(root, tmp_path_factory):
    run(root)
    other = tmp_path_factory.mktemp("other")
    (other / "numbers.json").write_text((root / "numbers.json").read_text())
    run(other)
    assert snapshot(root / "data/first") == snapshot(other / "data/first")


def test_a_second_run_keeps_every_shard(root):
    run(root)
    assert made(root) == ["0", "4", "8"]
    before = snapshot(root / "data/first")
    run(root)
    assert made(root) == []
    assert snapshot(root / "data/first") == before


def test_only_the_damaged_shard_is_made_again(root):
    run(root)
    before = snapshot(root / "data/first")
    made(root)
    (root / "data/first/shards/00001/data.bin").write_bytes(b"damaged")
    run(root)
    assert made(root) == ["4"]
    assert snapshot(root / "data/first") == before


def test_a_changed_parameter_makes_every_shard_again(root):
    run(root)
    made(root)
    run(root, profile={**PROFILE, "double": {"factor": 3, "max_rejected_share": 0.5}})
    assert made(root) == ["0", "4", "8"]


def test_bad_rows_are_quarantined_with_their_reason_also_from_a_kept_shard(root):
    (root / "numbers.json").write_text(json.dumps([*range(10), -1, -2]))
    for _ in range(2):
        manifest = run(root)
        assert manifest["reasons"] == {"negative": 2}
        rejected = read_table(root / "data/first", "rejected").to_pylist()
        assert [(row["id"], row["reason"], json.loads(row["row"])) for row in rejected] == [
            ("-1", "negative", {"n": -1}),
            ("-2", "negative", {"n": -2}),
        ]


def test_too_many_bad_rows_fail_the_step_and_leave_the_last_output(root):
    run(root)
    before = snapshot(root / "data/first")
    (root / "numbers.json").write_text(json.dumps([-1, -2, -3, 4]))
    with pytest.raises(GateFailedError, match=r"rejected 3 of 4 rows.*negative 3"):
        run(root)
    assert snapshot(root / "data/first") == before


def test_a_missing_a_cut_and_a_changed_input_are_told_apart(root):
    with pytest.raises(MissingInputError, match="run `univigu run first` first"):
        run(root, "second")
    run(root)
    table = root / "data/first/captions.parquet"
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(CorruptDataError, match="SHA-256"):
        run(root, "second")
    table.unlink()
    with pytest.raises(CorruptDataError, match="missing"):
        run(root, "second")


def test_a_step_that_shares_a_folder_leaves_its_neighbours_alone(root):
    run(root)
    (root / "data/second").mkdir()
    (root / "data/second/run.json").write_text("{}")
    run(root, "second")
    run(root, "second")
    assert {"run.json", "captions.parquet", "manifest.json"} <= {path.name for path in (root / "data/second").iterdir()}


def test_a_path_outside_the_work_root_is_refused(root):
    with pytest.raises(BadInputError, match="leaves the work root"):
        run(root, profile={**PROFILE, "source": "../numbers.json"})


def test_a_full_disk_is_one_sentence_and_leaves_the_output_absent(root, monkeypatch):
    run(root)
    monkeypatch.setenv("FAIL", str(errno.ENOSPC))
    with pytest.raises(DiskFullError, match="free some space"):
        run(root, "second")
    assert not (root / "data/second").exists()


def test_a_killed_run_leaves_nothing_then_goes_on_where_it_was(root, tmp_path_factory):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "4")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "data/first").exists()
    assert made(root) == ["0"]
    run(root)
    assert made(root) == ["4", "8"]
    whole = tmp_path_factory.mktemp("whole")
    (whole / "numbers.json").write_text((root / "numbers.json").read_text())
    run(whole)
    assert snapshot(root / "data/first") == snapshot(whole / "data/first")


def test_temporary_files_of_a_killed_step_go_with_the_next_run(root, tmp_path):
    (tmp_path / "tmp").mkdir()
    assert start(root, DIE="1", TMPDIR=str(tmp_path / "tmp")).wait() == 9
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(list(root.rglob("left-*"))) == 1
    run(root)
    assert list(root.rglob("left-*")) == []


@pytest.mark.slow
def test_a_second_run_at_the_same_time_is_turned_away(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    with pytest.raises(BusyError, match="is running"):
        run(root)
    assert process.wait() == 0
    assert runner.verify(root / "data/first", "first")["rows_out"] == 12


def test_an_output_that_is_no_longer_made_is_taken_away(root, monkeypatch):
    run(root)
    (root / "data/first/captions.parquet").rename(root / "data/first/old.parquet")
    manifest = read_manifest(root / "data/first", "first")
    manifest["files"]["old.parquet"] = manifest["files"].pop("captions.parquet")
    write_manifest(root / "data/first", manifest)
    monkeypatch.setattr(stages, "STAGES", (replace(FIRST), SECOND))
    run(root)
    assert not (root / "data/first/old.parquet").exists()


def test_shards_of_a_killed_run_over_more_rows_are_not_committed(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "8")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (root / "numbers.json").write_text(json.dumps([0, 1]))
    run(root)
    assert {path.name for path in (root / "data/first/shards").iterdir()} == {"00000"}


def test_what_a_killed_commit_left_behind_goes_with_the_next(root):
    run(root)
    (root / "data/first/manifest.json").unlink()
    (root / "data/first/half.parquet").write_bytes(b"half")
    manifest = run(root)
    assert set(manifest["files"]) == set(snapshot(root / "data/first")) - {"manifest.json"}


def test_the_rows_that_failed_a_gate_are_kept_for_people(root):
    (root / "numbers.json").write_text(json.dumps([-1, -2, -3, 4]))
    with pytest.raises(GateFailedError, match=r"they are in (.*)\.$") as failed:
        run(root)
    kept = Path(re.search(r"they are in (.*)\.$", str(failed.value))[1])
    assert [row["id"] for row in read_table(kept.parent, "rejected").to_pylist()] == ["-1", "-2", "-3"]


def test_a_manifest_that_is_not_ours_is_damaged(root):
    run(root)
    (root / "data/first/manifest.json").write_text("[1, 2]")
    with pytest.raises(CorruptDataError, match="damaged"):
        run(root, "second")


def test_parts_made_at_once_and_then_committed_give_the_bytes_of_one_run(root, tmp_path_factory):
    (root / "numbers.json").write_text(json.dumps([*range(30), -1]))
    processes = [start(root, f"{number}/3") for number in (1, 2, 3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not (root / "data/first").exists()
    assert sorted(made(root), key=int) == ["0", "4", "8", "12", "16", "20", "24", "28"]
    run(root)
    assert made(root) == []
    whole = tmp_path_factory.mktemp("whole")
    (whole / "numbers.json").write_text((root / "numbers.json").read_text())
    run(whole)
    assert snapshot(root / "data/first") == snapshot(whole / "data/first")


def test_a_part_makes_every_nth_shard_and_a_second_time_none(root):
    assert runner.run_part("first", PROFILE, root, Part(2, 2)) == {"made": 1, "kept": 0}
    assert made(root) == ["4"]
    assert runner.run_part("first", PROFILE, root, Part(2, 2)) == {"made": 0, "kept": 1}
    run(root)
    assert made(root) == ["0", "8"]
    assert runner.run_part("first", PROFILE, root, Part(1, 2)) == {"made": 0, "kept": 2}
    assert runner.run_part("first", PROFILE, root, Part(7, 8)) == {"made": 0, "kept": 0}
    assert not (root / ".univigu/staging/first/shards").exists()


def test_a_killed_part_leaves_its_finished_shards_to_whoever_comes_next(root):
    process = start(root, "1/2", SLOW=str(root / "at"))
    wait_for(root / "at", "8")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert made(root) == ["0"]
    assert runner.run_part("first", PROFILE, root, Part(1, 2)) == {"made": 1, "kept": 1}
    run(root)
    assert {path.name for path in (root / "data/first/shards").iterdir()} == {"00000", "00001", "00002"}


def test_parts_and_whole_runs_keep_out_of_each_others_way(root):
    process = start(root, "1/2", SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    with pytest.raises(BusyError, match="'first' is running"):
        run(root)
    with pytest.raises(BusyError, match="shard 00000 of 'first' is running"):
        runner.run_part("first", PROFILE, root, Part(1, 4))
    assert runner.run_part("first", PROFILE, root, Part(2, 2)) == {"made": 1, "kept": 0}
    assert process.wait() == 0
    made(root)
    run(root)
    assert made(root) == []


@pytest.mark.slow
def test_no_part_is_made_while_the_whole_step_runs(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    with pytest.raises(BusyError, match="'first' is running"):
        runner.run_part("first", PROFILE, root, Part(1, 2))
    assert process.wait() == 0


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1.5/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="write 2/8"):
        Part.parse(text)


def test_a_shard_holds_no_rows_of_two_groups(root):
    run(root, "batches")
    shards = snapshot(root / "data/batches/shards")
    assert [list(shards[f"{number:05d}/data.bin"]) for number in range(3)] == [[0, 1, 2, 3, 4], [5, 6], [*range(7, 12)]]


def test_a_run_killed_within_a_shard_loses_one_batch(root, tmp_path_factory):
    process = start(root, step="batches", SLOW=str(root / "at"))
    wait_for(root / "at", "4")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert made(root) == ["0", "2"]
    batch = root / ".univigu/staging/batches/shards/.00000.batches"
    (batch / "0001/data.bin").write_bytes(b"damaged")
    run(root, "batches")
    assert made(root) == ["2", "4", "5", "7", "9", "11"]
    whole = tmp_path_factory.mktemp("whole")
    (whole / "numbers.json").write_text((root / "numbers.json").read_text())
    manifest = run(whole, "batches")
    assert snapshot(root / "data/batches") == snapshot(whole / "data/batches")
    assert (manifest["quarantined"], manifest["rows_out"]) == (1, 11)


def test_kept_batches_of_other_rows_are_made_again(root):
    process = start(root, step="batches", SLOW=str(root / "at"))
    wait_for(root / "at", "4")
    process.send_signal(signal.SIGKILL)
    process.wait()
    made(root)
    (root / "numbers.json").write_text("[0, 1, 9]")
    run(root, "batches")
    assert made(root) == ["0", "9"]
    assert {path.name for path in (root / "data/batches/shards").iterdir()} == {"00000", "00001"}


def test_a_step_without_shards_has_no_parts(root):
    with pytest.raises(ConfigError, match="'second' has no shards"):
        runner.run_part("second", PROFILE, root, Part(1, 2))
