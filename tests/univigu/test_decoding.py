"""The frames of a file that players show, in their order and at their times; only these can be missing."""

import gc
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from univigu import decoding
from univigu.decoding import open_video, read_frames
from univigu.errors import MissingInputError, VideoError
from univigu.video import encode_mp4, probe_video, read_video, sample_video

MPEG4, VP8 = {"codec": "mpeg4"}, {"codec": "libvpx", "options": {"deadline": "realtime", "g": "15"}}


def shown(path, videos):
    """The numbers of the frames that are shown, and when, in seconds from the first."""
    with open_video(path) as video:
        found = [(at, frame.to_ndarray(format="rgb24")) for at, frame in read_frames(video)]
    return videos.numbers([frame for _, frame in found]), np.array([at for at, _ in found]) - found[0][0]


def assert_shows(path, videos, numbers, fps=25):
    found, times = shown(path, videos)
    assert found == list(numbers)
    np.testing.assert_allclose(times, np.arange(len(found)) / fps, atol=1e-3)
    facts = probe_video(path)
    assert (facts.frames(fps), round(facts.last * fps)) == (len(found), len(found) - 1)
    halfway = [(number + 0.5) / fps for number in range(len(found))]
    assert videos.numbers(sample_video(path, halfway, 48, 64)) == list(numbers)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", {"options": {"bf": "3"}}),
        ("open-gop.mp4", {"open": True}),
        ("b-frames.avi", {"options": {"bf": "3", "x264-params": "b-adapt=0"}}),
        ("b-frames.flv", {"options": {"bf": "3", "x264-params": "b-adapt=0"}}),
        ("mpeg4.avi", {**MPEG4, "options": {"bf": "2"}}),
        ("open-gop.ts", {"open": True}),
        ("open-gop.mkv", {"open": True}),
        ("a.mpg", {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}}),
        ("interlaced.ts", {"options": {"x264-params": "tff=1:bframes=2"}}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=3:open-gop=1:keyint=20"}}),
        ("a.webm", VP8),
        ("a.gif", {"codec": "gif", "pixels": "rgb8"}),
        ("a.wmv", {"codec": "wmv2"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_frames_have_the_order_and_times_of_players(tmp_path, videos, name, codec):
    options = {"options": videos.OPEN_GOP} if codec.pop("open", False) else {}
    path = videos.encode(tmp_path / name, videos.numbered(50), **codec, **options)
    assert_shows(path, videos, range(50))


def test_a_packed_bitstream_is_shown_frame_by_frame(tmp_path, videos):
    """DivX in AVI: a packet may hold a frame and the one before it, and an empty one follows (ISO/IEC 14496-2)."""
    start, empty = b"\0\0\1\xb6", b"\0\0\1\xb6\x50\x00\x7f"

    def pack(packets):
        contents = [bytes(packet) for packet in packets]
        refers_ahead = [content[content.index(start) + 4] >> 6 == 2 for content in contents] + [False]
        packed = [contents[0].replace(start, b"\0\0\1\xb2DivX503b1393p" + start)]  # it declares that it is packed
        for number in range(1, len(contents)):
            if refers_ahead[number]:
                packed.append(empty)
            else:
                packed.append(contents[number] + (contents[number + 1] if refers_ahead[number + 1] else b""))
        for number, content in enumerate(packed):
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.time_base, packet.is_keyframe = Fraction(1, 25), number == 0
            yield packet

    plain = videos.encode(tmp_path / "plain.avi", videos.numbered(40), "mpeg4", options={"bf": "1", "g": "300"})
    assert_shows(videos.copy_packets(plain, tmp_path / "packed.avi", (), pack), videos, range(40))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_video_cut_without_reencoding_starts_at_its_first_shown_frame(tmp_path, videos, name):
    whole = videos.encode(tmp_path / "whole.mp4", videos.numbered(58), options=videos.OPEN_GOP)
    cut = videos.copy_packets(
        whole, tmp_path / name, {"use_editlist": "1"} if name == "cut.mp4" else {}, videos.cut_at(1)
    )
    assert_shows(cut, videos, range(25 if name == "cut.mp4" else 20, 58))  # Matroska has no edit lists


def test_a_video_with_a_late_start_is_shown_from_its_first_frame(tmp_path, videos):
    def later(packets):
        for packet in packets:
            packet.pts, packet.dts = packet.pts + 40_000, packet.dts + 40_000
        return packets

    whole = videos.encode(tmp_path / "whole.mp4", videos.numbered(30), options=videos.OPEN_GOP)
    for name in ("late.mp4", "late.mkv", "late.ts"):
        assert_shows(videos.copy_packets(whole, tmp_path / name, (), later), videos, range(30))


def test_a_broadcast_is_shown_from_its_first_key_frame_on(tmp_path, videos):
    kinds = {
        "h264.ts": {"options": videos.OPEN_GOP},
        "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}},
    }
    for name, kind in kinds.items():
        content = videos.encode(tmp_path / name, videos.numbered(58), **kind).read_bytes()
        for start in (len(content) // 188 // 3 * 188, len(content) // 3):
            (tmp_path / name).write_bytes(content[start:])
            numbers, times = shown(tmp_path / name, videos)
            assert 12 <= numbers[0] < 50, name
            assert numbers == list(range(numbers[0], 58)), name
            np.testing.assert_allclose(times, np.arange(len(numbers)) / 25, atol=1e-3)


def test_joined_recordings_are_shown_one_after_the_other(tmp_path, videos):
    one = videos.encode(tmp_path / "one.ts", videos.numbered(25), options=videos.OPEN_GOP).read_bytes()
    two = videos.encode(
        tmp_path / "two.ts", videos.numbered(25, 96, 128, first=25), options=videos.OPEN_GOP
    ).read_bytes()
    (tmp_path / "both.ts").write_bytes(one + two)
    numbers, times = shown(tmp_path / "both.ts", videos)
    assert numbers == list(range(50))
    np.testing.assert_allclose(times, np.arange(50) / 25, atol=1e-3)
    frames, fps = read_video(tmp_path / "both.ts")  # all with the size of the first one
    assert (frames.shape, videos.numbers(frames), fps) == ((50, 48, 64, 3), list(range(50)), 25)


def test_frames_at_uneven_times_keep_them(tmp_path, videos):
    ticks = [0, 40, 80, 500, 520, 1000, 2500]
    for name in ("uneven.mp4", "uneven.mkv", "uneven.webm"):
        codec, pixels = ("libvpx", "yuv420p") if name.endswith("webm") else ("libx264", "yuv420p")
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for tick, array in zip(ticks, videos.numbered(len(ticks)), strict=True):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        numbers, times = shown(tmp_path / name, videos)
        assert numbers == list(range(len(ticks)))
        np.testing.assert_allclose(times, np.array(ticks) / 1000, atol=1e-3)
        assert videos.numbers(sample_video(tmp_path / name, [0.01, 0.3, 0.51, 0.9, 2.0, 9.0], 48, 64)) == [
            0,
            2,
            3,
            4,
            5,
            6,
        ]


def test_reference_only_packets_are_not_lost_frames(tmp_path, videos):
    """VP8's alternate references: frames that are decoded and never shown."""

    def hide(packets):
        hidden = av.Packet(bytes([bytes(packets[3])[0] & ~0x10]) + bytes(packets[3])[1:])
        hidden.pts = hidden.dts = packets[3].pts
        hidden.time_base = packets[3].time_base
        return [*packets[:3], hidden, *packets[3:]]

    whole = videos.encode(tmp_path / "whole.webm", videos.numbered(20), **VP8)
    path = videos.copy_packets(whole, tmp_path / "hidden.webm", (), hide)
    assert len(read_video(path)[0]) == 20


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("place", ["first", "second"])
def test_the_moving_stream_is_shown_not_a_thumbnail(tmp_path, videos, place, pictures):
    large = [np.full((200, 300, 3), 250, np.uint8)] * pictures
    kinds = {"thumbnail": (large, {"codec": "mjpeg", "pixels": "yuvj420p"}), "video": (videos.numbered(20), {})}
    order = ("thumbnail", "video") if place == "first" else ("video", "thumbnail")
    paths = [videos.encode(tmp_path / f"{name}.mp4", kinds[name][0], **kinds[name][1]) for name in order]
    for name in ("both.mp4", "both.mkv", "both.mov"):
        with av.open(str(tmp_path / name), "w") as container:
            sources = [av.open(str(path)) for path in paths]
            copies = [container.add_stream_from_template(source.streams.video[0]) for source in sources]
            for source, copy in zip(sources, copies, strict=True):
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = copy
                        container.mux(packet)
        assert_shows(tmp_path / name, videos, range(20))


def test_of_several_videos_the_default_one_is_shown(tmp_path, videos):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, side in zip(streams, (128, 64), strict=True):
            stream.height, stream.width, stream.pix_fmt = 48, side, "yuv420p"
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default
        for array in videos.numbered(10):
            for stream in streams:
                wide = np.broadcast_to(array[:, :1], (48, stream.width, 3))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(wide), format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    assert read_video(tmp_path / "two.mkv")[0].shape == (10, 48, 64, 3)


def test_cover_art_is_not_a_video(tmp_path, videos):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_ndarray(videos.numbered(1)[0], format="rgb24")))
    with pytest.raises(VideoError, match="no video in") as error:
        read_video(tmp_path / "song.mp4")
    assert error.value.reason == "no_video"


@pytest.mark.parametrize(
    ("old", "new", "reason"), [(b"FMP4", b"QQQQ", "codec"), (b"Xxxxxxx", "Отпуск!".encode("cp1251"), "")]
)
def test_a_codec_without_a_decoder_is_reported_and_a_title_in_another_encoding_accepted(
    tmp_path, videos, old, new, reason
):
    path = videos.encode(tmp_path / "old.avi", videos.numbered(10), **MPEG4, metadata={"title": "Xxxxxxx"})
    path.write_bytes(path.read_bytes().replace(old, new))
    if reason:
        with pytest.raises(VideoError, match=r"no decoder for the video in .*; convert it") as error:
            read_video(path)
        assert error.value.reason == reason
    else:
        assert len(read_video(path)[0]) == 10


@pytest.mark.parametrize("name", ["file:a.mp4", "concat:a|b.mp4", "%03d.mp4", "http:__x.mp4", "-i.mp4", "a\nb.mp4"])
def test_a_file_name_is_never_a_protocol(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(encode_mp4(np.zeros((2, 16, 16, 3), np.uint8), 8))
    assert read_video(Path(name))[0].shape == (2, 16, 16, 3)


@pytest.mark.parametrize("name", ["many.mp4", "many.mkv", "many.avi"])
def test_a_file_of_too_many_frames_is_refused(tmp_path, videos, monkeypatch, name):
    path = videos.encode(tmp_path / name, videos.numbered(30), **MPEG4)
    monkeypatch.setattr(decoding, "MAX_FRAMES_READ", 29)
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"has more frames, .*; cut it into shorter ones") as error:
            read(path)
        assert error.value.reason == "too_large"
    monkeypatch.setattr(decoding, "MAX_FRAMES_READ", 30)
    assert len(read_video(path)[0]) == 30


@pytest.mark.parametrize("aspect", [Fraction(1, 40_000), Fraction(40_000, 1)])
def test_pixels_of_an_impossible_shape_are_square(tmp_path, videos, aspect):
    path = videos.encode(tmp_path / "odd.mp4", videos.numbered(3), aspect=aspect)
    assert read_video(path)[0].shape == (3, 48, 64, 3)


def test_every_error_of_a_file_names_that_file(tmp_path, videos):
    """With random changes to its bytes, a file is read as a video or refused in one sentence."""
    rng = np.random.default_rng(0)
    kinds = {"a.mp4": {"options": {"bf": "2"}}, "a.avi": MPEG4, "a.mkv": {}, "a.webm": VP8, "a.ts": {}}
    files = [videos.encode(tmp_path / name, videos.numbered(12), **kind).read_bytes() for name, kind in kinds.items()]
    reasons = set()
    for content in files * 20:
        damaged = np.frombuffer(content, np.uint8).copy()
        places = rng.integers(0, len(damaged), rng.integers(1, 9))
        damaged[places] = rng.integers(0, 256, len(places))
        try:
            read_video(damaged.tobytes(), 4)
        except VideoError as error:
            reasons.add(error.reason if "\n" not in str(error) else "several lines")
    assert "damaged" in reasons <= {"damaged", "no_video", "codec", "too_large"}


def test_a_directory_or_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for name in ("pipe.mp4", "folder.mp4", "n" * 300 + ".mp4"):
        with pytest.raises(MissingInputError, match="no video file"):
            read_video(tmp_path / name)


def test_no_frame_outlives_its_video_until_python_collects_garbage():
    clip = encode_mp4(np.zeros((9, 32, 48, 3), np.uint8), 8)
    gc.collect()
    gc.disable()
    try:
        probe_video(clip)
        read_video(clip)
        assert not [one for one in gc.get_objects() if isinstance(one, av.VideoFrame)]
    finally:
        gc.enable()
