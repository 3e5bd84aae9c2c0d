"""Video files: repeatable bytes, exact colours, and one sentence for files that are not complete videos."""

import io
import os
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from univigu.errors import BadInputError, MissingInputError
from univigu.tone_mapping import to_sdr
from univigu.video import decode_mp4, encode_mp4, fit_frames, probe_video, read_video, sample_video


def moving_picture(count, height, width):
    """A smooth picture whose brightness grows from frame to frame."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [np.stack([x * 150 // width, y * 150 // height, x * 0 + 200 * i // count], -1) for i in range(count)]
    ).astype(np.uint8)


@pytest.fixture(scope="module")
def clip():
    return encode_mp4(moving_picture(40, 48, 32), 8)


@pytest.mark.parametrize("shape", [(9, 32, 32), (1, 16, 16), (5, 31, 17), (4, 64, 32)])
def test_a_clip_round_trips(shape):
    frames = moving_picture(*shape)
    found, fps = decode_mp4(encode_mp4(frames, 8))
    assert (found.shape, found.dtype, fps) == (frames.shape, np.uint8, 8.0)
    assert np.abs(found.astype(int) - frames).mean() < 1.5


def test_equal_frames_give_equal_bytes(clip):
    assert encode_mp4(moving_picture(40, 48, 32), 8) == clip


def test_equal_frames_give_equal_bytes_whatever_memory_held_before():
    code = (
        "import sys, numpy as np; from univigu.video import encode_mp4; "
        "x = np.arange(9 * 32 * 32 * 3, dtype=np.uint32).reshape(9, 32, 32, 3); "
        "junk = [np.full(n * 37, 255, np.uint8) for n in range(1, 2000)]; del junk; "
        "sys.stdout.write(encode_mp4((x * 7919 >> 5).astype(np.uint8), 8).hex())"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MALLOC_PERTURB_": fill},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for fill in ("1", "85", "200")
    }
    assert len(made) == 1


@pytest.mark.parametrize("colour", [(225, 35, 35), (245, 80, 205), (8, 8, 8), (246, 246, 246)])
@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv420p"])
def test_colours_are_kept(colour, pixel_format):
    frames = np.tile(np.array(colour, np.uint8), (3, 32, 32, 1))
    assert np.abs(decode_mp4(encode_mp4(frames, 8, pixel_format))[0].astype(int) - frames).max() <= 4


def test_a_long_video_is_thinned_evenly_and_keeps_its_duration(clip):
    frames, fps = read_video(clip, max_frames=10)
    assert len(frames) == 10
    assert len(frames) / fps == pytest.approx(40 / 8)
    steps = np.diff(frames[:, 0, 0, 2].astype(int))
    assert steps.min() > 0
    assert steps.max() < 3 * steps.min()


def test_a_large_picture_is_scaled_down_and_a_portrait_stays_a_portrait():
    frames, _ = read_video(encode_mp4(moving_picture(2, 1920, 64), 8))
    assert frames.shape == (2, 1280, 43, 3)


def test_a_portrait_recording_is_upright():
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 255  # top left
    content = encode_mp4(frames, 8)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    turned, _ = read_video(content[:at] + clockwise + content[at + len(clockwise) :])
    assert turned.shape == (2, 64, 32, 3)
    corners = turned[0, [4, 4, -4, -4], [4, -4, 4, -4], 0] > 128
    assert corners.tolist() == [False, True, False, False]  # top right


PICTURE = np.zeros((48, 80, 3), np.uint8)
PICTURE[:24, :40], PICTURE[:24, 40:] = (200, 30, 30), (30, 200, 30)
PICTURE[24:, :40], PICTURE[24:, 40:] = (30, 30, 200), (180, 180, 20)
ORIENTATIONS = {  # a, b, c, d of a display matrix, and their effect on a picture
    "upright": ((1, 0, 0, 1), lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "turned by half": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: p.swapaxes(0, 1)[::-1, ::-1]),
    "anticlockwise": ((0, -1, 1, 0), np.rot90),
    "zeros": ((0, 0, 0, 0), lambda p: p),
    "slightly askew": ((0.98, 0.17, -0.17, 0.98), lambda p: p),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("aspect", [None, Fraction(2, 1), Fraction(1, 2)], ids=["square", "wide", "high"])
def test_every_display_matrix_gives_an_upright_picture(tmp_path, videos, name, aspect):
    """Each equals what FFmpeg 9's own autorotation shows, which the expected values were compared with."""
    (a, b, c, d), upright = ORIENTATIONS[name]
    matrix = [round(one * 65536) for one in (a, b, 0, c, d, 0, 0, 0)] + [0 if name == "zeros" else 1 << 30]
    kind = {"pixels": "yuv444p", "matrix": matrix, "aspect": aspect, "options": {"crf": "1"}}
    path = videos.encode(tmp_path / "clip.mp4", [PICTURE] * 3, **kind)
    square = {None: PICTURE, 2: PICTURE.repeat(2, 1), Fraction(1, 2): PICTURE[:, ::2]}[aspect]
    expected = upright(square).astype(int)
    shown = read_video(path)[0][0]
    assert shown.shape == expected.shape
    inner = np.abs(shown - expected).max(-1)  # edges between the colours are soft where pixels were stretched
    assert (inner < 8).mean() > 0.85
    facts = probe_video(path)
    assert (facts.height, facts.width) == shown.shape[:2]
    np.testing.assert_allclose(sample_video(path, [0.0], *shown.shape[:2])[0], shown, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    from PIL import Image

    image, content = Image.fromarray(PICTURE), io.BytesIO()
    tags = image.getexif()
    tags[0x112] = orientation
    image.save(content, "JPEG", exif=tags.tobytes(), quality=98)
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuvj420p"
        for number in range(3):
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            container.mux(packet)
    expected = list(ORIENTATIONS.values())[orientation - 1][1](PICTURE).astype(int)  # EXIF counts them in this order
    shown = read_video(tmp_path / "clip.avi")[0][0]
    assert shown.shape == expected.shape
    assert (np.abs(shown - expected).max(-1) < 16).mean() > 0.85


def by_ffmpeg(path, pixels="rgb24", scale=""):
    """The frames of a video as FFmpeg's own filters convert them (`format=rgb24`, which adds `scale` as the command
    line does): an equal conversion of FFmpeg 9's command line was compared with. scale: its options, if any."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            graph = av.filter.Graph()
            kind = {"width": frame.width, "height": frame.height, "format": frame.format}
            source = graph.add_buffer(**kind, time_base=Fraction(1, 25))
            nodes = [graph.add("scale", scale)] if scale else []
            nodes += [graph.add("format", pixels), graph.add("buffersink")]
            graph.link_nodes(source, *nodes).configure()
            graph.push(frame)
            yield graph.pull().to_ndarray().copy()


BT709, BT601, BT2020, LIMITED, FULL = 1, 6, 9, 1, 2


SD, HD = (96, 128), (720, 1280)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("a.mp4", "libx264", "yuv420p", SD),
        ("a.mp4", "libx264", "yuv420p", HD),  # untagged colours, which some players take for BT.709, but FFmpeg doesn't
        ("a.mp4", "libx264", "yuvj420p", SD),
        ("a.mp4", "libx264", "yuv444p", SD),
        ("a.mp4", "libx264", "yuv420p10le", SD),
        ("a.mp4", "libx264", "yuv422p10le", SD),
        ("a.mkv", "ffv1", "yuv420p", SD),
        ("a.mkv", "ffv1", "yuva420p", SD),
        ("a.mkv", "ffv1", "gray", SD),
        ("a.mov", "qtrle", "argb", SD),
        ("a.avi", "mjpeg", "yuvj422p", SD),
        ("a.gif", "gif", "rgb8", SD),
    ],
)
def test_pixels_equal_ffmpegs(tmp_path, videos, name, codec, pixels, size):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, size[0] // 8, size[1] // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    options = {"qp": "0"} if codec == "libx264" else {}
    tags = [(None, None), (BT709, LIMITED), (BT601, LIMITED), (BT2020, LIMITED), (BT709, FULL), (BT601, FULL)]
    seen = set()
    for matrix, extent in tags if size == SD else tags[:2]:
        settings = {} if matrix is None else {"colorspace": matrix, "color_range": extent}
        path = videos.encode(tmp_path / name, list(blocks), codec, pixels, options=options, **settings)
        expected = np.stack(list(by_ffmpeg(path))).astype(int)
        shown = read_video(path, None)[0]
        assert np.abs(shown - expected).max() <= 2, (matrix, extent)
        seen.add(shown.tobytes())
    assert len(seen) > 1 or pixels in (
        "gray",
        "argb",
        "rgb8",
        "yuvj420p",
        "yuvj422p",
    )  # the tags have an effect


def test_interlaced_pixels_equal_ffmpegs_and_stay_interlaced(tmp_path, videos):
    rows = np.random.default_rng(0).integers(0, 256, (3, 96, 1, 3), dtype=np.uint8).repeat(128, 2)
    options = {"qp": "0", "x264-params": "tff=1", "flags": "+ildct+ilme"}
    path = videos.encode(tmp_path / "a.ts", list(rows), options=options)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    shown = read_video(path, None)[0].astype(int)
    assert np.abs(shown - np.stack(list(by_ffmpeg(path)))).max() <= 2
    assert np.abs(np.diff(shown[:, :, 0], axis=1)).mean() > 20  # lines of two fields aren't blended


def test_pixels_after_an_edit_list_equal_ffmpegs(tmp_path, videos):
    """The cut is between key frames, so the first shown frame needs those that the edit list hides."""
    blocks = np.random.default_rng(0).integers(0, 256, (58, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    options = {**videos.OPEN_GOP, "qp": "0"}
    whole = videos.encode(tmp_path / "whole.mp4", list(blocks), pixels="yuv444p", options=options)
    cut = videos.copy_packets(whole, tmp_path / "cut.mp4", {"use_editlist": "1"}, videos.cut_at(1))
    shown, expected = read_video(cut, None)[0].astype(int), np.stack(list(by_ffmpeg(cut)))
    assert shown.shape == expected.shape == (58 - 25, 48, 64, 3)
    assert np.abs(shown - expected).max() <= 2
    assert np.abs(shown - blocks[25:]).max() <= 8  # RGB to 8-bit YUV and back


def hdr_video(path, videos, transfer, tagged, steps=None):
    """Steps of grey, or of colours uint16 (9, 3), in HDR; the transfer function is tagged in the stream, or only in the
    container."""
    steps = np.linspace(0, 65535, 9).astype(np.uint16)[:, None].repeat(3, 1) if steps is None else steps
    colours = "colorprim=9:colormatrix=9" + (f":transfer={transfer}" if tagged == "stream" else "")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 144, "yuv420p10le"
        stream.options = {"x265-params": f"log-level=none:lossless=1:{colours}"}
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, LIMITED
        for _ in range(3):
            picture = np.broadcast_to(steps.repeat(16, 0), (64, 144, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb48le")
            frame = frame.reformat(format="yuv420p10le", dst_colorspace=9, dst_color_range=LIMITED)
            frame.color_trc, frame.color_primaries = transfer, 9
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("transfer", "name"), [(16, "pq"), (18, "hlg")])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_hdr_is_recognised_and_tone_mapped(tmp_path, videos, transfer, name, kind):
    path = hdr_video(tmp_path / f"clip.{kind}", videos, transfer, "stream")
    assert probe_video(path).hdr == name
    steps = (np.linspace(0, 65535, 9).astype(np.uint16)[None, :, None]).repeat(3, 2)
    expected = to_sdr(steps, name)[0].astype(int)
    for frames in (read_video(path)[0], sample_video(path, [0.0], 64, 144)):
        shown = frames[0, 32, 8::16].astype(int)
        assert np.abs(shown - expected).max() <= 2
        assert (np.diff(shown[:, 1]) >= 0).all()
    assert probe_video(videos.encode(tmp_path / "sdr.mp4", [PICTURE] * 2, color_trc=1)).hdr == ""


@pytest.mark.parametrize(("transfer", "name"), [(16, "pq"), (18, "hlg")])
def test_the_pixels_that_are_tone_mapped_equal_ffmpegs(tmp_path, videos, transfer, name):
    """Ten bits of a dark channel are coarse, so colours are compared after FFmpeg has decoded and converted them."""
    steps = np.random.default_rng(0).integers(0, 45_000, (9, 3)).astype(np.uint16)
    path = hdr_video(tmp_path / "clip.mp4", videos, transfer, "stream", steps)
    (light, *_) = by_ffmpeg(path, "rgb48le")
    assert np.abs(read_video(path)[0][0].astype(int) - to_sdr(light, name)).max() <= 2


@pytest.mark.slow
def test_below_the_knee_hdr_greys_equal_ffmpegs_own_conversion(tmp_path, videos):
    """FFmpeg clips what is brighter than the reference white here; its perceptual mapping is another one than ours."""
    path = hdr_video(tmp_path / "clip.mp4", videos, 16, "stream")
    options = "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709:intent=relative_colorimetric"
    (expected, *_) = by_ffmpeg(path, scale=options)
    shown = read_video(path)[0][0].astype(int)
    assert np.abs(shown - expected)[:, : 5 * 16].max() <= 2
    assert (expected[0, 5 * 16 :] == 255).all()


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_hdr_tagged_only_in_the_container_is_recognised(tmp_path, videos, kind):
    """A decoder forgets it: HEVC that describes its primaries and not its transfer function leaves that unspecified."""
    path = hdr_video(tmp_path / f"clip.{kind}", videos, 16, "container")
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.color_trc == 16
        untold = next(container.decode(video=0)).color_trc
    assert (untold, probe_video(path).hdr) in ((2, "pq"), (16, "pq"))


def test_import_and_captioning_see_the_same_shape(tmp_path, videos):
    path = videos.encode(tmp_path / "clip.mp4", videos.numbered(9, 96, 120), aspect=Fraction(16, 11))
    facts, (frames, _) = probe_video(path), read_video(path)
    assert frames.shape[1:3] == (facts.height, facts.width) == (96, 175)


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    """If side data kept frames alive, this would take gigabytes."""
    code = (
        "import gc, resource, sys; from pathlib import Path; from univigu.video import read_video\n"
        "gc.disable()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak()\n"
        "read_video(Path(sys.argv[1]), 2); print(peak() - before)\n"
    )
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c" + struct.pack("<4H", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    start = b"GIF89a" + struct.pack("<HH", 1000, 1000) + b"\xf0\0\0" + bytes(3) + b"\xff" * 3
    (tmp_path / "long.gif").write_bytes(start + frame * 200 + b";")  # 800 MB of frames
    arguments = [sys.executable, "-c", code, str(tmp_path / "long.gif")]
    assert int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout) < 150


def empty_container(kind):
    """An mp4 with sound alone, or with a video stream that never got a frame."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        if kind == "sound":
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
        else:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            container.start_encoding()
    return target.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is a text file that somebody named .mp4\n" * 50,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile other.mp4\n",
        empty_container("sound"),
        empty_container("no frame"),
    ],
    ids=["empty", "text", "playlist", "concat", "sound", "no frame"],
)
def test_a_file_that_is_no_video_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"clip\.mp4'.*; (check|give)") as error:
        read_video(path)
    assert "\n" not in str(error.value)


