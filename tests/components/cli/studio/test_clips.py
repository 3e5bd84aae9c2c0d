"""The clips of a run by page, verdict, stage and text."""

import time

import pytest

from components.cli import edits
from components.cli.studio import clips
from components.cli.studio.clips import KEPT, QUARANTINED, Query
from components.cli.studio.work import render
from univigu.errors import MissingInputError


@pytest.fixture(scope="module")
def small(tmp_path_factory, recommit, leave_clips):
    root = tmp_path_factory.mktemp("clips")
    leave_clips(root, recommit)
    return root


def ids(root, **query):
    return [clip["id"] for clip in clips.find(root, Query(**query)).clips]


def test_each_clip_has_its_verdict_and_a_rejected_one_its_reason(small):
    assert clips.count_verdicts(small) == {KEPT: 27, QUARANTINED: 4, "frozen": 1, "too_long": 3}
    assert ids(small, verdict="too_long") == ["c00001", "c00011", "c00021"]
    (frozen,) = clips.find(small, Query("frozen")).clips
    assert (frozen["stored"], frozen["detail"], frozen["stage"]) == (False, "nothing moves", 2)
    assert frozen["prompt"] == "a square that stands still"
    (first, *_) = clips.find(small, Query("too_long")).clips
    assert (first["stored"], first["caption"], first["scores"]) == (True, "so", {"motion": 3.5})
    assert clips.read_clip(small, "c00001")[4:8] == b"ftyp"
    with pytest.raises(MissingInputError, match="a check of its frames rejected it"):
        clips.read_clip(small, "frozen")


def test_filters_are_combined_and_text_is_found_in_prompts_and_captions(small):
    assert ids(small, text="SHADE 2")[:2] == ["c00002", "c00020"]
    assert ids(small, text="moves, C00003") == ["c00003"]
    assert ids(small, text="stands still") == ["frozen"]
    assert ids(small, verdict=KEPT, stage=1, text="shade 2") == [
        "c00002",
        "c00020",
        "c00022",
        "c00024",
        "c00026",
        "c00028",
    ]
    assert ids(small, verdict="no such reason") == ids(small, text="%") == []


def test_clips_are_found_by_a_score_within_bounds(small):
    assert clips.list_scores(small) == ["motion"]
    assert ids(small, score="motion", most=1.0) == ["frozen"]
    assert len(ids(small, score="motion", least=3.5)) == 24
    assert ids(small, verdict="too_long", score="motion", least=3.5) == ["c00001", "c00011", "c00021"]
    assert ids(small, score="motion", least=3.6) == ids(small, score="no such score") == []


def test_a_page_beyond_the_last_is_the_last(small):
    found = clips.find(small, Query(), 99)
    assert (found.total, found.page, found.pages, len(found.clips)) == (31, 2, 2, 7)
    assert clips.find(small, Query(), -3).page == 1


def test_texts_are_escaped_and_their_direction_stays_theirs(small):
    found = clips.find(small, Query())
    page = render("clips.html.j2", found=found, first=1, pending=edits.mark(small, found.clips))
    assert "<img" not in page
    assert (
        "<bdi>&lt;img src=x onerror=alert(1)&gt; &#123;&#123;7&#125;&#125; &#36;&#123;7&#125; \u202egnorw</bdi>" in page
    )


def test_without_clips_it_is_said_which_step_makes_them(tmp_path):
    with pytest.raises(MissingInputError, match="`univigu run synthesize-videos` makes them"):
        clips.count_verdicts(tmp_path)


def test_the_first_page_of_ten_thousand_clips_takes_less_than_a_second(tmp_path, recommit, leave_clips):
    leave_clips(tmp_path, recommit, 10_000)
    began = time.process_time()
    assert clips.find(tmp_path, Query(text="shade")).total == 9999
    assert time.process_time() - began < 1
    assert clips.list_scores(tmp_path) == ["motion"]
    for query, count in (
        (Query(text="shade 99"), 111),
        (Query("kept", 2), 4000),
        (Query(score="motion", least=1.0), 10_000),
    ):
        began = time.process_time()
        assert clips.find(tmp_path, query).total == count
        assert time.process_time() - began < 0.3
