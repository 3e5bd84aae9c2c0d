"""The code keeps its own rules: lint, format, types, spelling, and who may import whom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import architecture, uncovered

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


LINT = [
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["lint-imports"],
    ["pyrefly", "check", "--python-interpreter-path", sys.executable],
    ["codespell"],
]


@pytest.mark.slow
@pytest.mark.parametrize("command", LINT, ids=lambda command: " ".join(command[:2]))
def test_the_code_passes(command):
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rooms_are_as_the_report_says_and_no_arrow_runs_back_up():
    now = architecture.describe()
    assert now["upward"] == now["circles"] == []
    assert len(now["arrows"]) <= 80
    assert now["longest_files"][0][0] <= 400
    assert now["longest_functions"][0][0] <= 60
    assert json.loads(architecture.REPORT.read_text())["arrows"] == now["arrows"], "run `make architecture`"


def test_help_answers_without_importing_what_is_slow():
    code = (
        "import sys; from components.cli.main import app; "
        "slow = ('torch', 'diffusers', 'mlflow', 'pandas', 'pyarrow', 'pydantic', 'transformers'); "
        "print([m for m in slow if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pre_commit_runs_the_same_tools_on_what_is_installed():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert sorted(hook["entry"].split()[0] for hook in hooks) == sorted(command[0] for command in LINT)
    assert {hook["language"] for hook in hooks} == {"system"}


def test_a_function_of_which_no_line_ran_is_named():
    functions = {
        "": {"executed_lines": [1], "missing_lines": []},
        "half": {"executed_lines": [3], "missing_lines": [4]},
        "Meter.skip": {"executed_lines": [], "missing_lines": [7, 8]},
    }
    report = {"files": {"progress.py": {"functions": functions}}}
    assert list(uncovered.uncovered(report)) == [(2, "progress.py:Meter.skip")]
