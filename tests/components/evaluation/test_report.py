"""The page is self-contained, escapes every text from data, and says what is missing."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from browser import needs_browser, open_browser, open_tab
from components.evaluation import confusion, report, training_curves
from univigu.evaluation.claims import summarise


def render(**changes):
    scores = {
        name: summarise([{"colour": True, "speed": False}, {"colour": False, "speed": True}])
        for name in ("captions", "captions_without_video", "majority", "generation", "generation_base", "recogniser")
    }
    scores["joint"] = {"agreement": scores["captions"]["mean"], "colour": scores["captions"]["colour"]}
    return report.render_report(
        **{
            "about": {"Model": "0123"},
            "scores": scores,
            "attributes": ("colour", "speed"),
            "samples": {"captions": [], "generation": [], "joint": []},
            "charts": {},
            "funnel": [],
            "rejected": [],
            "notes": [],
            **changes,
        }
    )


def clip(frames=9):
    return np.random.default_rng(0).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)


def test_text_from_data_is_escaped_and_invisible_characters_are_shown():
    evil = '<script>alert("1")</script>\u202e\x07'
    sample = report.clip_sample(
        {"video": report.preview(clip(), 8)},
        prompt=evil,
        text=evil,
        truth={"colour": "red"},
        found={},
        correct={"colour": False},
    )
    rejected = report.rejected_examples({"curate": [{"reason": "odd", "detail": evil, "row": f'{{"text": "{evil}'}]})
    page = render(samples={"captions": [sample], "generation": [], "joint": [sample]}, rejected=rejected)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 5
    assert "<script" not in report.stamp(page, {evil: evil}, {evil: "report.html"})
    assert "\u202e" not in page
    assert "\\u202e\\u0007" in page


def test_the_page_makes_no_outside_request():
    page = render(samples={"captions": [], "generation": [], "joint": []})
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) == []
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_the_three_results_lead_the_page_each_with_what_it_is_compared_with():
    page = render()
    lead = page[page.index('class="results"') : page.index("<nav>")]
    assert re.findall(r"<h2>(.*?)</h2><b>([\d.]+)<", lead) == [
        ("Captions", "50.0"),
        ("Generated videos", "50.0"),
        ("Joint", "50.0"),
    ]
    assert "50.0 % without the video" in lead
    assert "50.0 % by its base" in lead


def test_a_page_is_stamped_with_the_run_and_with_links():
    page = render()
    stamped = report.stamp(page, {"Version": "uni-vigu 3", "Machine": "2 cores"}, {"Data Docs": "../docs/index.html"})
    assert "<dd>uni-vigu 3</dd>" in stamped
    assert stamped.index("2 cores") < stamped.index("<nav>")
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']*)""", stamped) == ["../docs/index.html"]
    assert report.RUN in page
    assert report.RUN not in stamped


def right_and_wrong():
    """Two samples: a caption without a mistake, and one with two."""
    return [
        report.clip_sample(
            {"video": report.preview(clip(), 8)}, prompt="p", text=name, truth=truth, found={}, correct=correct
        )
        for name, truth, correct in (
            ("right", {"colour": "red"}, {"colour": True}),
            ("wrong", {"colour": "red", "speed": "slow"}, {"colour": False, "speed": False}),
        )
    ]


