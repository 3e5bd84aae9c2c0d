"""Threads share the cores: spinning is limited, side threads have no team, a run keeps its number of threads."""

import ast
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from as_command import AS_COMMAND
from univigu.errors import CorruptDataError
from univigu.threads import fewest_worthwhile, map_on_cores, measure_threads, settle_threads, side_threads

ROOT = Path(__file__).parents[2]
CHOSEN_BY_USERS = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

# What a process of its own says: threads of the process after the main thread's team is there, and after another
# thread has used tensors in a pool.
COUNT_TEAMS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from univigu.threads import side_threads
def threads(): return len(os.listdir("/proc/self/task"))
def use_tensors():
    a = torch.randn(800, 800)
    return float((a @ a).exp().sum())
torch.set_num_threads(4)
use_tensors()
before = threads()
with {pool}(1, "beside") as pool:
    pool.submit(use_tensors).result()
    during = threads()
use_tensors()
print(before, during, torch.get_num_threads())
"""


def run_python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USERS}
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_side_thread_has_no_openmp_team_and_keeps_the_main_one():
    before, during, left = map(int, run_python(COUNT_TEAMS.format(pool="side_threads")))
    assert during == before + 1  # the thread itself
    assert left == 4
    before, during, _ = map(int, run_python(COUNT_TEAMS.format(pool="ThreadPoolExecutor")))
    assert during == before + 4  # with a team, which `side_threads` avoids


def test_every_thread_pool_uses_side_threads_except_one_that_only_writes():
    files = [path for folder in ("components", "model/univigu") for path in (ROOT / folder).rglob("*.py")]
    makers = {
        path.relative_to(ROOT).as_posix()
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name | ast.Attribute)
        and "ThreadPoolExecutor" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    }
    assert makers == {
        "model/univigu/threads.py",
        "components/captions/captioners/client/journal.py",
        "components/bench/busy.py",
    }


SPINS = """
import os, sys
from components.cli.main import main
sys.argv = ["univigu", "--help"]
try: main()
except SystemExit: pass
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("user", "then"),
    [
        ({}, ["300", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", "None"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["None", "passive"]),
    ],
)
def test_spinning_is_limited_unless_the_user_has_set_it(user, then):
    assert run_python(SPINS, **user)[-2:] == then


def test_fewer_threads_are_used_where_more_gain_little():
    assert fewest_worthwhile({8: 1.00, 4: 1.04, 2: 1.5, 1: 2.9}) == 4
    assert fewest_worthwhile({2: 1.0, 1: 1.01}) == 1
    assert fewest_worthwhile({2: 1.0, 1: 1.6}) == 2
    assert fewest_worthwhile({1: 3.0}) == 1


def test_all_numbers_are_tried_equally_often_and_a_single_one_is_not(tmp_path):
    calls = []
    assert set(measure_threads(lambda: calls.append(torch.get_num_threads()), 6)) == {6, 3, 1}
    tried = calls[1:]
    assert tried.count(6) == tried.count(3) == tried.count(1) >= 3
    torch.set_num_threads(1)
    assert settle_threads(lambda: calls.append(1), tmp_path / "threads.json") == 1
    assert calls[1:] == tried


SETTLE = """
import sys, time
from pathlib import Path
import torch
from univigu.threads import settle_threads
torch.set_num_threads(4)
print(settle_threads(lambda: time.sleep(0.01 * (1 + ({best} != torch.get_num_threads()))), Path(sys.argv[1])))
print(torch.get_num_threads())
"""


def settle(note, best, **environment):
    code = SETTLE.format(best=best).replace("sys.argv[1]", repr(str(note)))
    return [int(word) for word in run_python(code, **environment)]


@pytest.mark.slow
def test_a_run_keeps_its_number_of_threads(tmp_path):
    note = tmp_path / "threads.json"
    assert settle(note, best=2) == [2, 2]
    assert set(json.loads(note.read_text())["seconds"]) == {"1", "2", "4"}
    assert settle(note, best=4) == [2, 2]  # another machine would measure another number
    assert settle(note, best=4, OMP_NUM_THREADS="1") == [2, 2]


@pytest.mark.slow
def test_the_users_number_is_used_and_kept(tmp_path):
    assert settle(tmp_path / "threads.json", best=2, OMP_NUM_THREADS="3") == [4, 4]  # set in the process, last
    assert json.loads((tmp_path / "threads.json").read_text()) == {"threads": 4}


@pytest.mark.parametrize("content", ["{}", '{"threads": 0}', '{"threads": true}', '{"threads": "2"}', "{", "[]"])
def test_an_invalid_note_is_named(tmp_path, content):
    note = tmp_path / "threads.json"
    note.write_text(content)
    with pytest.raises(CorruptDataError, match=r"threads\.json"):
        settle_threads(lambda: None, note)


def test_side_threads_work_without_torch():
    assert run_python(
        "import sys; from univigu.threads import side_threads\n"
        "with side_threads(2, 'beside') as pool: print(*pool.map(abs, [-1, 2]), 'torch' in sys.modules)"
    ) == ["1", "2", "False"]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_run_beside_each_other_without_teams_and_in_order(two_threads):
    meet = threading.Barrier(2, timeout=60)  # a part alone would wait in vain

    def part(number):
        meet.wait()
        return number, torch.get_num_threads()

    assert map_on_cores(part, [0, 1, 2, 3]) == [(number, 1) for number in range(4)]
    assert torch.get_num_threads() == 2


def test_with_one_thread_one_part_follows_another():
    torch.set_num_threads(1)
    here = threading.get_ident()
    assert map_on_cores(lambda part: (part, threading.get_ident()), "abc") == [(part, here) for part in "abc"]


def test_a_pool_names_its_threads():
    with side_threads(1, "beside") as pool:
        assert pool.submit(lambda: threading.current_thread().name).result().startswith("beside")


SCRIPT = Path(__file__).parent / "training" / "tiny_run.py"


def train(folder, *stop):
    """A training run without settings for threads; returns the bytes of its weights, if it finished."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USERS}
    command = [sys.executable, str(AS_COMMAND), str(SCRIPT), str(folder), "{}", *stop]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert done.returncode == (-9 if stop else 0), done.stderr
    return None if stop else (folder / "weights.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_measured_its_threads_ends_with_the_same_bits_after_a_kill(tmp_path):
    train(tmp_path / "killed", "5", "KILL")
    note = tmp_path / "killed" / "threads.json"
    chosen = json.loads(note.read_text())
    assert ("seconds" in chosen) == (len(os.sched_getaffinity(0)) > 1)
    note.unlink()  # the checkpoint has a copy
    weights = train(tmp_path / "killed")
    assert json.loads(note.read_text()) == chosen
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "threads.json").write_text(json.dumps(chosen))
    assert train(tmp_path / "whole") == weights
