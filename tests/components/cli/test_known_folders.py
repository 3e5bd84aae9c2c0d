"""The folder of a champion is looked up in MLflow once, and again after every change of the registry."""

import shutil
import subprocess
import sys

import pytest

from components.cli.chosen_model import find_model
from registered_root import register
from univigu import registry
from univigu.errors import MissingInputError

FIND = """
import sys
from pathlib import Path
from components.cli.chosen_model import find_model

print(find_model("", "known", Path(sys.argv[1])), "mlflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, speaking_model):
    """A work root with two versions of a model, the first of which is champion."""
    root = tmp_path_factory.mktemp("root")
    for _ in range(2):
        register(root, speaking_model, "known")
    registry.set_alias("known", registry.CHAMPION, 1, f"sqlite:///{root / 'mlflow.db'}")
    return root


def asked(root):
    """The folder, and whether MLflow was asked for it."""
    done = subprocess.run([sys.executable, "-c", FIND, root], capture_output=True, text=True, check=True)
    folder, imported = done.stdout.split()
    return folder, imported == "True"


@pytest.mark.slow
def test_mlflow_is_asked_once_and_again_after_a_change(root):
    first, imported = asked(root)
    assert imported
    assert asked(root) == (first, False)
    registry.set_alias("known", registry.CHAMPION, 2, f"sqlite:///{root / 'mlflow.db'}")
    second, imported = asked(root)
    assert imported
    assert second != first
    assert asked(root) == (second, False)


@pytest.mark.slow
def test_files_that_are_gone_and_a_damaged_note_are_looked_up_again(root, tmp_path):
    folder = find_model("", "known", root)
    (root / ".univigu/models.json").write_text("{half")
    assert find_model("", "known", root) == folder
    gone = shutil.move(folder, tmp_path / "gone")
    with pytest.raises(MissingInputError):
        find_model("", "known", root)
    shutil.move(gone, folder)
    assert find_model("", "known", root) == folder
