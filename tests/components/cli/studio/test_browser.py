"""The studio in Debian's Chromium, as a person uses it: no error, no request to elsewhere, no serious fault for axe.

With UNIVIGU_SCREENSHOTS, a folder, each page is also left there as a picture (`make screenshots`).
"""

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from browser import needs_browser, open_browser, open_tab
from components.cli.studio import gallery
from components.pipeline.edits import read_edits
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.prompts.tokens import load_tokenizer
from components.registry import promotion, votes
from components.tracking import tracking_uri
from good_rows import make_rows
from univigu import registry
from univigu.video import encode_mp4

pytestmark = [pytest.mark.slow, needs_browser]
PROFILE = "profile.yaml"  # of the work root
PAGES = {"": "newest first", "runs": "step 6 of 6", "data": "Clips 1 to", "create": "The next result is made with"}


@pytest.fixture(scope="module")
def server(editable_root, StudioServer):  # noqa: N803 (a class)
    server = StudioServer(editable_root, "--name", "pairs", "--profile", str(editable_root / PROFILE))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser, server):
    """Opens a page in a tab; at the end, nothing may have gone wrong in it."""
    opened = []

    def open_page(page):
        tab, wrong = open_tab(browser, server.url)
        tab.goto(f"{server.url}/{page}")
        tab.get_by_text(PAGES[page]).first.wait_for()
        opened.append((tab, wrong))
        return tab

    yield open_page
    for tab, _ in opened:
        tab.close()
    assert [fault for _, wrong in opened for fault in wrong] == []


def serious_faults(tab):
    """What axe finds that is serious or critical, with the elements; while a page fades in, its contrast is low."""
    from axe_playwright_python.sync_playwright import Axe

    for _ in range(10):
        found = [fault for fault in Axe().run(tab).response["violations"] if fault["impact"] in ("serious", "critical")]
        if not found:
            break
        tab.wait_for_timeout(500)
    return [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found]


def take_picture(tab, name):
    """Leave a picture of a page, if pictures are asked for."""
    folder = os.environ.get("UNIVIGU_SCREENSHOTS")
    if not folder:
        return
    path = Path(folder) / f"studio-{name}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    tab.wait_for_timeout(800)  # until videos are painted
    tab.screenshot(path=path.with_suffix(".png"))
    Image.open(path.with_suffix(".png")).save(path, quality=70, method=6)
    path.with_suffix(".png").unlink()
    assert path.stat().st_size <= 150_000


@pytest.mark.parametrize("page", PAGES)
def test_each_page_is_readable_light_and_dark_on_a_desk_and_on_a_phone(open_page, page):
    tab = open_page(page)
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1440
    assert serious_faults(tab) == []
    if page == "runs":
        take_picture(tab, page)
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_timeout(300)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious_faults(tab) == []
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.tagName") != "BODY"


def test_a_video_is_made_with_the_keyboard_and_looked_at_on_the_way(open_page):
    tab = open_page("create")
    tab.get_by_label("Prompt", exact=True).first.fill("a blue two <i>moves</i> up")
    tab.get_by_role("button", name="Generate").focus()
    tab.keyboard.press("Enter")
    tab.locator(".uv-clips[role=status] video").wait_for()
    assert tab.locator(".uv-clips[role=status] i").count() == 0
    seen = tab.locator("#seen")
    seen.get_by_text("τ = 1.00").wait_for()
    last = seen.locator("img").get_attribute("src")
    tab.locator("#moment input[type=range]").focus()
    for _ in range(11):
        tab.keyboard.press("ArrowLeft")
    seen.get_by_text(re.compile(r"τ = 0\.0\d")).wait_for()
    assert seen.locator("img").get_attribute("src") != last
    for _ in range(8):
        tab.keyboard.press("ArrowRight")
    seen.get_by_text(re.compile(r"τ = 0\.[3-9]\d")).wait_for()
    take_picture(tab, "create")


def test_what_is_stopped_stays_as_far_as_it_came(open_page):
    tab = open_page("create")
    tab.get_by_label("Prompt", exact=True).first.fill("a red seven moves left")
    tab.get_by_label("Steps").first.fill("1000")
    tab.get_by_role("button", name="Generate").click()
    tab.locator("#seen img").wait_for()  # seen before it is finished
    tab.locator("#stop").click()
    tab.get_by_text(re.compile(r"Stopped after step \d+: this is what was predicted there")).wait_for()
    assert tab.locator(".uv-clips[role=status] video").count() == 1


