"""A new step touches the files that CONTRIBUTING names, and no other; everything else follows from the table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.bench.orchestrators import copy_repository

REPO = Path(__file__).resolve().parents[1]
STEP = '''"""Step count-frames: how many frames the clips have."""

import json

from components.pipeline.step import Step


def count_frames(step: Step) -> None:
    """Clips -> the number of their frames, as JSON."""
    clips = step.read("clips", "clips")
    step.rows_in = step.rows_out = len(clips)
    (step.out / "frames.json").write_text(json.dumps(sum(clips["frames"].to_pylist())))
'''
ROW = """    Stage(
        "count-frames",
        "components.clips.count_frames:count_frames",
        home="data/frames",
        inputs={"clips": "synthesize-videos"},
    ),
"""
DVC = """  count-frames:
    cmd: univigu run count-frames --profile ${profile}
    deps:
      - .univigu/steps/count-frames.json
      - data/clips
    outs:
      - data/frames:
          persist: true
"""
EDGE = "    synthesize-videos --> count-frames\n"
LINE = "| `count-frames` | its frames are counted | a number in `data/frames` |\n"
PARITY = (
    "tests/components/pipeline/test_stages.py",
    "tests/components/orchestration/test_kfp_pipeline.py",
    "tests/dags/test_dags.py",
    "tests/test_docs.py",
)

pytestmark = pytest.mark.slow


def insert(file, before, text):
    """Put text into a file in front of the only place where `before` stands."""
    head, tail = file.read_text(encoding="utf-8").split(before)
    file.write_text(head + text + before + tail, encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone")
    copy_repository(root, "smoke")
    (root / "components/clips/count_frames.py").write_text(STEP, encoding="utf-8")
    insert(root / "components/pipeline/stages.py", '    Stage(\n        "validate-clips",', ROW)
    insert(root / "dvc.yaml", "  validate-clips:\n", DVC)
    insert(root / "docs/architecture.md", "    validate-clips --> caption-videos\n", EDGE)
    insert(root / "docs/architecture.md", "| `validate-clips` |", LINE)
    call(root, "-m", "components.cli.main", "pipeline", "compile")
    return root


def call(root, *arguments):
    env = {**os.environ, "PYTHONPATH": f"{root}:{root}/model"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_files_that_change_are_those_that_contributing_names(clone):
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    listed = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout
    changed = {line[3:] for line in listed.splitlines()}
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"^\*\*A step\.\*\*.*?\n\n", text, re.DOTALL | re.MULTILINE)
    named = {name for name in re.findall(r"[\w./-]+", paragraph.replace("NAME", "count_frames")) if "." in name}
    assert {re.sub(r"/clips/", "/ROOM/", name) for name in changed} <= named


def test_every_orchestrator_has_the_step(clone):
    call(clone, "-m", "pytest", *PARITY, "--deselect", "tests/test_docs.py::test_the_site")


def test_the_step_runs_on_the_output_of_the_step_before(clone, reproduced):
    shutil.copytree(reproduced.root / "data/clips", clone / "data/clips", dirs_exist_ok=True)
    call(clone, "-m", "components.cli.main", "run", "count-frames", "--profile", "smoke")
    assert json.loads((clone / "data/frames/frames.json").read_text()) > 0
    assert json.loads((clone / "data/frames/manifest.json").read_text())["step"] == "count-frames"
