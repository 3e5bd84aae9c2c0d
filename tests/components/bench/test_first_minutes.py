"""The parts of a newcomer's first minutes, timed in a clone of a small repository with a command of its own."""

import json
import subprocess

import pytest

from components.bench import first_minutes
from univigu.errors import UniViGUError

MAKEFILE = """
install:
\t@mkdir -p .venv/bin
\t@cp command .venv/bin/univigu
\t@ln -s $(shell which python3) .venv/bin/python
"""
COMMAND = """#!/bin/sh
case $1 in
generate) sleep 0.2; echo "$2" > "$4" ;;
caption) test -f "$2" && test -z "$PYTHONPATH" ;;
esac
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    (folder / "docs").mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "command").write_text(COMMAND)
    (folder / "command").chmod(0o755)
    for key, value in {"NAME": "A", "EMAIL": "a@b.c"}.items():
        monkeypatch.setenv(f"GIT_AUTHOR_{key}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{key}", value)
    return folder


def commit(folder):
    for command in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "All"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def notebook(*sources):
    cells = [{"cell_type": "markdown", "source": ["Text, and no code"]}]
    cells += [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]
    return json.dumps({"cells": cells})


def test_each_part_is_timed_in_a_clone_and_the_first_clip_is_compared_with_the_target(repository):
    (repository / "docs/quickstart.ipynb").write_text(notebook("%matplotlib inline\nx = 1\n!ls", "assert x == 1"))
    commit(repository)
    found = first_minutes.measure(repository)
    assert list(found["seconds"]) == ["clone", "install", "first_clip", "first_caption", "notebook"]
    assert found["seconds"]["first_clip"] >= 0.2
    assert found["to_first_clip"] == pytest.approx(sum(list(found["seconds"].values())[:3]), abs=0.011)
    assert found["ratio"] == pytest.approx(found["to_first_clip"] / first_minutes.TARGET, abs=0.001)
    assert not (repository / ".venv").exists()


def test_a_repository_without_a_notebook_has_no_time_for_one(repository):
    commit(repository)
    assert "notebook" not in first_minutes.measure(repository)["seconds"]


def test_a_part_that_fails_is_named_with_what_it_said(repository):
    (repository / "docs/quickstart.ipynb").write_text(notebook("raise ValueError('a cell failed')"))
    commit(repository)
    with pytest.raises(UniViGUError, match=r"(?s)The part 'notebook' ended with 1: .*a cell failed"):
        first_minutes.measure(repository)
