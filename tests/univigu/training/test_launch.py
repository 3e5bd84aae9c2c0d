"""Several gloo processes under `univigu.training.launch`: the same curve, and SIGTERM as a cluster sends it."""

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from as_command import AS_COMMAND
from univigu.errors import PreemptedError
from univigu.training.launch import exit_code

SCRIPT = Path(__file__).with_name("tiny_run.py")
spec = importlib.util.spec_from_file_location("tiny_run", SCRIPT)
tiny_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_run)

slow = pytest.mark.slow


def on_two(folder, settings, *arguments):
    """Run two processes to the end on existing data; returns the completed process."""
    tiny_run.open_data(folder, sizes=settings.get("sizes", 1))
    return launch(AS_COMMAND, SCRIPT, folder, json.dumps(settings), *arguments)


def launch(*command, **variables):
    command = [*("-m", "univigu.training.launch", "--standalone", "--nproc-per-node=2"), *map(str, command)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | variables
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, env=environment)


def train_all(home, runs):
    """Train on two processes, the same ones for all `runs`: settings by the name of a folder of `home`."""
    for name in runs:
        tiny_run.open_data(home / name)
    done = launch(AS_COMMAND, SCRIPT, home, json.dumps(runs), "ALL")
    assert done.returncode == 0, done.stderr[-4000:]
    return home


def read_weights(folder):
    return load_file(folder / "weights.safetensors")