def test_clips_can_be_paused_and_samples_sorted_without_a_script():
    right, wrong = right_and_wrong()
    page = render(samples={"captions": [right, wrong], "worst": [wrong], "generation": [], "joint": []})
    assert 'style="--mistakes:0"' in page
    assert 'style="--mistakes:2"' in page
    assert page.count('class="moves"') == page.count('class="still"') == 3
    for needed in ('id="pause"', "body:has(#pause:checked)", 'id="worst-first"', "body:has(#worst-first:checked)"):
        assert needed in page
    assert "<script" not in page


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_the_page_on_a_telephone_too_and_it_pauses_and_sorts(tmp_path):
    right, wrong = right_and_wrong()
    said = [{"task": "captions", "truth": f'{{"digit": "{n}"}}', "found": f'{{"digit": "{n + 1}"}}'} for n in range(20)]
    losses = [(step, 1.0 + step % 7) for step in range(100)]
    page = render(
        samples={
            "captions": [right, wrong],
            "worst": [wrong],
            "generation": [right],
            "joint": [{**wrong, "text": "w" * 300}],
        },
        confusion=confusion.count_confusions(said, "digit"),
        charts={"training": [report.line_chart("Stage 1", "step", {"video": losses})]},
        funnel=report.funnel_steps(
            [{"step": "curate", "rows_in": 9, "rows_out": 5, "quarantined": 4, "reasons": {"x" * 90: 4}}]
        ),
    )
    facts, links = {"Date": "today", "Commit": "0123456789" * 4 + "-dirty"}, {"Data Docs": "docs/index.html"}
    (tmp_path / "index.html").write_text(report.stamp(page, facts, links))
    with open_browser() as browser:
        tab, complaints = open_tab(browser, tmp_path.as_uri())
        tab.goto((tmp_path / "index.html").as_uri())
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            for width in (1440, 390):
                tab.set_viewport_size({"width": width, "height": 844})
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert [tab.locator(".result b").nth(n).bounding_box()["y"] < 844 for n in range(3)] == [True] * 3

        captions, clips = tab.locator("#captions ~ .samples").first.locator(".sample"), tab.locator(".clip .moves")
        assert captions.nth(0).bounding_box()["y"] < captions.nth(1).bounding_box()["y"]
        tab.get_by_label("most mistakes first").check()
        assert captions.nth(0).bounding_box()["y"] > captions.nth(1).bounding_box()["y"]
        assert captions.nth(1).inner_text().startswith("video\nwrong")
        clips.first.scroll_into_view_if_needed()
        assert tab.locator(".clip .still:visible").count() == 0
        tab.get_by_label("Pause all clips").check()
        assert (tab.locator(".clip .moves:visible").count(), tab.locator(".clip .still:visible").count()) == (0, 5)
        assert tab.evaluate("[...document.querySelectorAll('.still')].every(one => one.naturalWidth > 0)")
        assert complaints == []


def test_a_confusion_matrix_has_a_row_for_each_true_value():
    said = [("1", "1"), ("1", "7"), ("7", "7"), ("7", None), ("7", "a <b>")]
    rows = [
        {"task": "captions", "truth": json.dumps({"digit": true}), "found": json.dumps({"digit": found})}
        for true, found in said
    ]
    rows.append({"task": "joint", "truth": '{"digit": "9"}', "found": "{}"})
    matrix = confusion.count_confusions(rows, "digit")
    assert matrix["stated"] == ["1", "7", "a <b>", "not said"]
    assert {row["true"]: row["counts"] for row in matrix["rows"]} == {"1": [1, 1, 0, 0], "7": [0, 1, 1, 1]}
    page = render(confusion=matrix)
    assert "Confusions of the digit" in page
    assert "a &lt;b&gt;" in page
    assert page.count('<td class="right"') == 2
    assert confusion.count_confusions(rows[:1], "digit") is None  # a single value
    assert confusion.count_confusions(rows, "colour") is None


def test_a_curve_is_smoothed_within_a_band():
    steps = list(range(1, 301))
    values = [1.0 if step % 10 else 6.0 for step in steps]
    points = training_curves.smooth(steps, values)
    assert len(points) == 60
    assert [round(mean, 3) for _, mean, _, _ in points[:2]] == [1.0, 2.0]
    assert points[0][2:] == (1.0, 1.0)
    assert points[1][2:] == (1.0, 6.0)
    chart = training_curves.training_charts({"stage1": {"curves": {"step": steps, "video_mse": values}, "heldout": {}}})
    (line,) = chart["training"][0]["lines"]
    assert len(line["band"].split()) == 120
    assert '<polygon class="band"' in render(charts=chart)


def test_missing_pieces_are_named():
    page = render()
    for missing in (
        "No captions were made",
        "No videos were generated",
        "No joint samples",
        "recorded no such figures",
    ):
        assert missing in page


def test_an_animation_keeps_every_pixel_of_every_frame():
    frames = clip()
    uri = report.animation(frames, 8)
    assert uri == report.animation(frames, 8)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.n_frames == 9
    for number, frame in enumerate(frames):
        picture.seek(number)
        assert np.array_equal(np.asarray(picture.convert("RGB")), frame)


