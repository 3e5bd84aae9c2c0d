"""Snapshots in a real git and DVC repository: one tag per dataset, at a commit that restores it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.pipeline.stages import find_stage
from components.registry import dataset_versions as snapshots
from univigu.errors import BadInputError, ConfigError, MissingInputError

HOMES = [find_stage(step).home for step in snapshots.STEPS]
MAKE = """
import json
from pathlib import Path
import yaml
from components.pipeline.manifests import write_manifest
word = yaml.safe_load(open("params.yaml"))["word"]
for step, home in json.load(open("homes.json")).items():
    Path(home).mkdir(parents=True, exist_ok=True)
    Path(home, "data.txt").write_text(f"{step} of {word}")
    write_manifest(Path(home), {"digest": f"{word}-{step}", "rows_out": len(word)})
"""


def call(root, *command):
    command = [sys.executable, "-m", *command] if command[0] == "dvc" else list(command)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commit(root, message="Make the dataset"):
    call(root, "git", "add", "-A")
    call(root, "git", "commit", "-qm", message)


def make(root, word):
    (root / "params.yaml").write_text(yaml.safe_dump({"word": word}))
    call(root, "dvc", "repro", "--quiet")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with one stage that writes the folders of all dataset steps; the first dataset is committed."""
    root = tmp_path_factory.mktemp("data") / "here"
    root.mkdir()
    (root / "make.py").write_text(MAKE)
    (root / "homes.json").write_text(json.dumps({step: find_stage(step).home for step in snapshots.STEPS}))
    stage = {"cmd": f"{sys.executable} make.py", "deps": ["make.py"], "params": ["word"], "outs": HOMES}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))
    call(root, "git", "init", "-q", "-b", "main")
    for key, value in {"user.name": "T", "user.email": "t@example.org", "commit.gpgsign": "false"}.items():
        call(root, "git", "config", key, value)
    call(root, "dvc", "init", "--quiet")
    make(root, "one")
    commit(root)
    return root


@pytest.fixture
def root(repository, tmp_path):
    """A copy of the repository that a test may change."""
    return Path(shutil.copytree(repository, tmp_path / "here", symlinks=True))


@pytest.mark.slow
def test_a_dataset_is_tagged_once_and_the_next_one_gets_the_next_version(root):
    assert snapshots.list_snapshots(root) == []
    first, new = snapshots.take_snapshot(root)
    head = call(root, "git", "rev-parse", "HEAD").strip()
    assert (first.tag, new, first.commit, first.digest) == ("dataset@v1.0.0", True, head, "one-encode-latents")
    assert first.facts["Pairs"] == "3"
    assert snapshots.take_snapshot(root) == (first, False)
    assert snapshots.take_snapshot(root, "v9.0.0") == (first, False)

    make(root, "second")
    with pytest.raises(BadInputError, match=r"dvc.lock, params.yaml have uncommitted.*git add dvc.lock params.yaml"):
        snapshots.take_snapshot(root)
    commit(root)
    with pytest.raises(BadInputError, match=r"v1.0.0 tags another dataset"):
        snapshots.take_snapshot(root, "v1.0.0")
    with pytest.raises(BadInputError, match="'next' is not a version"):
        snapshots.take_snapshot(root, "next")
    second, _ = snapshots.take_snapshot(root)
    assert second.tag == "dataset@v1.1.0"
    assert [one.tag for one in snapshots.list_snapshots(root)] == ["dataset@v1.1.0", "dataset@v1.0.0"]
    assert snapshots.find_snapshot(root, "one-encode-latents") == first
    assert snapshots.find_snapshot(root, "unheard of") is None


@pytest.mark.slow
def test_data_that_could_not_be_restored_are_not_tagged(root, tmp_path):
    (root / "data/pairs/data.txt").unlink()
    (root / "data/pairs/data.txt").write_text("edited by hand")
    with pytest.raises(BadInputError, match=r"data/pairs differs from dvc.lock"):
        snapshots.take_snapshot(root)
    call(root, "dvc", "checkout", "--force", "--quiet", "data/pairs")
    shutil.rmtree(root / ".dvc/cache")
    with pytest.raises(BadInputError, match=r"is not in DVC's cache"):
        snapshots.take_snapshot(root)
    shutil.rmtree(root / "data/latents")
    with pytest.raises(MissingInputError, match=r"no finished output at .*data/latents"):
        snapshots.take_snapshot(root)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(BadInputError, match="not in a git repository"):
        snapshots.take_snapshot(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match="not in a git repository"):
        snapshots.list_snapshots(tmp_path / "elsewhere")
    assert snapshots.find_snapshot(tmp_path / "elsewhere", "any") is None


@pytest.mark.slow
def test_a_pushed_snapshot_is_restored_in_another_clone_and_in_this_one(root, tmp_path):
    snapshots.take_snapshot(root)
    with pytest.raises(ConfigError, match="no default DVC remote"):
        snapshots.push_data(root)
    call(root, "dvc", "remote", "add", "--quiet", "-d", "store", str(tmp_path / "store"))
    commit(root, "Say where the data go")
    snapshots.push_data(root)

    call(tmp_path, "git", "clone", "-q", str(root), "there")
    call(tmp_path / "there", "dvc", "pull", "--quiet", "data/pairs")
    assert (tmp_path / "there/data/pairs/data.txt").read_text() == "validate-pairs of one"

    make(root, "second")
    commit(root)
    call(root, "git", "checkout", "-q", "dataset@v1.0.0", "--", "dvc.lock", "params.yaml")
    call(root, "dvc", "checkout", "--quiet", *HOMES)
    assert {(root / home / "data.txt").read_text().split()[-1] for home in HOMES} == {"one"}
    assert "up to date" in call(root, "dvc", "status")