def test_a_tab_that_goes_away_stops_its_result_and_leaves_the_model_to_others(open_page, editable_root):
    gone, other = open_page("create"), open_page("create")
    gone.get_by_label("Prompt", exact=True).first.fill("a red seven moves left")
    gone.get_by_label("Steps").first.fill("1000")
    gone.get_by_role("button", name="Generate").click()
    gone.locator("#seen img").wait_for()
    gone.close()
    other.get_by_label("Prompt", exact=True).first.fill("a red one moves left")
    other.get_by_label("Steps").first.fill("1")
    other.get_by_role("button", name="Generate").click()
    other.locator(".uv-clips[role=status] video").wait_for()
    (newest, before, *_), _, _ = gallery.list_results(editable_root, 1)
    assert newest.recipe["prompt"] == "a red one moves left"
    assert int(before.recipe["stopped"].removeprefix("after step ")) < 1000


def test_a_dropped_file_gets_a_caption(open_page, tmp_path, moving_square):
    path = tmp_path / "<b>clip.mp4"
    path.write_bytes(encode_mp4(moving_square(200), 8))
    tab = open_page("create")
    tab.get_by_role("tab", name="Caption").click()
    tab.locator("#file input[type=file]").set_input_files(path)
    tab.get_by_text("clip").first.wait_for()
    tab.get_by_label("Steps").locator("visible=true").fill("3")
    tab.get_by_role("button", name="Caption", exact=True).click()
    tab.locator(".uv-tokens span").first.wait_for()
    word = tab.locator(".uv-words button").first
    assert word.inner_text()
    word.click()
    looked = tab.locator("#looked")
    looked.get_by_text(re.compile(r"gave \d+ % of its attention to the video")).wait_for()
    shares = [int(re.match(r"\d+", text)[0]) for text in looked.locator("figcaption").all_inner_texts()]
    assert (len(shares), 99 <= sum(shares) <= 101) == (3, True)
    assert serious_faults(tab) == []
    looked.scroll_into_view_if_needed()
    take_picture(tab, "words")


def test_clips_are_edited_with_keys_and_the_next_run_obeys(open_page, editable_root):
    tab = open_page("data")
    caption = make_rows(load_tokenizer(editable_root / "model/tiny-wan"))["captions"][3]["text"]

    def said(text):
        tab.locator("#edit-said").get_by_text(text).wait_for()

    tab.keyboard.press("j")
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    tab.keyboard.press("k")
    assert tab.evaluate("document.activeElement.dataset.clip") == "c001"
    tab.keyboard.press(" ")
    tab.wait_for_function("!document.activeElement.querySelector('video').paused")
    tab.keyboard.press("x")
    said("Exclude clip c001: kept 39 -> 38, quarantined 2 -> 3, excluded 0 -> 1. Press Apply.")
    take_picture(tab, "data")
    tab.wait_for_function("document.activeElement.id === 'edit-apply'")
    tab.keyboard.press("Enter")
    said("Line 1 is written")
    tab.locator("figure[data-clip=c001]").get_by_text("excluded by the next run").wait_for()

    tab.locator("figure[data-clip=c003]").focus()
    tab.keyboard.press("e")
    said("Clip c003 is open")
    tab.wait_for_function("document.activeElement.closest('#edit-caption')")
    tab.keyboard.type("a red six")
    tab.locator("#edit-check").click()
    said("would reject this caption as 'caption_range' (caption_tokens 4)")
    tab.locator("#edit-caption textarea").fill(caption)
    tab.locator("#edit-apply").click()  # not examined yet, so it is examined first
    said("Change the caption of clip c003: kept 38 -> 39, quarantined 3 -> 2, empty 1 -> 0. Press Apply.")
    tab.locator("#edit-apply").click()
    said("Line 2 is written")
    assert [edit.action for edit in read_edits(editable_root)] == ["exclude", "caption"]

    profile = load_profile(str(editable_root / PROFILE))
    assert run_stage("validate-pairs", profile, editable_root)["reasons"] == {"excluded": 1}
    pairs = {row["clip_id"]: row["caption"] for row in read_table(editable_root / "data/pairs", "pairs").to_pylist()}
    assert ("c001" in pairs, pairs["c003"]) == (False, caption)
    tab.reload()
    tab.locator("figure[data-clip=c001]").get_by_text("excluded", exact=True).wait_for()
    tab.locator("figure[data-clip=c001]").focus()
    tab.keyboard.press("u")
    said("Undo the last edit of clip c001: kept 39 -> 40, quarantined 2 -> 1, excluded 1 -> 0. Press Apply.")


