"""What `univigu profile` prints, and what commands say of settings that don't fit."""

import json

import pytest
import yaml

from components.cli import main as cli
from components.cli.pipeline import _with_settings
from components.pipeline.profiles import load_profile


@pytest.fixture
def univigu(capfd, monkeypatch):
    """Run a command; returns its exit code, and what it printed on both streams."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["univigu", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr()
        return stop.value.code or 0, said.out, said.err

    return call


def test_the_bundled_profiles_are_listed_with_what_they_extend(univigu):
    code, out, _ = univigu("profile", "list")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["long", "extends", "tiny"],
        ["smoke", "extends", "tiny"],
        ["stories", "extends", "tiny"],
        ["tiny", "-"],
        ["tour", "extends", "smoke"],
        ["wan-1.3b", "-"],
        ["wan-14b", "extends", "wan-1.3b"],
        ["wan-5b", "extends", "wan-1.3b"],
    ]


@pytest.mark.parametrize("name", ["smoke", "wan-14b"])
def test_what_is_shown_is_the_whole_profile_and_can_be_used_as_one(univigu, tmp_path, name):
    code, out, _ = univigu("profile", "show", name)
    (tmp_path / "saved.yaml").write_text(out)
    assert code == 0
    assert load_profile(str(tmp_path / "saved.yaml")) == load_profile(name)


def test_a_profile_is_shown_with_other_settings(univigu):
    shown = yaml.safe_load(univigu("profile", "show", "tiny", "--set", "train_stage_2.steps=500")[1])
    assert shown["train_stage_2"]["steps"] == 500


def test_two_profiles_are_compared_setting_by_setting(univigu):
    code, out, _ = univigu("profile", "diff", "wan-1.3b", "wan-14b")
    assert code == 0
    assert len(out.splitlines()) == 9
    assert "train_stage_2.zero_stage (2 -> 3)" in out.splitlines()
    assert univigu("profile", "diff", "tiny", "tiny")[1] == ""


def test_the_schema_is_printed_as_json(univigu):
    assert "extends" in json.loads(univigu("profile", "schema")[1])["properties"]


@pytest.mark.parametrize(
    "command",
    [
        ("run", "train-stage-2", "--profile", "tiny"),
        ("status",),
        ("plan", "--profile", "tiny"),
        ("rehearse", "--profile", "tiny"),
        ("profile", "show", "tiny"),
        ("pipeline", "run", "--local"),
        ("pipeline", "submit", "profile=tiny"),
    ],
    ids=" ".join,
)
def test_settings_that_do_not_fit_are_refused_before_anything_starts(univigu, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, said = univigu(*command, "--set", "train_stage_2.stepz=5", "--set", "seed=often")
    assert (code, out) == (78, "")
    assert "--set: train_stage_2.stepz is not a setting; did you mean 'steps'?" in said
    assert '--set: seed is "often"; give a whole number of at least 0' in said
    assert list(tmp_path.iterdir()) == []


def test_every_task_of_a_pipeline_is_given_the_settings_in_its_profile():
    assert _with_settings({"parts": "2"}, ["train_stage_2.steps=5"]) == {
        "parts": "2",
        "profile": 'tiny {"train_stage_2.steps": 5}',
    }
    on_the_volume = {"profile": "/volume/mine.yaml"}
    assert _with_settings(on_the_volume, ["seed=1"]) == {"profile": '/volume/mine.yaml {"seed": 1}'}
    assert _with_settings(on_the_volume, []) == on_the_volume
