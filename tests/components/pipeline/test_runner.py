"""What running a step promises: an output is absent, or complete and verified."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from components.pipeline import freshness, runner, stages
from components.pipeline.parts import Part
from components.pipeline.stages import Stage
from components.pipeline.tables import read_table
from univigu.errors import (
    BadInputError,
    BusyError,
    ConfigError,
    CorruptDataError,
    DiskFullError,
    GateFailedError,
    MissingInputError,
)

PROFILE = {"double": {"factor": 2, "max_rejected_share": 0.5}, "source": "numbers.json"}
FIRST = Stage(
    "first",
    "steps_under_test:double",
    home="data/first",
    sources={"raw": "source"},
    parameters=("double",),
    sharded=True,
)
SECOND = Stage(
    "second",
    "steps_under_test:copy",
    home="data/second",
    outputs=("captions.parquet",),
    inputs={"first": "first"},
    parameters=("double",),
)
BATCHES = replace(FIRST, name="batches", function="steps_under_test:batches", home="data/batches")
MODULE = """
import json, os, time
from pathlib import Path

def double(step):
    numbers = json.loads(step.inputs["raw"].read_text())
    step.rows_in = len(numbers)

    def work(rows, folder):
        if os.environ.get("SLOW"):
            Path(os.environ["SLOW"]).write_text(str(rows[0]["n"]))
            time.sleep(0.5)
        good = [row for row in rows if row["n"] >= 0]
        for row in rows:
            if row["n"] < 0:
                step.reject(str(row["n"]), "negative", "below zero", row)
        data = bytes(row["n"] * step["double"]["factor"] % 256 for row in good)
        (folder / "data.bin").write_bytes(data)
        with open(step.previous.parents[1] / "made.log", "a") as log:
            log.write(f"{rows[0]['n']} ")
        return [{"clip_id": f"{row['n']:03d}", "text": str(row["n"] * step["double"]["factor"])} for row in good]

    step.write("captions", step.map_shards([{"n": n} for n in numbers], 4, work))

def batches(step):
    def work(rows, folder):
        def batch_work(batch, place):
            if os.environ.get("SLOW"):
                Path(os.environ["SLOW"]).write_text(str(batch[0]["n"]))
                time.sleep(0.5)
            (place / "data.bin").write_bytes(bytes(row["n"] for row in batch))
            with open(step.previous.parents[1] / "made.log", "a") as log:
                log.write(f"{batch[0]['n']} ")
            if batch[0]["n"] == 2:
                step.reject("2", "two", "is never used")
            return [{"clip_id": f"{row['n']:03d}"} for row in batch if row["n"] != 2]

        made = step.map_batches(rows, 2, folder, batch_work)
        (folder / "data.bin").write_bytes(b"".join((place / "data.bin").read_bytes() for place, _ in made))
        return [row for _, rows in made for row in rows]

    numbers = json.loads(step.inputs["raw"].read_text())
    step.rows_in = len(numbers)
    step.write("captions", step.map_shards([{"n": n} for n in numbers], 5, work, group=lambda row: row["n"] < 7))

def copy(step):
    rows = step.read("first", "captions").to_pylist()
    step.rows_in = len(rows)
    if os.environ.get("FAIL"):
        raise OSError(int(os.environ["FAIL"]), "no room")
    step.write("captions", rows)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "steps_under_test.py").write_text(MODULE)
    (tmp_path / "numbers.json").write_text(json.dumps(list(range(12))))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runner, "SOURCE_ROOT", tmp_path)
    monkeypatch.setattr(stages, "STAGES", (FIRST, SECOND, BATCHES))
    yield tmp_path
    sys.modules.pop("steps_under_test", None)


def run(root, name="first", profile=PROFILE):
    return runner.run_stage(name, profile, root)


