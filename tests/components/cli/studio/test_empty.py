"""What the studio says where there is nothing yet, or what is asked for can't be."""

import numpy as np
import pytest

from components.cli.studio import gallery, registered, runs, sampling
from components.cli.studio.work import Studio, render
from univigu.errors import BadInputError, MissingInputError


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "root").mkdir()
    return Studio(tmp_path / "root", "other", tmp_path)


def test_a_work_root_with_nothing_says_what_to_run_next_and_stays_empty(empty):
    for read in (registered.list_names, runs.list_runs):
        with pytest.raises(MissingInputError, match="run `make demo`"):
            read(empty)
    with pytest.raises(MissingInputError, match="'other' has no champion"):
        sampling.Model(empty).label()
    page = render("runs.html.j2", **runs.read_work(empty.root))
    assert "`univigu run train-stage-1` or `make demo` starts it" in page.replace("&#96;", "`")
    assert page.count("has not run") == 11
    assert gallery.list_results(empty.root, 5) == ([], 1, 1)
    assert list(empty.root.iterdir()) == []


def test_a_curve_is_thinned_to_means_in_the_order_of_its_steps():
    assert runs.thin([(3, 5.0), (1, 1.0), (2, 2.0)], most=2) == [(1.5, 1.5), (3.0, 5.0)]
    assert runs.thin([]) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "number of steps is 0"),
        ({"seed": None}, "The seed is None"),
        ({"seed": -1}, "The seed is -1"),
        ({"text_at": 1.5}, "'text_at' is 1.5"),
        ({"guidance": float("nan")}, "'guidance' is nan"),
        ({"prompt": "x" * 5000}, "at most 4000 characters, not 5000"),
        ({"prompt": "  "}, "The prompt is empty"),
    ],
)
def test_a_field_out_of_its_range_is_named_before_a_model_is_loaded(empty, given, said):
    asked = {"prompt": "a seven", "negative_prompt": "", "steps": None, "guidance": None, "seed": 0}
    with pytest.raises(BadInputError, match=said):
        sampling.generate(empty, sampling.Model(empty), {**asked, **given}, print)


def test_a_damaged_result_hides_no_other_and_a_foreign_folder_is_none(empty):
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    good, bad = (gallery.save(empty.root, frames, 8, {"prompt": "a seven"}, "") for _ in range(2))
    (gallery.home(empty.root) / bad.id / gallery.RECIPE).write_text("{")
    (gallery.home(empty.root) / "foreign").mkdir()
    (found,), _, _ = gallery.list_results(empty.root, 1)
    assert (found.id, found.name) == (good.id, "a-seven")
    with pytest.raises(MissingInputError, match="no such result"):
        gallery.export(empty, "../foreign.mp4")
