"""The code keeps its own rules: lint, format, and who may import whom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import architecture

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"]], ids=" ".join
)
def test_the_code_passes(command):
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rooms_are_as_the_report_says_and_no_arrow_runs_back_up():
    now = architecture.describe()
    assert now["upward"] == now["circles"] == []
    assert len(now["arrows"]) <= 80
    assert json.loads(architecture.REPORT.read_text())["arrows"] == now["arrows"], "run `make architecture`"


def test_help_answers_without_importing_what_is_slow():
    code = (
        "import sys; from components.cli.main import app; "
        "slow = ('torch', 'diffusers', 'mlflow', 'pandas', 'pyarrow', 'pydantic', 'transformers'); "
        "print([m for m in slow if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