def snapshot(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made(root):
    log = root / "made.log"
    shards = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return shards


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


def test_changed_code_makes_every_shard_again(root):
    run(root)
    made(root)
    with (root / "steps_under_test.py").open("a") as file:
        file.write("# changed\n")
    run(root)
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
    with pytest.raises(DiskFullError, match="make room"):
        run(root, "second")
    assert not (root / "data/second").exists()


def start(root, part=None, step="first", **env):
    arguments = f"{step!r}, {PROFILE!r}, root"
    run = f"run_part({arguments}, runner.Part.parse({part!r}))" if part else f"run_stage({arguments})"
    code = f"""
        import sys
        sys.path.insert(0, {str(root)!r})
        from pathlib import Path
        from components.pipeline import runner, stages
        from components.pipeline.stages import Stage
        root = Path({str(root)!r})
        runner.SOURCE_ROOT = root
        stages.STAGES = ({FIRST!r}, {BATCHES!r})
        runner.{run}
    """
    code = code.replace("resources=Resources", "resources=stages.Resources")
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **env})


def wait_for(path, text):
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < deadline, f"{path} never said {text}"
        time.sleep(0.02)


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


def test_a_second_run_at_the_same_time_is_turned_away(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    with pytest.raises(BusyError, match="under way"):
        run(root)
    assert process.wait() == 0
    assert runner.verify(root / "data/first", "first")["rows_out"] == 12


def test_an_output_that_is_no_longer_made_is_taken_away(root, monkeypatch):
    run(root)
    (root / "data/first/captions.parquet").rename(root / "data/first/old.parquet")
    manifest = json.loads((root / "data/first/manifest.json").read_text())
    manifest["files"]["old.parquet"] = manifest["files"].pop("captions.parquet")
    (root / "data/first/manifest.json").write_text(json.dumps(manifest))
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


def test_a_comment_in_the_code_changes_no_byte_of_the_output(root):
    run(root)
    before = snapshot(root / "data/first")
    with (root / "steps_under_test.py").open("a") as file:
        file.write("# a comment\n")
    run(root)
    assert snapshot(root / "data/first") == before


def test_the_rows_that_failed_a_gate_are_kept_for_people(root):
    (root / "numbers.json").write_text(json.dumps([-1, -2, -3, 4]))
    with pytest.raises(GateFailedError, match=r"look at them in (.*)\.$") as failed:
        run(root)
    kept = Path(re.search(r"look at them in (.*)\.$", str(failed.value))[1])
    assert [row["id"] for row in read_table(kept.parent, "rejected").to_pylist()] == ["-1", "-2", "-3"]


@pytest.mark.parametrize("said", ["I/O error: No space left on device (os error 28)", "database or disk is full"])
def test_a_full_disk_is_known_by_what_libraries_say_of_it(root, said):
    assert runner.is_disk_full(RuntimeError(said), root)
    assert not runner.is_disk_full(RuntimeError("shape mismatch"), root)


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
    with pytest.raises(BusyError, match="'first' is under way"):
        run(root)
    with pytest.raises(BusyError, match="shard 00000 of 'first' is under way"):
        runner.run_part("first", PROFILE, root, Part(1, 4))
    assert runner.run_part("first", PROFILE, root, Part(2, 2)) == {"made": 1, "kept": 0}
    assert process.wait() == 0
    made(root)
    run(root)
    assert made(root) == []


def test_no_part_is_made_while_the_whole_step_runs(root):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    with pytest.raises(BusyError, match="'first' is under way"):
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
    with pytest.raises(ConfigError, match="'second' doesn't work in shards"):
        runner.run_part("second", PROFILE, root, Part(1, 2))


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
    with (root / "steps_under_test.py").open("a") as file:
        file.write("# changed\n")
    assert freshness.finished("first", PROFILE, root) is None
    run(root)
    (root / "data/first/shards/00001/data.bin").write_bytes(b"damaged")
    assert freshness.finished("first", PROFILE, root) is None


def test_a_step_whose_input_is_damaged_is_not_called_finished(root):
    run(root)
    run(root, "second")
    (root / "data/first/captions.parquet").write_bytes(b"damaged")
    with pytest.raises(CorruptDataError, match="SHA-256"):
        freshness.finished("second", PROFILE, root)


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
