"""A minute of `make chaos`: faults at calls of each step that makes the dataset, and odd inputs of every kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_no_fault_and_no_odd_input_leaves_anything_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "sample", "--plan", "encode-latents"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["findings"] == []
    assert report["kills"] >= 2
    assert report["faults"] >= 10
    assert report["inputs"] >= 600
    assert list(tmp_path.glob("chaos-*")) == []
