"""A command leaves out optional packages that it doesn't need; other processes import what they always did."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
SCRIPT = """
import sys
from pathlib import Path

from components.cli.chosen_model import load
from components.pipeline.lean_imports import start_command

if sys.argv[2] == "command":
    start_command()
load(Path(sys.argv[1]))
print(*[name for name in ("scipy", "peft") if name in sys.modules])
import peft, scipy.stats
"""


def imported(folder, kind):
    """Which of the packages loading a model imported; the process imports them itself afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, kind], capture_output=True, text=True, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_command_loads_a_model_without_packages_that_it_does_not_need(speaking_model):
    assert imported(speaking_model, "command") == []


@pytest.mark.slow
def test_elsewhere_nothing_is_hidden(speaking_model):
    assert imported(speaking_model, "library") == ["scipy", "peft"]
