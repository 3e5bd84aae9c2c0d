"""The declared arms are valid, share their data, and differ in what they say."""

import pytest
import yaml

from components.bench.study import arms
from components.pipeline.profiles import load_profile
from univigu.errors import ConfigError

SMALL = {
    "profile": "smoke",
    "reference": "one",
    "settings": {"evaluate_model.captions": 4},
    "budgets": {"short": {"seeds": [0], "settings": {"train_stage_*.steps": 3}}, "full": {"seeds": [0, 1]}},
    "arms": [
        {"name": "one", "family": "headline", "question": "How well?"},
        {
            "name": "two",
            "family": "text_draws",
            "question": "Do draws help?",
            "settings": {"train_stage_2.text_draws": 2},
        },
    ],
}


def declare(folder, **changes):
    path = folder / "arms.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def arm(**changes):
    return {"name": "three", "family": "prior", "question": "Why?", **changes}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["short", "full"])
def test_every_declared_arm_is_a_valid_profile(budget):
    study = arms.load_study()
    arms.check_arms(study, budget, study.chosen(budget))
    assert {one.family for one in study.chosen("short")} >= {"headline", "prior", "stages", "literal", "retention"}


def test_every_declared_arm_but_the_reference_changes_something():
    study = arms.load_study()
    same = [one.name for one in study.arms if not arms.changed_steps(study, one, one.budgets[-1])]
    assert same == [study.reference]


def test_settings_of_the_study_the_budget_and_the_arm_replace_each_other_in_this_order(tmp_path):
    changed = arm(settings={"train_stage_1.steps": 5}, full={"train_stage_2.steps": 7})
    study = arms.load_study(declare(tmp_path, arms=[*SMALL["arms"], changed]))
    found = {}
    for budget in ("short", "full"):
        path = tmp_path / f"{budget}.yaml"
        arms.write_profile(path, arms.arm_profile(study, study.find("three"), budget, 4, "model/tiny-wan"))
        values = load_profile(str(path))
        found[budget] = (values["train_stage_1"]["steps"], values["train_stage_2"]["steps"])
        assert (values["seed"], values["evaluate_model"]["captions"]) == (4, 4)
    assert found == {"short": (5, 3), "full": (5, 7)}


def test_a_probe_is_of_the_reference_unless_it_names_another_arm():
    study = arms.load_study()
    assert {"plain", "longer", "block"} <= {one.name for one in study.probes_of(study.find("recipe"), "short")}
    assert [one.name for one in study.probes_of(study.find("without-block"), "short")] == ["block-without"]
    assert study.find("without-block").left_out == study.probes[-1].only


def test_random_weights_are_another_base_for_each_seed(tmp_path):
    study = arms.load_study(declare(tmp_path, arms=[*SMALL["arms"], arm(weights="random")]))
    bases = [arms.arm_profile(study, study.find("three"), "full", seed, "model/wan")["base"] for seed in (0, 1)]
    assert bases == ["model/wan-random-0", "model/wan-random-1"]
    assert arms.changed_steps(study, study.find("three"), "full") == ["train-stage-1", "evaluate-model"]
    assert arms.changed_steps(study, study.find("two"), "full") == ["train-stage-2"]


def test_an_arm_may_not_change_what_decides_the_shared_data(tmp_path):
    study = arms.load_study(declare(tmp_path, arms=[*SMALL["arms"], arm(settings={"video.frames": 5})]))
    with pytest.raises(ConfigError, match=r"'three' changes video\.frames, but all arms share their data"):
        arms.arm_profile(study, study.find("three"), "short", 0, "model/tiny-wan")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": [arm(family="luck"), *SMALL["arms"]]}, r"arms\.0\.family"),
        ({"arms": [*SMALL["arms"], arm(name="../up")]}, r"arms\.2\.name"),
        ({"arms": [*SMALL["arms"], arm(name="one")]}, "two arms called 'one'"),
        ({"probes": [arm(name="one")]}, "two arms or probes called 'one'"),
        ({"probes": [arm(of="none")]}, "no arm 'none'"),
        ({"probes": [arm(against="two")]}, "against 'two', which is no probe"),
        ({"probes": [arm(only={"digit": ["two"]})]}, "needs `clips: redrawn`"),
        ({"reference": "none"}, "no arm 'none'"),
        ({"arms": []}, "arms"),
    ],
)
def test_a_fault_in_the_file_is_one_sentence_with_its_place(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        arms.load_study(declare(tmp_path, **changes))


def test_an_unknown_setting_is_refused_before_anything_runs_and_names_the_arm(tmp_path):
    study = arms.load_study(declare(tmp_path, arms=[*SMALL["arms"], arm(settings={"train_stage_1.stepps": 5})]))
    with pytest.raises(ConfigError, match=r"'three'.*stepps"):
        arms.check_arms(study, "short", study.arms)
