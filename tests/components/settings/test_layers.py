"""What a profile becomes with all that it extends, and with settings of the command line."""

import pytest
import yaml

from components.pipeline.profiles import absolute_profile, find_profile, load_profile, profile_files, with_settings
from refused_profile import refusal
from univigu.errors import ConfigError


def test_a_profile_takes_what_it_does_not_say_from_the_one_that_it_extends(write):
    path = write({"extends": "tiny", "train_stage_2": {"steps": 7}, "text": {"caption_tokens": [40, 50]}})
    expected = load_profile("tiny")
    expected["train_stage_2"]["steps"] = 7
    expected["text"]["caption_tokens"] = [40, 50]
    assert load_profile(path) == expected
    assert list(load_profile(path)) == list(expected)


def test_profiles_extend_files_beside_them_in_turn(write):
    write({"extends": "tiny", "seed": 1, "train_stage_2": {"steps": 7, "batch_size": 2}}, "base.yaml")
    path = write({"extends": "base.yaml", "train_stage_2": {"steps": 8}})
    profile = load_profile(path)
    assert (profile["seed"], profile["train_stage_2"]["steps"], profile["train_stage_2"]["batch_size"]) == (1, 8, 2)
    assert [file.name for file in profile_files(path)] == ["base.yaml", "mine.yaml"]


def test_the_options_of_another_captioner_are_not_mixed_with_those_of_the_parent(write):
    options = {"folder": "model/captioner"}
    captions = {"captioner": "transformers", "options": options}
    profile = load_profile(write({"extends": "wan-1.3b", "caption_videos": captions}))
    assert profile["caption_videos"]["options"] == options
    assert profile["caption_videos"]["attempts"] == load_profile("wan-1.3b")["caption_videos"]["attempts"]


def test_a_fault_is_told_of_the_file_that_says_it(write):
    parent = write({"extends": "tiny", "seed": "x"}, "base.yaml")
    path = write({"extends": "base.yaml", "train_stage_2": {"steps": 0}, "nonsense": 1})
    said = refusal(path)
    assert f'{parent}: seed is "x"' in said
    assert f"{path}: train_stage_2.steps is 0" in said
    assert f"{path}: nonsense is not a setting" in said


def test_an_unknown_parent_is_named_with_the_profile_that_extends_it(write):
    path = write({"extends": "huge"})
    assert f"'extends' in the profile {path} is \"huge\", which doesn't exist" in refusal(path)
    path = write({"extends": "nowhere.yaml"})
    assert f"nowhere.yaml, which {path} extends" in refusal(path)
    assert "give a bundled profile's name or a YAML file" in refusal(write({"extends": ["tiny"]}))
    assert "no profile file" in refusal(write({"extends": f"{'x' * 5000}.yaml"}))
    assert "not readable YAML" in refusal(write({"extends": "\0.yaml"}))


def test_profiles_that_extend_each_other_are_refused(write):
    write({"extends": "mine.yaml"}, "other.yaml")
    said = refusal(write({"extends": "other.yaml"}))
    assert "in a circle" in said
    assert "mine.yaml extends" in said
    assert "other.yaml extends" in said
    assert "in a circle" in refusal(write({"extends": "mine.yaml"}))


def test_an_output_table_under_zero_3_needs_steps_of_one_task(write):
    stage, model = {"zero_stage": 3}, {"output_dim": 64}
    said = refusal(write({"extends": "smoke", "model": model, "train_stage_1": stage}))
    assert "train_stage_1.task_draw is sample, and with ZeRO 3 the output table (model.output_dim 64) needs" in said
    assert "set it to step, or zero_stage to 2" in said
    for fitting in ({"train_stage_1": stage}, {"model": model, "train_stage_1": stage | {"task_draw": "step"}}):
        assert load_profile(write({"extends": "smoke", **fitting}))["train_stage_1"]["zero_stage"] == 3


def count(own):
    return sum(count(value) if isinstance(value, dict) else 1 for value in own.values())


@pytest.mark.parametrize(
    ("name", "parent", "differences"), [("wan-14b", "wan-1.3b", 9), ("wan-5b", "wan-1.3b", 12), ("smoke", "tiny", 39)]
)
def test_a_bundled_profile_states_its_differences_and_no_more(name, parent, differences):
    own = yaml.safe_load(find_profile(name).read_text())
    assert own.pop("extends") == parent
    assert count(own) == differences

    def differs(before, after):
        return sum(
            differs(before[key], after[key]) if isinstance(after[key], dict) else before[key] != after[key]
            for key in after
        )

    unchanged = 2 if name == "smoke" else 0  # the shares of `joint`, which complete the others
    assert differs(load_profile(parent), load_profile(name)) == differences - unchanged


# --- other settings on the command line ------------------------------------------------------------------------------


def test_settings_on_the_command_line_have_the_last_word():
    spec = with_settings("smoke", ["train_stage_2.steps=5", "train_stage_1.lora={rank: 4, alpha: 4, targets: [to_q]}"])
    expected = load_profile("smoke")
    expected["train_stage_2"]["steps"] = 5
    expected["train_stage_1"]["lora"] = {"rank": 4, "alpha": 4, "targets": ["to_q"]}
    assert load_profile(spec) == expected


def test_settings_are_added_to_those_that_a_profile_was_given_before():
    spec = with_settings(with_settings("smoke", ["seed=1", "video.fps=9"]), ["seed=2"])
    assert (load_profile(spec)["seed"], load_profile(spec)["video"]["fps"]) == (2, 9)
    assert with_settings("smoke", []) == "smoke"


def test_a_setting_goes_into_a_table_that_a_profile_would_replace():
    profile = load_profile(with_settings("wan-1.3b", ["caption_videos.options.model=mine"]))
    assert profile["caption_videos"]["options"] == {
        **load_profile("wan-1.3b")["caption_videos"]["options"],
        "model": "mine",
    }


def test_an_unknown_key_and_a_wrong_value_on_the_command_line_are_named_together():
    said = refusal(with_settings("smoke", ["train_stage_2.stepz=5", "seed=often", "txet.length=3"]))
    assert "--set: train_stage_2.stepz is not a setting; did you mean 'steps'?" in said
    assert '--set: seed is "often"; give a whole number of at least 0' in said
    assert "--set: txet is not a setting; did you mean 'text'?" in said


def test_what_is_no_setting_on_the_command_line_is_named():
    with pytest.raises(ConfigError) as raised:
        with_settings("smoke", ["steps", "seed=[1", ".x=1"])
    said = str(raised.value)
    assert "'steps' is not section.key=VALUE" in said
    assert "'.x=1' is not section.key=VALUE" in said
    assert "the value in 'seed=[1' is not YAML" in said


def test_a_profile_is_the_same_one_from_another_folder(write, monkeypatch, tmp_path):
    write({"extends": "smoke", "seed": 4})
    monkeypatch.chdir(tmp_path)
    spec = absolute_profile(with_settings("mine.yaml", ["video.fps=9"]))
    monkeypatch.chdir("/")
    assert (load_profile(spec)["seed"], load_profile(spec)["video"]["fps"]) == (4, 9)
    assert absolute_profile("tiny") == "tiny"


def test_a_profile_given_with_broken_settings_is_refused():
    assert "can't be read" in refusal('smoke {"seed": [}')
