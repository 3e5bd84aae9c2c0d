"""The profile that a command means if none is given."""

import json

import pytest

from components.cli.main import app
from components.cli.options import profile_in_use
from components.cli.pipeline import _arguments
from components.pipeline.profiles import load_profile, use_profile
from univigu.errors import ConfigError


def test_the_default_is_what_use_chose_for_the_work_root(tmp_path):
    assert profile_in_use(None, tmp_path) == "tiny"
    use_profile("smoke", tmp_path)
    assert profile_in_use(None, tmp_path) == "smoke"
    assert profile_in_use("tiny", tmp_path) == "tiny"


@pytest.mark.parametrize("text", ["", "- a list", "base: a", "profile: 3", "profile: [", "a: 1\n---\nb: 2"])
def test_a_file_that_names_no_profile_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"params.yaml names no profile; choose one with `univigu use NAME`"):
        profile_in_use(None, tmp_path)


def test_a_pipeline_is_given_the_profile_in_use_unless_it_is_its_own_default(tmp_path):
    assert _arguments(["parts=2"], tmp_path) == {"parts": "2"}
    use_profile("smoke", tmp_path)
    assert _arguments(["parts=2"], tmp_path) == {"parts": "2", "profile": "smoke"}
    assert _arguments(["profile=wan-1.3b"], tmp_path) == {"profile": "wan-1.3b"}


def test_a_command_takes_the_profile_in_use(tmp_path):
    use_profile("wan-1.3b", tmp_path)
    app(["code", "--root", str(tmp_path)], standalone_mode=False)
    written = json.loads((tmp_path / ".univigu/steps/curate-prompts.json").read_text())
    assert written["settings"]["base"] == load_profile("wan-1.3b")["base"]
