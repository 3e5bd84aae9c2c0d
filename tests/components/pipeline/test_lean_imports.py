"""A command leaves out packages that it doesn't need; other processes import what they always did."""

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
print(*[name for name in ("scipy", "peft", "torch._dynamo") if name in sys.modules])

import peft, scipy.stats
"""


COMPILING = """
import sys
import torch

from components.pipeline.lean_imports import start_command, without_compiler

start_command()
with without_compiler():
    @torch.compiler.disable
    def left_alone():
        return torch.compiler.is_compiling()

print("torch._dynamo" in sys.modules, left_alone())
print(*torch.compile(lambda: (torch.compiler.is_compiling(), left_alone()), backend="eager")())
"""


def output(script, *arguments):
    """The words that a script prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imported(folder, kind):
    """Which of the packages loading a model imported; the process imports them itself afterwards."""
    return output(SCRIPT, folder, kind)


@pytest.mark.slow
def test_a_command_loads_a_model_without_packages_that_it_does_not_need(speaking_model):
    assert imported(speaking_model, "command") == []


@pytest.mark.slow
def test_elsewhere_nothing_is_hidden(speaking_model):
    assert imported(speaking_model, "library") == ["scipy", "peft", "torch._dynamo"]


def test_a_function_that_was_marked_without_the_compiler_is_left_alone_by_it():
    assert output(COMPILING) == ["False", "False", "True", "False"]
