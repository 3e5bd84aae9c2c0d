"""The page opens from disk, escapes what it shows, and answers with the interval, whichever way it falls."""

import re

import numpy as np
import pytest

from browser import needs_browser, open_browser, open_tab
from components.bench.study.arms import Arm, Probe
from components.bench.study.page import answer, by_steps, judge, render_page
from components.bench.study.results import Evaluated, Probed, make_figures
from components.bench.study.shown import MISSING, SAME, WRONG, Shown, accuracy_by_tau, group_samples, mark_words
from components.evaluation.confusion import count_confusions
from univigu.video import encode_mp4

EVIL = '<script>alert("1")</script>\u202e'


def evaluated(name, rights, family="headline", **changes):
    items = [{"colour": number < rights} for number in range(40)]
    one = Arm(name=name, family=family, question=EVIL, **changes)
    tasks = dict.fromkeys(("captions", "generation", "generation_base", "joint", "captions_in_2_steps"), items)
    return Evaluated(one, {0: tasks, 1: tasks}, {0: [(10, 0.25), (20, 0.5)], 1: [(10, 0.5), (20, 0.5)]})


def probed(name, family="video_tokens", **changes):
    one = Probe(name=name, family=family, question=EVIL, **changes)
    claims = dict.fromkeys(("captions", "captions_in_1_steps", "captions_until_sure"), [{"colour": True}] * 4)
    measured = {name.replace("captions", "caption"): [0.25, 0.75] for name in claims}
    operations = {name: [2_000_000, 2_000_000] for name in measured}
    steps = {"caption_until_sure": [1, 2]}
    return Probed(one, {0: {"claims": claims, "seconds": measured, "operations": operations, "steps": steps}})


def samples():
    """A sample of each kind, with its video."""
    content = encode_mp4(np.arange(4 * 16 * 16 * 3, dtype=np.uint8).reshape(4, 16, 16, 3), 8, "yuv420p")
    facts = {
        "id": EVIL,
        "prompt": EVIL,
        "truth": {"colour": EVIL},
        "found": {"colour": EVIL},
        "correct": {"colour": False},
    }
    said = {
        "captions": ("worst", "a red two", "a red " + "w" * 300),
        "generation": ("best", "", None),
        "joint": ("worst", "", EVIL),
    }
    return [
        {"task": task, "rank": rank, "true": true, "text": text, "content": content, **facts}
        for task, (rank, true, text) in said.items()
    ]


def shown():
    stated = [
        {"task": "captions", "truth": f'{{"digit": "{n}"}}', "found": f'{{"digit": "{n + 1}"}}'} for n in range(9)
    ]
    heldout = {"tau": [0.25, 0.75], "token_accuracy": [0.5, 0.75], "token_accuracy_without_video": [0.25, 0.5]}
    return Shown(accuracy_by_tau([heldout, heldout]), count_confusions(stated, "digit"), group_samples(samples()))


def report_of(*ran, failures=None, probes=()):
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
    declared = {
        one.probe.name: {
            "family": one.probe.family,
            "question": EVIL,
            "of": "recipe",
            "against": EVIL,
            "settings": one.probe.changes(),
            "seeds": [0],
        }
        for one in probes
    }
    return {"about": {**about, "arms": arms, "probes": declared}, **make_figures("recipe", ran, probes)}


RECIPE, RANDOM = evaluated("recipe", 36), evaluated("random", 12, "prior", weights="random")


def test_text_from_data_is_escaped_and_invisible_characters_are_shown():
    report = report_of(RECIPE, RANDOM, failures={"0": EVIL}, probes=[probed("half")])
    page = render_page(report, [RECIPE, RANDOM], shown())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12
    assert "\u202e" not in page


def test_the_page_makes_no_outside_request():
    page = render_page(report_of(RECIPE, RANDOM), [RECIPE, RANDOM], shown())
    assert page.count("<video") == 3
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


def test_words_of_a_caption_that_are_wrong_or_missing_are_marked():
    marked = mark_words("The digit two in red.", "The digit five in red ink.")
    assert marked == [
        (SAME, "The digit"),
        (WRONG, "five"),
        (MISSING, "two"),
        (SAME, "in"),
        (WRONG, "red ink."),
        (MISSING, "red."),
    ]
    assert mark_words("a two", "a two") == [(SAME, "a two")]
    assert mark_words("a two", "") == [(MISSING, "a two")]


def test_a_caption_s_wrong_words_and_a_probe_s_cost_are_on_the_page():
    page = render_page(report_of(RECIPE, probes=[probed("half", frames=5)]), [RECIPE], shown())
    assert f"a red <del>{'w' * 300}</del> <ins>two</ins>" in page
    assert "500.0<small>250.0 to 750.0" in page  # ms per caption
    assert page.index("Captions of held-out clips") < page.index("The worst")


def test_captions_by_steps_end_with_those_that_stopped_when_the_model_was_sure():
    (figures,) = make_figures("recipe", [], [probed("steps")])["video_tokens"].values()
    rows = by_steps(figures | {"captions_in_16_steps": figures["captions"]})
    assert [row["label"] for row in rows] == ["1", "16", "until sure: 1.5 on average"]
    assert rows[0]["seconds"]["value"] == 0.5
    assert rows[1]["seconds"] is None


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_the_page_and_plays_its_clips_on_a_desk_and_a_telephone_light_and_dark(tmp_path):
    (tmp_path / "study.html").write_text(
        render_page(report_of(RECIPE, RANDOM, probes=[probed("half")]), [RECIPE, RANDOM], shown())
    )
    with open_browser() as browser:
        tab, wrong = open_tab(browser, (tmp_path / "study.html").as_uri())
        tab.goto((tmp_path / "study.html").as_uri())
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            for width in (1440, 390):
                tab.set_viewport_size({"width": width, "height": 844})
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
        playing = (
            "Promise.all([...document.querySelectorAll('video')].map(video => video.play())).then(all => all.length)"
        )
        assert tab.evaluate(playing) == 3
        assert wrong == []


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
