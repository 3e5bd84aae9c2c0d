"""Videos are cut where one scene follows another, and nowhere else."""

from pathlib import Path

import av
import numpy as np
import pytest

from components.clips.import_clips import find_layout
from components.clips.import_files import find_videos
from components.clips.scenes import find_cuts
from components.settings.profile import read_sections
from univigu.errors import VideoError

RATE = 16


def picture(seed: int, shift: int) -> np.ndarray:
    """A smooth picture of one scene, (64, 96, 3), moved by `shift` pixels."""
    y, x = np.mgrid[:64, :96]
    rng = np.random.default_rng(seed)
    tint, waves = rng.integers(40, 216, 3), 30 * np.sin((x - shift) / 9 + seed) + 20 * np.cos(y / 7)
    return (tint + waves[..., None]).clip(0, 255).astype(np.uint8)


def write_scenes(path: Path, lengths, speed=2) -> Path:
    """A video of one scene after another, each of so many frames and with a moving camera."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for seed, length in enumerate(lengths):
            for number in range(length):
                frame = av.VideoFrame.from_ndarray(picture(seed, speed * number), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
def test_cuts_are_found_at_the_first_frames_of_scenes(tmp_path):
    path = write_scenes(tmp_path / "a.mp4", [30, 7, 40])
    np.testing.assert_allclose(find_cuts(path, 3.0), [30 / RATE, 37 / RATE], atol=1e-6)


@pytest.mark.parametrize("speed", [0, 1, 6])
def test_a_moving_camera_is_no_cut(tmp_path, speed):
    assert find_cuts(write_scenes(tmp_path / "a.mp4", [60], speed), 3.0) == []


def test_no_clip_contains_a_cut(tmp_path, profile):
    profile["video"].update(frames=17, height=64, width=64, fps=8)
    profile["import_videos"]["scenes"] = "cut"
    sections = read_sections(profile)
    write_scenes(tmp_path / "a.mp4", [45, 20, 80])
    layout = find_layout(find_videos(tmp_path), sections.video, sections.import_videos, {"file": "a.mp4"})
    cuts = [45 / RATE, 65 / RATE]
    starts = [0, cuts[1], cuts[1] + 17 / 8]
    assert [(window.start, window.end) for window in layout.windows] == [(start, start + 17 / 8) for start in starts]
    assert not any(window.times[0] < cut <= window.times[-1] for window in layout.windows for cut in cuts)
    assert layout.unused == pytest.approx((73 - 3 * 17) / 8)


def test_a_video_of_scenes_that_are_all_too_short_is_refused_and_says_so(tmp_path, profile):
    profile["video"].update(frames=41, height=64, width=64, fps=8)
    profile["import_videos"]["scenes"] = "cut"
    sections = read_sections(profile)
    write_scenes(tmp_path / "a.mp4", [40, 50])
    misfit = find_layout(find_videos(tmp_path), sections.video, sections.import_videos, {"file": "a.mp4"}).misfit
    assert misfit.reason == "too_short"
    assert misfit.detail.startswith("of its 2 scenes, even the longest: its 25 frames are too few for the 41")


def test_a_damaged_video_has_no_scenes(tmp_path):
    path = write_scenes(tmp_path / "a.mp4", [30])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(VideoError):
        find_cuts(path, 3.0)
