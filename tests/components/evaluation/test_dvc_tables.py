"""DVC's tables of scores and settings: their width, and that they name what an experiment changed.

The project has this repository's dvc.yaml, params.yaml and profiles, and scores as a run of the step would write them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.evaluation.evaluate_model import HEADLINES, headlines

REPO = Path(__file__).parents[3]
WIDTH = 100
NAME = "lofty-pimas"  # as long as the names that DVC makes up
OURS = r"\.univigu|data/|model"  # what docs/data-versions.md drops: digests of files


def call(root, *command):
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def dvc(root, *command):
    return call(root, sys.executable, "-m", "dvc", *command)


def write_scores(root, value):
    scores = {}
    for task, key in (*HEADLINES.values(), ("captions", "digit")):
        scores.setdefault(task, {})[key] = {"value": value}
    text = json.dumps(headlines(scores, "digit"), indent=1, sort_keys=True)
    (root / "reports/metrics.json").write_text(text)
    (root / "reports/plots/scores.csv").write_text(f"score,attribute,value,low,high,n\ncaptions,mean,{value},0,1,9\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A commit, and above it an experiment with another seed and other scores; both are also in the workspace."""
    root = tmp_path_factory.mktemp("tables") / "uni-vigu"
    (root / "reports/plots").mkdir(parents=True)
    shutil.copytree(REPO / "components/profiles", root / "components/profiles")
    shutil.copytree(REPO / ".dvc/plots", root / ".dvc/plots")
    for name in (".dvc/config", ".dvc/.gitignore", "params.yaml", "dvc.yaml"):
        shutil.copy(REPO / name, root / name)
    write_scores(root, 0.98765)
    date = "2026-01-28T00:00:00"  # an old commit has its date in the table, a new one the shorter time
    call(root, "git", "init", "--quiet", "-b", "main")
    for key, value in {"user.name": "a", "user.email": "a@example.com", "core.hooksPath": "/dev/null"}.items():
        call(root, "git", "config", key, value)
    call(root, "git", "add", "--force", ".")
    call(root, "env", f"GIT_COMMITTER_DATE={date}", "git", "commit", "--quiet", "--message", "A run", "--date", date)
    profile = root / "components/profiles/tiny.yaml"
    profile.write_text(profile.read_text().replace("\nseed: 0", "\nseed: 1"))
    write_scores(root, 0.91234)
    call(root, "git", "add", "--all")
    return root


def test_the_scores_of_one_version_fit_the_width(root):
    lines = dvc(root, "metrics", "show").splitlines()
    assert lines[0].split() == ["Path", "blind", "captions", "digit", "gain", "joint", "videos"]
    assert max(map(len, lines)) <= WIDTH


def test_all_scores_are_at_the_left_of_the_table_of_experiments(root):
    heads = next(line for line in dvc(root, "exp", "show").splitlines() if "Experiment" in line)
    assert heads.split()[:8] == ["Experiment", "Created", "blind", "captions", "digit", "gain", "joint", "videos"]
    with_name = len(f"├── 1a2b3c4 [{NAME}]") - len("workspace ")  # the column is as wide as its head or longest name
    assert heads.index("videos") + len("videos") + with_name <= WIDTH
    assert "metrics.json:" not in heads  # no score shares its name with a setting


def test_the_documented_table_of_experiments_fits_the_width_and_has_the_changed_setting(root):
    page = (REPO / "docs/data-versions.md").read_text()
    assert f"$ dvc exp show --only-changed --drop '{OURS}'" in page
    command = [sys.executable, "-m", "dvc", "exp", "show", "--no-pager", "--only-changed", "--drop", OURS]
    shown = call(root, "env", f"COLUMNS={WIDTH}", *command)
    heads = next(line for line in shown.splitlines() if "Experiment" in line)
    assert heads.split() == ["Experiment", "Created", "blind", "captions", "digit", "gain", "joint", "videos", "seed"]
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "…" not in shown


@pytest.mark.slow
def test_what_changed_is_named_by_the_diffs_of_settings_scores_and_plots(root):
    (param,) = json.loads(dvc(root, "params", "diff", "--json")).values()
    assert param == {"seed": {"old": 0, "new": 1, "diff": 1}}
    assert [line.split()[1:4] for line in dvc(root, "metrics", "diff").splitlines()[1:3]] == [
        ["blind", "0.988", "0.912"],
        ["captions", "0.988", "0.912"],
    ]
    drawn = json.loads(dvc(root, "plots", "diff", "HEAD", "--json", "--targets", "reports/plots/scores.csv"))
    text = json.dumps(drawn)
    assert "HEAD" in text
    assert "workspace" in text
