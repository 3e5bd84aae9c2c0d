"""The page opens from disk, escapes what it shows, and answers with the interval, whichever way it falls."""

import re

import pytest

from components.bench.study.arms import Arm
from components.bench.study.page import answer, judge, render_page
from components.bench.study.results import Evaluated, make_figures

EVIL = '<script>alert("1")</script>\u202e'


def evaluated(name, rights, family="headline", **changes):
    items = [{"colour": number < rights} for number in range(40)]
    one = Arm(name=name, family=family, question=EVIL, **changes)
    tasks = dict.fromkeys(("captions", "generation", "generation_base", "joint", "captions_in_2_steps"), items)
    return Evaluated(one, {0: tasks, 1: tasks}, {0: [(10, 0.25), (20, 0.5)], 1: [(10, 0.5), (20, 0.5)]})


def report_of(*ran, failures=None):
    arms = {
        one.arm.name: {
            "family": one.arm.family,
            "question": one.arm.question,
            "settings": {"model.prediction": EVIL},
            "weights": one.arm.weights,
            "seeds": [0, 1],
            "failures": {},
        }
        for one in ran
    }
    arms |= {"broken": {**next(iter(arms.values())), "seeds": [], "failures": failures}} if failures else {}
    machine = {"processor": EVIL, "cores": 2, "memory_gib": 8}
    about = {"budget": "short", "profile": "tiny", "seeds": [0, 1], "reference": "recipe", "machine": machine}
    return {"about": {**about, "arms": arms}, **make_figures("recipe", ran)}


RECIPE, RANDOM = evaluated("recipe", 36), evaluated("random", 12, "prior", weights="random")


def test_text_from_data_is_escaped_and_invisible_characters_are_shown():
    page = render_page(report_of(RECIPE, RANDOM, failures={"0": EVIL}), [RECIPE, RANDOM])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert "\u202e" not in page


def test_the_page_makes_no_outside_request():
    page = render_page(report_of(RECIPE, RANDOM), [RECIPE, RANDOM])
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) == []
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_answer_comes_first_then_failures_then_the_table_with_intervals_and_curves():
    page = render_page(report_of(RECIPE, RANDOM, failures={"0": "its disk is full"}), [RECIPE, RANDOM])
    places = [
        page.index(text) for text in ("the generator&#39;s knowledge adds", "its disk is full", "<table>", "<polyline")
    ]
    assert places == sorted(places)
    assert ">-60.0<small>-75.0 to -45.0" in page
    assert '<polygon class="band"' in page  # two seeds


def test_the_answer_states_the_effect_of_the_prior_with_its_interval():
    (sentence,) = answer(report_of(RECIPE, RANDOM))
    assert "90.0 % (80.0 to 97.5)" in sentence
    assert sentence.endswith("the generator's knowledge adds 60.0 points (45.0 to 75.0).")
    (sentence,) = answer(report_of(evaluated("recipe", 12), evaluated("random", 36, "prior", weights="random")))
    assert sentence.endswith("the generator's knowledge costs 60.0 points (45.0 to 75.0).")


def test_an_interval_that_includes_zero_shows_no_effect():
    assert "no effect" in judge({"value": 0.01, "low": -0.01, "high": 0.03}, "it")


@pytest.mark.parametrize("ran", [[RECIPE], [RECIPE, evaluated("frozen", 30, "prior")]])
def test_without_random_weights_there_is_no_answer(ran):
    assert answer(report_of(*ran)) == ["This study has not compared a pretrained generator with random weights."]
