"""The library installs by itself, without the pipeline, and captions a clip."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import univigu

REPO = Path(__file__).resolve().parents[1]


def run(*command):
    """What a command printed; it sees neither this checkout nor the environment of the tests."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # By way of a source distribution, so that a build leaves nothing in this checkout.
    run("uv", "build", "--quiet", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, REPO)
    (made,) = folder.glob("*.whl")
    return made


def test_every_place_states_the_same_version(wheel):
    pipeline = tomllib.loads((REPO / "components/pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    printed = run(sys.executable, "-m", "components.cli.main", "--version").split()[-1]
    assert {wheel.name.split("-")[1], pipeline, str(cited), printed} == {univigu.__version__}


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert folders == {"univigu", f"{wheel.name.split('-py3')[0]}.dist-info"}


@pytest.mark.slow
def test_the_library_alone_captions_a_clip(wheel, tmp_path):
    place = tmp_path / "environment"
    run("uv", "venv", "--quiet", "--python", sys.executable, place)
    links = [item for folder in os.environ.get("PIP_FIND_LINKS", "").split() for item in ("--find-links", folder)]
    # The wheels that `make install` fetched are in uv's cache, so nothing is fetched again.
    run("uv", "pip", "install", "--quiet", "--python", place, "--constraint", REPO / "constraints.txt", *links, wheel)
    printed = run(place / "bin/python", "-I", REPO / "tests/support/bare_library.py")
    assert printed.startswith("Python 3.")
