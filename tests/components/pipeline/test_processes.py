"""One process per GPU: how many there are, which GPU each may see; and none outlives what it works for."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from components.pipeline import processes
from components.pipeline.stages import find_stage
from univigu.errors import ConfigError, UniViGUError


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def test_gpus_keep_the_names_that_they_were_given(four_gpus, monkeypatch):
    assert processes.visible_gpus() == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-8f2a, MIG-1b,7")
    assert processes.visible_gpus() == ["6", "GPU-8f2a", "MIG-1b", "7"]


def test_a_step_gets_a_process_a_gpu_only_if_it_asks_for_gpus_and_works_in_shards(four_gpus, monkeypatch):
    stage = find_stage("synthesize-videos")
    assert processes.count_processes(stage) == 4
    assert processes.count_processes(find_stage("caption-videos")) == 1
    assert processes.count_processes(replace(stage, sharded=False)) == 1
    monkeypatch.setenv("RANK", "0")  # torchrun has started enough of them
    assert processes.count_processes(stage) == 1


SMALL = {"batch_size": 24, "micro_batch_size": None, "zero_stage": 0, "precision": "fp32", "sequence_parallel": 1}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 4),
        ({"batch_size": 6}, 3),
        ({"micro_batch_size": 4}, 3),
        ({"batch_size": 1}, 1),
        ({"batch_size": 1, "sequence_parallel": 4}, 4),
    ],
)
def test_training_takes_as_many_gpus_as_share_its_batch(four_gpus, settings, count):
    assert processes.count_processes(find_stage("train-stage-1"), SMALL | settings) == count


@pytest.mark.parametrize(
    ("settings", "cores", "count"),
    [({}, 2, 2), ({}, 64, 4), ({"batch_size": 9}, 4, 3), ({"zero_stage": 2}, 8, 1), ({"precision": "bf16"}, 8, 1)],
)
def test_training_without_a_gpu_takes_a_process_a_core(monkeypatch, settings, cores, count):
    for name in ("OMP_NUM_THREADS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**40))
    stage = find_stage("train-stage-1")
    assert processes.count_processes(stage, SMALL | settings) == count
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 * 2**30))
    assert processes.count_processes(stage, SMALL | settings) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user has decided
    assert processes.count_processes(stage, SMALL | settings) == 1


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 1), ("max 100000", 64), ("50000 100000", 1)])
def test_a_containers_limit_counts_as_its_cores(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert processes.usable_cores(tmp_path / "cpu.max") == cores
    assert processes.usable_cores(tmp_path / "no-such-file") == 64


def test_a_step_that_trains_nothing_takes_one_process():
    with pytest.raises(ConfigError, match="'validate-clips' has no shards and trains nothing"):
        processes.train_together("validate-clips", "smoke", Path("."), 2)


def test_a_step_without_shards_takes_one_process(four_gpus):
    with pytest.raises(ConfigError, match="'validate-clips' has no shards"):
        processes.make_parts("validate-clips", "smoke", Path("."), 2)


WORK = "from components.pipeline.processes import end_with_parent; end_with_parent(); import time; time.sleep(60)"


def wait_until(true, what):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_step_ends_with_the_dvc_that_runs_it(tmp_path):
    (tmp_path / "work.py").write_text(f"open('pid', 'w').write(str(__import__('os').getpid()))\n{WORK}")
    stage = {"cmd": f"{sys.executable} work.py", "outs": ["nothing"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"work": stage}}))
    dvc, path = [sys.executable, "-m", "dvc"], f"{Path(__file__).parents[3]}"
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": path}
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, env=environment, check=True)
    repro = subprocess.Popen([*dvc, "repro"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the stage never began")
    work = psutil.Process(int((tmp_path / "pid").read_text()))
    time.sleep(1)
    assert work.is_running()
    repro.send_signal(signal.SIGKILL)
    repro.wait()
    wait_until(lambda: not work.is_running(), "the stage outlived dvc")


@pytest.mark.parametrize("delay", [0, 0.001, 0.002, 0.004, 0.008])
def test_a_signal_while_processes_are_started_leaves_none(delay):
    stop = f"sleep {delay}; kill -TERM $PPID; exec sleep 60"
    with processes.ChildProcesses() as children:
        for command in [stop, "exec sleep 60", "exec sleep 60"]:
            children.start(["sh", "-c", command])
        for process in children.all:
            assert process.wait(timeout=30) == -signal.SIGTERM
    assert children.received
    assert len(children.all) == 3


def test_at_the_end_of_the_block_no_process_is_left_whatever_ended_it():
    with suppress(KeyboardInterrupt), processes.ChildProcesses() as children:
        children.start(["sleep", "60"])
        raise KeyboardInterrupt
    assert [process.returncode for process in children.all] == [-signal.SIGTERM]
    assert not children.received
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_the_process_that_failed_first_is_reported_not_one_that_was_stopped_for_it():
    said_and_waits = "import time; print('univigu: stopped', flush=True); time.sleep(60)"
    said_and_fails = "import sys, time; time.sleep(0.5); print('univigu: failed', flush=True); sys.exit(78)"
    output = processes._Output()
    with processes.ChildProcesses() as children:
        for number, code in enumerate((said_and_waits, said_and_fails), start=1):
            output.pass_on(children.start([sys.executable, "-c", code]), "", number)
        failed = processes._wait(children.all)
    with pytest.raises(UniViGUError, match=r"^failed$") as failure:
        processes._raise_failure("a-step", children, output, failed)
    assert failure.value.exit_code == 78


@pytest.mark.slow
def test_a_child_ends_with_the_process_that_started_it():
    code = "import subprocess, sys; from components.pipeline.processes import child_environment\n"
    code += f"child = subprocess.Popen([sys.executable, '-c', {WORK!r}], env=child_environment())\n"
    code += "print(child.pid, flush=True); child.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1)
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not child.is_running(), "the child outlived its parent")


def test_what_a_person_started_ends_with_nobody(monkeypatch):
    monkeypatch.delenv(processes.PARENTS, raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    before = {thread.name for thread in threading.enumerate()}
    processes.end_with_parent()
    assert {thread.name for thread in threading.enumerate()} == before
