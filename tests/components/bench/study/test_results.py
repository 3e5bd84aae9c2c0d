"""Figures are over clips and seeds, each against the reference arm; what has not run has none."""

import pytest

from components.bench.study.arms import Arm, Plan, Probe, Study
from components.bench.study.results import Evaluated, Probed, make_figures, write_report
from univigu.errors import BadInputError


def arm(name, family="headline", **changes):
    return Arm(name=name, family=family, question="Why?", **changes)


def evaluated(one, rights, seeds=(0,)):
    """An arm that is right on the first `rights` of 8 clips' colours, and on all digits."""
    items = [{"colour": number < rights, "digit": True} for number in range(8)]
    tasks = dict.fromkeys(("captions", "generation", "generation_base", "joint", "captions_in_2_steps"), items)
    return Evaluated(one, dict.fromkeys(seeds, tasks), {seed: [(10, 0.5)] for seed in seeds})


def test_each_score_is_a_figure_with_its_clips_and_seeds():
    report = make_figures("one", [evaluated(arm("one"), 4, seeds=(0, 1, 2))])
    figures = report["headline"]["one"]
    assert figures["captions"]["value"] == 0.75
    assert figures["captions.colour"] == {"value": 0.5, "low": 0.125, "high": 0.875, "n": 8, "seeds": 3}
    assert figures["captions.digit"]["value"] == 1.0
    assert figures["captions_in_2_steps"] == figures["captions"]
    assert all(set(figure) == {"value", "low", "high", "n", "seeds"} for figure in figures.values())
    assert not any("difference" in name for name in figures)


def test_other_arms_are_compared_with_the_reference_over_the_seeds_that_both_have():
    report = make_figures("one", [evaluated(arm("one"), 8, (0, 1)), evaluated(arm("two", "prior"), 0, (1, 2))])
    assert report["prior"]["two"]["captions.difference"]["value"] == -0.5
    assert report["prior"]["two"]["captions.difference"]["seeds"] == 1
    apart = make_figures("one", [evaluated(arm("one"), 8, (0,)), evaluated(arm("two", "prior"), 0, (1,))])
    assert "captions.difference" not in apart["prior"]["two"]


def test_a_family_without_a_finished_arm_is_left_out():
    assert list(make_figures("one", [evaluated(arm("one"), 4)])) == ["headline"]


def test_random_weights_are_not_scored_as_a_generator():
    report = make_figures("one", [evaluated(arm("one"), 4), evaluated(arm("r", "prior", weights="random"), 4)])
    assert {"generation_base", "generation.kept"} <= report["headline"]["one"].keys()
    assert not {"generation_base", "generation.kept"} & report["prior"]["r"].keys()


def test_nothing_is_written_when_no_arm_has_finished(tmp_path):
    study = Study(profile="smoke", reference="one", budgets={"short": Plan(seeds=[0])}, arms=[arm("one")])
    with pytest.raises(BadInputError, match="No arm of the study has finished"):
        write_report(study, "short", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_probe_has_shares_its_difference_from_the_one_it_is_against_and_its_cost():
    def probed(name, rights, seeds, against=""):
        one = Probe(name=name, family="video_tokens", question="Why?", against=against)
        claims = {"captions": [{"colour": number < rights} for number in range(8)]}
        costs = {"seconds": {"caption": [0.5, 1.5]}, "operations": {"caption": [7, 7]}, "steps": {}}
        return Probed(one, {seed: {"claims": claims, **costs} for seed in seeds})

    few, plain = probed("few", 2, (0, 1), "plain"), probed("plain", 8, (1, 2))
    figures = make_figures("one", [], [few, plain])["video_tokens"]["few"]
    assert figures["captions"]["value"] == figures["captions.colour"]["value"] == 0.25
    assert (figures["captions.difference"]["value"], figures["captions.difference"]["seeds"]) == (-0.75, 1)
    assert figures["operations_per_caption"] == {"value": 7.0, "low": 7.0, "high": 7.0, "n": 4, "seeds": 2}
    assert (figures["seconds_per_caption"]["value"], figures["seconds_per_caption"]["seeds"]) == (1.0, 2)
    assert "captions.difference" not in make_figures("one", [], [few])["video_tokens"]["few"]
