"""Locks keep runs out of each other's way, and are missed when somebody removes them."""

import fcntl
import shutil

import pytest

from components.pipeline import runner
from components.pipeline.state import lock
from engine import made, run, start, wait_for
from univigu.errors import BusyError


def test_a_lock_is_one_processs_at_a_time(tmp_path):
    with lock(tmp_path, "a", "taken"):
        with pytest.raises(BusyError, match="taken"), lock(tmp_path, "a", "taken"):
            pass
        with lock(tmp_path, "b", "taken"):
            pass
    with lock(tmp_path, "a", "taken"):
        pass


def test_a_shared_lock_is_shared_and_keeps_others_out(tmp_path):
    shared = fcntl.LOCK_SH | fcntl.LOCK_NB
    with lock(tmp_path, "a", "taken", shared):
        with lock(tmp_path, "a", "taken", shared):
            pass
        with pytest.raises(BusyError, match="taken"), lock(tmp_path, "a", "taken"):
            pass


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_was_removed_is_missed(tmp_path, again):
    with lock(tmp_path, "a", "taken") as held:
        held.require()
        shutil.rmtree(tmp_path / ".univigu/locks")
        if again:
            with lock(tmp_path, "a", "taken"):
                pass
        with pytest.raises(BusyError, match="was removed while this run held it"):
            held.require()


def test_two_runs_whose_locks_were_removed_end_with_one_output_and_one_sentence(root, capfd):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    shutil.rmtree(root / ".univigu/locks")
    manifest = run(root)
    assert process.wait() == 1
    said = capfd.readouterr().err
    assert "BusyError: The lock" in said.splitlines()[-1]
    assert runner.verify(root / "data/first", "first") == manifest
    made(root)
    assert run(root) == manifest
    assert made(root) == []


def test_a_run_whose_files_are_removed_ends_in_a_sentence_and_the_next_one_is_whole(root, capfd):
    process = start(root, SLOW=str(root / "at"))
    wait_for(root / "at", "0")
    shutil.rmtree(root / ".univigu/staging")
    assert process.wait() == 1
    assert "TransientError: Files of 'first' under" in capfd.readouterr().err.splitlines()[-1]
    manifest = run(root)
    assert runner.verify(root / "data/first", "first") == manifest
    assert manifest["rows_out"] == 12