def test_the_contact_sheet_shows_the_clips_scaled_up():
    frames = clip(3)
    sheet = Image.open(
        io.BytesIO(report.contact_sheet({"Title": [report.Card(report.Preview(frames, 8), "some words")] * 2}))
    )
    sheet.seek(2)
    pixels = np.asarray(sheet.convert("RGB"))
    big = frames[2].repeat(5, 0).repeat(5, 1)
    found = [
        (top, left)
        for top, left in np.argwhere((pixels == big[0, 0]).all(-1))
        if np.array_equal(pixels[top : top + 160, left : left + 160], big)
    ]
    assert len(found) == 2


def test_the_contact_sheet_marks_what_is_wrong():
    good, bad = (report.Card(report.Preview(clip(2), 8), "some words", wrong) for wrong in ((), ("digit", "speed")))
    red = []
    for card in (good, bad):
        sheet = Image.open(io.BytesIO(report.contact_sheet({"Title": [card]})))
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
        red.append(int((pixels == (0xCF, 0x22, 0x2E)).all(-1).sum()))
    assert red[0] == 0
    assert red[1] > 2 * 160  # the frame, and the words


def test_a_long_and_wide_clip_is_shown_smaller_and_with_fewer_frames_in_the_same_time():
    small = clip()
    assert np.array_equal(report.preview(small, 8).frames, small)
    frames, fps = report.preview(np.full((81, 480, 832, 3), 7, np.uint8), 16)
    assert frames.shape == (21, 147, 256, 3)
    assert abs(len(frames) / fps - 81 / 16) < 0.25
    assert frames.min() == frames.max() == 7


def test_a_line_chart_maps_values_onto_the_plot():
    chart = report.line_chart("Loss", "step", {"a": [(0, 4.0), (50, 2.0), (100, 0.0)], "b": []})
    assert [line["name"] for line in chart["lines"]] == ["a"]
    ticks = {float(text): at for at, text in chart["y_ticks"]}
    assert ticks[0.0] == 100.0
    assert chart["lines"][0]["path"] == f"0.0,{ticks[4.0]} 50.0,{ticks[2.0]} 100.0,{ticks[0.0]}"


@pytest.mark.parametrize(
    ("low", "high", "intervals", "ticks"),
    [
        (0.0, 4.0, 4, [0, 1, 2, 3, 4]),
        (0.0, 0.83, 4, [0, 0.25, 0.5, 0.75, 1]),
        (-0.2, 1.0, 4, [-0.5, 0, 0.5, 1]),
        (1, 300, 5, [0, 100, 200, 300]),
        (0.05, 0.95, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.0, 1e-9, 4, [0, 2.5e-10, 5e-10, 7.5e-10, 1e-9]),
        (3, 4, 5, [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ],
)
def test_ticks_are_round_numbers_that_span_the_values(low, high, intervals, ticks):
    assert report.find_ticks(low, high, intervals) == pytest.approx(ticks)


def test_a_line_chart_of_a_single_point_can_be_drawn():
    (line,) = report.line_chart("Loss", "step", {"a": [(1e8, 2.0)]})["lines"]
    assert line["path"] == "0.0,0.0"


def test_rows_with_withheld_reasons_are_only_counted():
    rows = [
        {"reason": "personal_data", "detail": "a@b.org", "row": '{"text": "write to a@b.org"}'},
        {"reason": "duplicate", "detail": "of p1", "row": '{"text": "a red two"}'},
        {"reason": "duplicate", "detail": "of p1", "row": "not JSON"},
        {"reason": "duplicate", "detail": "of p1", "row": '{"text": "a third"}'},
    ]
    duplicate, personal = report.rejected_examples({"curate-prompts": rows})
    assert (personal["count"], personal["examples"]) == (1, [])
    assert duplicate["count"] == 3
    assert [example["text"] for example in duplicate["examples"]] == ["a red two", "not JSON"]
    assert "a@b.org" not in render(rejected=[duplicate, personal])


def test_the_funnel_is_drawn_to_one_scale():
    manifest = {"step": "s", "rows_in": 200, "rows_out": 150, "quarantined": 50, "reasons": {"x": 20, "y": 30}}
    later = {"step": "t", "rows_in": 150, "rows_out": 150, "quarantined": 0, "reasons": {}}
    first, second = report.funnel_steps([manifest, later])
    assert (first["kept_width"], first["lost_width"]) == (75.0, 25.0)
    assert second["kept_width"] == 75.0
    assert first["reasons"] == [("y", 30), ("x", 20)]
    assert "150</b> out" in render(funnel=[first, second])