def test_a_clip_is_beside_its_duplicate(open_page):
    tab = open_page("data")
    tab.locator("#verdict input").click()
    tab.get_by_role("option", name=re.compile("same_video")).click()
    twins = tab.locator("figure[data-clip=c900] .uv-twins video")
    twins.nth(1).wait_for()
    assert [twin.get_attribute("aria-label") for twin in twins.all()] == ["Clip c900", "Clip c000"]


def show_at_most(tab, score, most):
    """Show the clips with at most so much of a score."""
    tab.locator("#score input").click()
    tab.get_by_role("option", name=score).click()
    tab.locator("#score-most input, #score-most textarea").fill(most)
    tab.keyboard.press("Enter")


def test_near_duplicates_play_side_by_side_and_a_person_chooses_which_to_keep(open_page, editable_root):
    tab = open_page("data")
    show_at_most(tab, "picture_distance", "0.1")
    tab.get_by_text("Clips 1 to 1 of 1").wait_for()
    copy = tab.locator("figure[data-clip=c005]")
    copy.get_by_text("Nearly the same video as c004, at its side.").wait_for()
    copy.focus()
    tab.keyboard.press(" ")
    tab.wait_for_function("[...document.querySelectorAll('[data-clip=c005] video')].every(video => !video.paused)")
    assert copy.locator("video").count() == 2
    tab.keyboard.press(" ")
    copy.evaluate("clip => clip.scrollIntoView({block: 'center'})")
    take_picture(tab, "duplicates")
    before = len(read_edits(editable_root))
    for action, clip in (("x", "c005"), ("u", "c005"), ("Exclude c004 instead", "c004")):
        if len(action) == 1:
            copy.focus()
            tab.keyboard.press(action)
        else:
            copy.get_by_role("button", name=action).click()
        tab.locator("#edit-said").get_by_text(f"clip {clip}: kept").wait_for()
        tab.locator("#edit-apply").click()
        tab.locator("#edit-said").get_by_text("is written").wait_for()
    lines = [(edit.action, edit.id) for edit in read_edits(editable_root)[before:]]
    assert lines == [("exclude", "c005"), ("undo", "c005"), ("exclude", "c004")]


def test_clips_are_filtered_by_a_score(open_page):
    tab = open_page("data")
    show_at_most(tab, "motion", "1.5")
    tab.get_by_text("Clips 1 to 3 of 3").wait_for()
    assert [clip.get_attribute("data-clip") for clip in tab.locator("figure").all()] == ["c000", "c001", "c900"]


def test_two_versions_are_compared_blind_and_the_vote_is_beside_the_scores(open_page, editable_root):
    tab = open_page("")
    tab.locator("#compare-prompts textarea").fill("a red seven moves left")
    tab.locator("#compare-make").click()
    pair = tab.locator("#pair")
    pair.locator("video").nth(1).wait_for()
    assert not re.search(r"version|champion", pair.inner_html(), re.IGNORECASE)
    pair.locator("video").nth(0).evaluate("video => video.play()")
    tab.wait_for_function("[...document.querySelectorAll('.uv-sync video')].every(video => !video.paused)")
    tab.locator("#vote-neither").scroll_into_view_if_needed()
    take_picture(tab, "models")
    tab.locator("#vote-left").click()
    tab.get_by_text(re.compile(r"You chose version \d: version \d was on the left")).wait_for()
    (tally,) = votes.count("pairs", 1, editable_root)
    assert (tally.other, tally.better + tally.worse, tally.alike) == (2, 1, 0)
    tab.get_by_role("button", name="Read again").click()
    tab.get_by_text("Beside version").wait_for()


def test_a_promotion_and_a_rollback_are_in_the_ledger_as_those_of_the_command(open_page, editable_root):
    tab = open_page("")

    def decide(button, why, said):
        tab.locator("#why textarea, #why input").fill(why)
        tab.get_by_role("button", name=button).click()
        tab.get_by_text(re.compile(said)).wait_for()

    tab.locator("#model-version input").click()
    tab.get_by_role("option", name="2", exact=True).click()
    tab.get_by_role("heading", name="Version 2").wait_for()
    decide("Promote this version", "it sees more", "Version 2 is now champion, instead of version 1")
    decide("Roll back", "<b>too terse", "Version 1 is now champion, instead of version 2")
    tab.locator("bdi", has_text="<b>too terse").first.wait_for()
    lines = promotion.history("pairs", root=editable_root)[:2]
    expected = [("rolled back", 1, "<b>too terse"), ("promoted", 2, "it sees more")]
    assert [(line.outcome, line.version, line.why) for line in lines] == expected
    assert int(registry.version_at("pairs", registry.CHAMPION, tracking_uri(editable_root)).version) == 1
