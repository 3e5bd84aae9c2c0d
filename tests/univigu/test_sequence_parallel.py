"""Processes that share a video's tokens have the outputs and the gradients of one that holds them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from as_command import AS_COMMAND
from univigu.errors import ConfigError
from univigu.sequence_parallel import SequenceGroup, require_divisible

SCRIPT = Path(__file__).with_name("share_sequence.py")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_outputs_and_gradients_are_those_of_one_process(tmp_path, processes):
    launcher = [sys.executable, "-m", "univigu.training.launch", "--standalone", f"--nproc-per-node={processes}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [*launcher, str(AS_COMMAND), str(SCRIPT), str(tmp_path / "found.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == processes
    for passes in found:
        assert len(passes) == 6
        for name, differences in passes.items():
            scale = differences.pop("largest gradient")
            assert scale > 1, name
            assert max(differences.values()) < 1e-5 * scale, (name, differences)


def test_tokens_are_divided_as_evenly_as_possible():
    assert SequenceGroup(None, 0, 4).parts(33) == [9, 8, 8, 8]
    assert SequenceGroup(None, 0, 4).parts(32) == [8, 8, 8, 8]


def test_heads_and_processes_that_can_not_be_divided_are_refused():
    require_divisible(4, 12, 8)
    with pytest.raises(ConfigError, match=r"12 heads can't be shared by 8; set `sequence_parallel` to 1, 2, 3, 4, 6"):
        require_divisible(8, 12, 16)
    with pytest.raises(ConfigError, match="6 processes don't form groups of 4"):
        require_divisible(4, 12, 6)