def test_a_truncated_or_damaged_video_is_refused(clip):
    with pytest.raises(BadInputError, match="whole"):
        read_video(clip[: len(clip) // 2])
    start = clip.index(b"mdat") + 4
    for share in (0.3, 0.6):
        at = int(start + share * (len(clip) - start - 2500))
        with pytest.raises(BadInputError, match=r"whole|damaged"):
            read_video(clip[:at] + bytes(40) + clip[at + 40 :])


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(MissingInputError, match="check the path"):
            read_video(path)


@pytest.mark.parametrize(
    ("frames", "fps", "pixel_format"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), 8, "yuv444p"),
        (np.zeros((2, 8, 8, 3), np.float32), 8, "yuv444p"),
        (np.zeros((2, 8, 8), np.uint8), 8, "yuv444p"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, "yuv444p"),
        (np.zeros((2, 7, 8, 3), np.uint8), 8, "yuv420p"),
    ],
)
def test_invalid_frames_are_refused(frames, fps, pixel_format):
    with pytest.raises(BadInputError):
        encode_mp4(frames, fps, pixel_format)


def test_frames_are_fitted_to_a_model():
    frames = moving_picture(40, 64, 32)
    fitted = fit_frames(frames, 9, 32, 32)
    assert fitted.shape == (9, 32, 32, 3)
    np.testing.assert_array_equal(fitted[:, 0, 0, 2], frames[np.linspace(0, 39, 9).round().astype(int), 0, 0, 2])
    assert fit_frames(frames[:1], 5, 64, 32).shape == (5, 64, 32, 3)
