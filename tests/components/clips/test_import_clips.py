"""A video becomes clips that show it at its own speed, or none."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from components.clips.archive import open_clip, read_tar
from components.clips.gate import load_gate
from components.clips.import_clips import FEW, find_layout, in_processes, make_clips
from components.clips.import_files import find_videos
from components.settings.profile import read_sections
from small_videos import make_clips_or_crash, write_video
from univigu.files import file_sha256
from univigu.video import encode_mp4


@pytest.fixture
def settings(profile):
    """The sections of a profile with clips of a second: nine frames."""
    profile["video"]["fps"] = 9

    def read(**changes):
        profile["import_videos"].update(changes)
        return read_sections(profile)

    return read


def row(name):
    return {"id": "f00d", "file": name, "prompt_id": "p", "prompt": "x", "stage": 1, "seed": 1, "source_sha256": "s"}


def make(folder, name, sections):
    made = make_clips(find_videos(folder), sections.video, sections.import_videos, [], folder / "out.tar", row(name))
    assert (folder / "out.tar").is_file() == bool(made.clips)
    return made


def spans(made):
    scores = [json.loads(clip["scores"]) for clip in made.clips]
    return [(score["start"], score["end"], score["speed"]) for score in scores]


@pytest.mark.parametrize(
    ("take", "starts", "unused"), [("windows", [0, 1, 2], 5), ("head", [0], 23), ("uniform", [0, 23 / 9], 14)]
)
def test_clips_show_a_long_video_at_its_own_speed(tmp_path, settings, take, starts, unused):
    write_video(tmp_path / "a.mp4", np.arange(53) / 15, dark=0)  # 15 frames a second: 32 frames at 9 a second
    made = make(tmp_path, "a.mp4", settings(take=take, most=2))
    assert spans(made) == [(round(start, 3), round(start + 1, 3), 1.0) for start in starts]
    assert [clip["unused"] for clip in made.clips] == [[round(unused / 9, 3), round(32 / 9, 3)]] * len(starts)
    for clip, (name, content), start in zip(made.clips, read_tar(tmp_path / "out.tar"), starts, strict=True):
        assert name == clip["member"] == f"f00d-{round(start * 1000):08d}.mp4"
        shown = np.arange(53) / 15  # the frame that is shown in the middle of each interval
        shown = shown[np.searchsorted(shown, start + (np.arange(9) + 0.5) / 9, side="right") - 1]
        found = open_clip(clip, content)[0].mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found, (80 * shown).round() % 256, atol=6)


def test_overlapping_clips_share_frames(tmp_path, settings):
    write_video(tmp_path / "a.mp4", np.arange(28) / 9, dark=0)
    made = make(tmp_path, "a.mp4", settings(overlap=2 / 3))
    contents = [content for _, content in read_tar(tmp_path / "out.tar")]
    clips = [open_clip(clip, content)[0] for clip, content in zip(made.clips, contents, strict=True)]
    assert [start for start, _, _ in spans(made)] == [round(3 * number / 9, 3) for number in range(7)]
    for first, second in pairwise(clips):
        assert np.abs(first[3:].astype(int) - second[:6]).max() <= 4


def test_a_whole_video_keeps_its_id_and_a_part_has_one_of_its_own(tmp_path, settings):
    write_video(tmp_path / "a.mp4", np.arange(9) / 9)
    (clip,) = make(tmp_path, "a.mp4", settings()).clips
    assert (clip["id"], clip["seed"], clip["generator_digest"]) == ("f00d", 1, "s")


@pytest.mark.parametrize("take", ["windows", "squeeze"])
def test_a_file_that_shows_few_frames_for_hours_is_refused_before_it_is_cut(tmp_path, settings, take):
    write_video(tmp_path / "a.mkv", [0, 0.1, 1e6], dark=0)
    assert [refused.reason for refused in make(tmp_path, "a.mkv", settings(take=take)).refused] == ["too_long"]


def test_a_video_with_a_damaged_end_gives_no_clip_of_its_start(tmp_path, settings):
    content = encode_mp4(np.random.default_rng(0).integers(0, 256, (27, 32, 32, 3)).astype(np.uint8), 9)
    start = content.index(b"mdat")
    at = start + (content.index(b"moov", start) - start) * 3 // 4
    hole = bytes(3000)  # longer than a frame: FFmpeg doesn't notice every shorter one
    (tmp_path / "a.mp4").write_bytes(content[:at] + hole + content[at + len(hole) :])
    assert (
        len(find_layout(find_videos(tmp_path), settings().video, settings().import_videos, row("a.mp4")).windows) == 3
    )
    made = make(tmp_path, "a.mp4", settings())
    assert (made.clips, [refused[:2] for refused in made.refused]) == ([], [("a.mp4", "damaged")])
    assert str(tmp_path) not in made.refused[0].detail


def test_a_clip_of_ours_keeps_its_bytes_and_another_encoding_of_its_frames_does_not(tmp_path, settings):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    (tmp_path / "ours.mp4").write_bytes(encode_mp4(frames, 9))
    (tmp_path / "slower.mp4").write_bytes(encode_mp4(frames, 8))
    (tmp_path / "other.mp4").write_bytes(encode_mp4(frames, 9, "yuv420p"))
    for name, kept in {"ours.mp4": True, "slower.mp4": False, "other.mp4": False}.items():
        made = make(tmp_path, name, settings(take="squeeze"))
        assert [clip["sha256"] == file_sha256(tmp_path / name) for clip in made.clips] == [kept]


def test_many_videos_are_read_by_processes_with_equal_results_and_a_crash_costs_one(tmp_path, settings):
    for number in range(FEW):
        write_video(tmp_path / f"{number:02d}.mp4", np.arange(9) / 9, dark=number)
    write_video(tmp_path / "crash.mp4", np.arange(9) / 9)
    videos, sections, gate = find_videos(tmp_path), settings(), load_gate({"blank": {"mode": "score"}}, Path())
    rows = [{**row(name), "id": name.removesuffix(".mp4")} for name in videos.names]
    own, apart = ([tmp_path / f"{where}-{one['id']}.tar" for one in rows] for where in ("own", "apart"))
    make = partial(make_clips_or_crash, videos, sections.video, sections.import_videos, gate)
    with ThreadPoolExecutor(2) as pool, in_processes(make, videos, rows, gate) as call:
        found = list(pool.map(call, apart, rows))
    assert found[:FEW] == [make(place, one) for place, one in zip(own[:FEW], rows[:FEW], strict=True)]
    assert [place.read_bytes() for place in apart[:FEW]] == [place.read_bytes() for place in own[:FEW]]
    (refused,) = found[FEW].refused
    assert (found[FEW].clips, refused[:2], apart[FEW].exists()) == ([], ("crash.mp4", "crashed"), False)
    assert "was ended by SIGSEGV" in refused.detail