def read_losses(folder):
    with (folder / "curves.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder and the weights of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, tiny_run.run(folder)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of runs of two processes: one as the run of one process, and those of `in_stage`."""
    runs = {f"{name}-{stage}": in_stage(name, stage) for name in SETTINGS for stage in ZERO_STAGES}
    return train_all(tmp_path_factory.mktemp("together"), {"two": {}, **runs})


@pytest.fixture(scope="module")
def two(together):
    """The folder and the weights of the run of two processes."""
    return together / "two", read_weights(together / "two")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two processes that received SIGTERM after step 4: its folder, and the completed process."""
    folder = tmp_path_factory.mktemp("stopped")
    return folder, on_two(folder, {}, 4, "TERM")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, stopped):
    """Runs that stopped after step 4, resumed by two processes: one of two, and two of one, in ZeRO stages 1 and 3."""

    def stop(step, metrics):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    home = tmp_path_factory.mktemp("resumed")
    shutil.copytree(stopped[0], home / "two")
    for stage in (1, 3):
        with pytest.raises(PreemptedError):
            tiny_run.run(home / f"one-{stage}", stop)
    return train_all(home, {"two": {}, "one-1": {"zero_stage": 1}, "one-3": {"zero_stage": 3}})


@slow
def test_two_processes_follow_the_curve_of_one(one, two):
    assert read_losses(two[0]) == pytest.approx(read_losses(one[0]), rel=1e-4)
    alone, shared = (json.loads((folder / "heldout.json").read_text()) for folder, _ in (one, two))
    assert shared["samples"] == alone["samples"] == 4
    assert shared["text_ce"] == pytest.approx(alone["text_ce"], rel=1e-3)
    assert all(torch.allclose(two[1][name], tensor, atol=1e-3) for name, tensor in one[1].items())


ALL_TASKS = {"steps": 4, "task_draw": "step", "objective": {"seed": 1}}  # this seed draws all three in four steps
SETTINGS = {
    # two samples at a time: now and then one rank's attend jointly, and the other's have a prefix
    "sample": {"micro_batch_size": 2, "steps": 3},
    "step": {"micro_batch_size": 2, **ALL_TASKS},
    "sequence": {"sequence_parallel": 2, "micro_batch_size": 4, "gradient_checkpointing": 1, **ALL_TASKS},
}
ZERO_STAGES = range(4)


def in_stage(name, stage):
    # an output table under ZeRO 3 needs steps of one task
    return SETTINGS[name] | {"output_dim": 0 if (name, stage) == ("sample", 3) else 6, "zero_stage": stage}


@slow
@pytest.mark.parametrize("stage", ZERO_STAGES)
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_follow_the_curve_of_one_whichever_weights_their_samples_need(tmp_path, together, name, stage):
    alone = tiny_run.run(tmp_path / "one", **in_stage(name, stage) | {"zero_stage": 0, "sequence_parallel": 1})
    folder = together / f"{name}-{stage}"
    weights = read_weights(folder)
    assert read_losses(folder) == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in alone.items())


PASSES = {  # through the weights: forward, for a guess, and backward
    ("understand", False): 2,
    ("understand", True): 3.75,  # five through one stream's part: the video, the guess, the text, and two backward
    ("joint", False): 2,
    ("joint", True): 3,
    ("generate", False): 2,
    ("generate", True): 2,
}


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """The weights that each step gathers, without and with gradient checkpointing; in the same two processes."""
    home = tmp_path_factory.mktemp("gathers")
    for recompute in (0, 1):
        tiny_run.open_data(home / f"every-{recompute}")  # here, as one rank could read what the other has half written
    done = launch(AS_COMMAND, SCRIPT.with_name("count_gathers.py"), home)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((home / "gathers.json").read_text())


@slow
@pytest.mark.parametrize("recompute", [0, 1])
def test_a_step_of_one_task_gathers_the_weights_once_per_pass(gathered, recompute):
    gathers = gathered[recompute]
    assert {(task, guessing) for task, guessing, _ in gathers} == PASSES.keys()
    for task, guessing, count in gathers:
        # recomputation is a pass of its own, whose weights mostly stay for the backward pass
        assert count <= 1.1 * (PASSES[task, guessing] + recompute), (task, guessing)


@slow
def test_on_sigterm_ranks_agree_on_a_step_save_it_and_exit_with_the_code_to_resume(stopped):
    folder, done = stopped
    assert done.returncode == 81, done.stderr[-4000:]
    latest = json.loads((folder / "checkpoints" / "latest").read_text())
    assert 4 <= latest["step"] < 8
    saved = {path.name for path in (folder / "checkpoints" / latest["checkpoint"]).iterdir()}
    ranks = {"rank-00000.safetensors", "rank-00001.safetensors"}
    # the evaluation of step 4 follows its checkpoint
    assert saved - {"evaluations.json"} == {*ranks, "curves.csv", "loop.json", "manifest.json"}
    assert done.stderr.count(f"Training received SIGTERM and saved step {latest['step']} of 8") == 2
    assert not (folder / "weights.safetensors").exists()


@slow
def test_a_stopped_run_resumes_and_ends_with_the_same_bits(two, resumed):
    weights = read_weights(resumed / "two")
    assert all(torch.equal(weights[name], tensor) for name, tensor in two[1].items())
    assert (resumed / "two/curves.csv").read_bytes() == (two[0] / "curves.csv").read_bytes()


def resumed_after(capsys):
    return int(re.search(r"Resuming after step (\d+) of", capsys.readouterr().err)[1])


@slow
def test_a_rank_that_dies_while_it_saves_ends_the_run_which_resumes_from_the_checkpoint_before(tmp_path, two):
    done = on_two(tmp_path, {}, 6, "DIE")
    assert done.returncode != 0
    assert json.loads((tmp_path / "checkpoints/latest").read_text())["step"] == 3
    cut = tmp_path / "checkpoints/step-00000006"
    assert {path.name for path in cut.iterdir()} == {"rank-00000.safetensors", "rank-00001.safetensors"}
    again = on_two(tmp_path, {})
    assert again.returncode == 0, again.stderr[-4000:]
    assert "Resuming after step 3 of 8" in again.stderr
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in read_weights(tmp_path).items())
    assert (tmp_path / "curves.csv").read_bytes() == (two[0] / "curves.csv").read_bytes()


@slow
def test_a_checkpoint_of_two_processes_resumes_on_one(tmp_path, one, stopped, capsys):
    shutil.copytree(stopped[0], tmp_path / "again")
    weights = tiny_run.run(tmp_path / "again")
    assert resumed_after(capsys) >= 4
    assert read_losses(tmp_path / "again") == pytest.approx(read_losses(one[0]), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in one[1].items())


@slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_one_process_resumes_on_two(one, resumed, stage):
    folder, weights = resumed / f"one-{stage}", read_weights(resumed / f"one-{stage}")
    assert read_losses(folder) == pytest.approx(read_losses(one[0]), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in one[1].items())


@slow
def test_a_run_that_shares_sequences_resumes_where_they_are_whole(tmp_path, one, capsys):
    done = on_two(tmp_path, {"sequence_parallel": 2}, 4, "TERM")
    assert done.returncode == 81, done.stderr[-4000:]
    weights = tiny_run.run(tmp_path)
    assert resumed_after(capsys) >= 4
    assert read_losses(tmp_path) == pytest.approx(read_losses(one[0]), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in one[1].items())


EVERYTHING = {
    "zero_stage": 3,
    "offload": ["optimizer", "parameters"],
    "micro_batch_size": 2,
    "gradient_checkpointing": 2,
    "lora": {"rank": 4, "targets": ["to_q", "to_v"]},
    "freeze": ["token_table"],
    "ema_decay": 0.9,
    "text_draws": 2,
    "objective": {"coupled_times": 0.5},
    "sizes": 2,
    "steps": 4,
}


@slow
def test_with_all_settings_on_a_run_of_two_processes_resumes_on_one_with_the_same_curve(tmp_path, capsys):
    # the curve of a run that saves no memory, as ZeRO, offloading and recomputation must not change it
    saving = {"zero_stage": 0, "offload": [], "gradient_checkpointing": 0}
    whole = tiny_run.run(tmp_path / "one", **EVERYTHING | saving)
    done = on_two(tmp_path / "two", EVERYTHING, 2, "TERM")
    assert done.returncode == 81, done.stderr[-4000:]
    settings = EVERYTHING | {"zero_stage": 2, "offload": ["optimizer"]}
    weights = tiny_run.run(tmp_path / "two", **settings)
    assert resumed_after(capsys) >= 2
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)
    assert all(torch.allclose(weights[name], tensor, atol=1e-3) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("codes", "terminated", "expected"),
    [
        ([81, 81], False, 81),  # another node received the signal
        ([-15, 81], True, 81),
        ([-15, -15], True, 81),  # before there was anything to save
        ([-15, -15], False, 143),
        ([1, 74], False, 74),  # the other lost its connection to the rank that found the damage
        ([-9], True, 137),
        ([-15, 1], True, 1),
    ],
)
def test_one_exit_code_speaks_for_all_workers(codes, terminated, expected):
    assert exit_code(codes, terminated) == expected


@pytest.mark.slow
def test_a_workers_own_exit_code_reaches_the_caller(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(74)\ntime.sleep(300)\n")
    (tmp_path / "tmp").mkdir()
    assert launch(script, TMPDIR=str(tmp_path / "tmp")).returncode == 74
    assert list((tmp_path / "tmp").iterdir()) == []


LATE = """
import atexit, ctypes, time

atexit.register(ctypes.PyDLL(None).sleep, 6)  # holds the interpreter's lock until the interpreter shuts down
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
if dist.get_rank() == 0:
    time.sleep(1)
    dist.all_reduce(torch.ones(4))
else:
    dist.all_reduce(torch.ones(4), async_op=True)
"""


@pytest.mark.slow
def test_a_finished_worker_is_not_aborted_by_a_late_thread_of_gloo(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LATE)
    done = launch(script)
    assert done.returncode == 0, done.stderr[-4000:]
