"""The benchmark of several texts for each pass over a video: its arms, its sources and its comparison."""

import pytest
import torch

from components.bench import text_draws
from components.bench.study.arms import check_arms, load_study
from components.bench.study.run import SOURCES
from components.pipeline.profiles import load_profile


def test_the_arms_are_valid_and_differ_in_draws_and_steps_alone():
    study = load_study(text_draws.DECLARED)
    arms = study.chosen("short")
    check_arms(study, "short", arms)
    assert {key for arm in arms for key in arm.settings} == {"train_stage_2.steps", "train_stage_2.text_draws"}
    assert len({tuple(sorted(arm.settings.items())) for arm in arms}) == len(arms)


def test_the_sources_of_the_data_are_linked_once(tmp_path):
    study = load_study(text_draws.DECLARED)
    profile = load_profile(study.profile)
    (tmp_path / "there" / profile["heldout"]).parent.mkdir(parents=True)
    (tmp_path / "there" / profile["heldout"]).write_text("{}")
    (tmp_path / "there" / profile["base"] / "vae").mkdir(parents=True)
    (tmp_path / "there" / profile["base"] / "vae" / "config.json").write_text("[]")
    for _ in range(2):
        text_draws.link_sources(study, tmp_path / "there", tmp_path / "here")
    assert {"base", "heldout"} < {*SOURCES}
    assert (tmp_path / "here" / profile["heldout"]).read_text() == "{}"
    assert (tmp_path / "here" / profile["base"] / "vae" / "config.json").read_text() == "[]"


def arm(draws, steps, value, seconds=1.0):
    return {
        "arm": f"draws-{draws}-{steps}",
        "draws": draws,
        "steps": steps,
        "seconds_per_step": seconds,
        "captions": {"value": value},
    }


def test_steps_to_the_target_are_interpolated_and_compared_with_those_of_one_text():
    arms = [arm(1, 300, 0.8), arm(1, 600, 1.0), arm(8, 300, 0.95, 3.0), arm(8, 600, 0.96, 3.0), arm(2, 300, 0.89)]
    found = text_draws.compare(arms)
    assert found["steps_to"] == {"1": pytest.approx(450), "2": None, "8": 300}
    assert found["seconds_to"] == {"1": pytest.approx(450), "2": None, "8": 900}
    assert found["ratio"] == pytest.approx(300 / 450, abs=1e-4)


def test_the_share_of_the_draws_in_a_gradients_variance_is_found():
    """Made of parts with known variances: 2 of the clips, 1 of the draws, around any mean."""
    generator = torch.Generator().manual_seed(0)
    clips = 5 + 2**0.5 * torch.randn(text_draws.CLIPS, 1, 4000, generator=generator)
    gradients = clips + torch.randn(text_draws.CLIPS, text_draws.DRAWS, 4000, generator=generator)
    of_clips = gradients.mean(1)
    squares = float((gradients - of_clips[:, None]).square().sum())
    found = text_draws.share_of_draws(squares, of_clips)
    assert found["from_draws"] == pytest.approx(1 / 3, abs=0.01)
    assert found["left"]["1"] == 1
    assert found["left"]["4"] == pytest.approx(2 / 3 + 1 / 12, abs=0.01)


def test_without_the_target_in_reach_there_is_no_ratio():
    assert text_draws.compare([arm(1, 300, 0.8), arm(8, 300, 0.89)])["ratio"] is None


def test_the_best_arm_is_found_among_those_with_equally_many_steps():
    arms = [arm(1, 300, 0.7), arm(1, 600, 0.8), arm(1, 900, 0.95), arm(8, 300, 0.9), arm(8, 600, 0.81)]
    assert text_draws.best_arm(arms) == "draws-8-600"
