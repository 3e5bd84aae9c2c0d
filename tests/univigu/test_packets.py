"""Frames that no one needs are left out before they are decoded, and the others have the same pixels."""

import numpy as np
import pytest

from univigu.decoding import open_video, read_packets
from univigu.errors import VideoError
from univigu.packets import skip_unused
from univigu.video import probe_video, sample_windows

WINDOWS = [[0.05, 0.3, 0.55], [0.8, 1.05, 1.3], [1.9, 9.0]]
STRICT = {"x264-params": "b-pyramid=strict:bframes=5:b-adapt=0"}
TEMPORAL = {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3"}}


def moving(videos, count=50):
    """Numbered frames with a texture that moves, so that frames refer to each other."""
    texture = np.random.default_rng(0).integers(0, 60, (48, 64 + count, 3), np.uint8)
    return [frame // 2 + texture[:, n : n + 64] for n, frame in enumerate(videos.numbered(count))]


def count_kept(path, stamps):
    with open_video(path) as video:
        times = [time for window in WINDOWS for time in window]
        return sum(bool(packet.size) for packet, _ in skip_unused(video, read_packets(video), stamps, times))


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("pyramid.mp4", {"options": {"x264-params": "bframes=3:b-adapt=0"}}, 33),
        ("strict.mkv", {"options": STRICT}, 30),
        ("open-gop.mov", {"open": True}, 33),
        ("slices.mp4", {"options": {"x264-params": "slices=3:bframes=3:b-adapt=0"}}, 33),
        ("baseline.mp4", {"options": {"bf": "0"}}, 50),
        ("444.mp4", {"options": STRICT, "pixels": "yuv444p"}, 30),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_frames_that_no_window_shows_are_not_decoded_and_others_keep_their_pixels(tmp_path, videos, name, kind, most):
    options = {"options": videos.OPEN_GOP} if kind.pop("open", False) else {}
    path = videos.encode(tmp_path / name, moving(videos), **kind, **options)
    stamps = probe_video(path).stamps
    whole, part = (list(sample_windows(path, WINDOWS, 24, 32, given)) for given in (None, stamps))
    assert len(whole) == len(part) == len(WINDOWS)
    for expected, found in zip(whole, part, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert count_kept(path, stamps) <= most


def decoding_times(packets):
    for packet in packets:
        packet.pts = packet.dts
        yield packet


def test_all_frames_are_decoded_where_their_times_or_references_are_not_known_for_sure(tmp_path, videos):
    whole = videos.encode(tmp_path / "whole.mp4", moving(videos), options=videos.OPEN_GOP)
    paths = [
        videos.copy_packets(whole, tmp_path / "wrong.mp4", (), decoding_times),
        videos.copy_packets(whole, tmp_path / "cut.mkv", (), videos.cut_at(1)),
        videos.encode(tmp_path / "a.ts", moving(videos), options=STRICT),
        videos.encode(tmp_path / "fields.mp4", moving(videos), options={"x264-params": "tff=1:bframes=2"}),
        videos.encode(tmp_path / "hevc.mp4", moving(videos), **TEMPORAL),
    ]
    assert [len(probe_video(path).stamps) for path in paths] == [0] * 5


def test_a_file_that_ends_early_is_refused_without_decoding_all_of_it(tmp_path, videos):
    path = videos.encode(tmp_path / "a.mp4", moving(videos), options=STRICT, muxer={"movflags": "faststart"})
    stamps, content = probe_video(path).stamps, path.read_bytes()
    with pytest.raises(VideoError):
        list(sample_windows(content[: len(content) * 3 // 4], WINDOWS, 24, 32, stamps))
