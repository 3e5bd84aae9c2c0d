"""Video files: the same bytes each time, colours kept, and one sentence for whatever is no whole video."""

import io
import os
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from univigu.errors import BadInputError, MissingInputError
from univigu.video import decode_mp4, encode_mp4, fit_frames, read_video


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
def test_a_clip_comes_back_as_it_was(shape):
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


def test_a_large_picture_is_scaled_down_and_a_portrait_stays_one():
    frames, _ = read_video(encode_mp4(moving_picture(2, 1920, 64), 8))
    assert frames.shape == (2, 1280, 43, 3)


def test_a_video_held_upright_comes_out_upright():
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
def test_what_is_no_video_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"clip\.mp4'.*; (check|give)") as error:
        read_video(path)
    assert "\n" not in str(error.value)


def test_a_cut_or_damaged_video_is_refused(clip):
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
def test_frames_that_make_no_video_are_refused(frames, fps, pixel_format):
    with pytest.raises(BadInputError):
        encode_mp4(frames, fps, pixel_format)


def test_frames_are_fitted_to_a_model():
    frames = moving_picture(40, 64, 32)
    fitted = fit_frames(frames, 9, 32, 32)
    assert fitted.shape == (9, 32, 32, 3)
    np.testing.assert_array_equal(fitted[:, 0, 0, 2], frames[np.linspace(0, 39, 9).round().astype(int), 0, 0, 2])
    assert fit_frames(frames[:1], 5, 64, 32).shape == (5, 64, 32, 3)
