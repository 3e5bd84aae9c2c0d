"""A video file must be complete, by its own container, and must not declare more than it has."""

import io
import struct
import subprocess
import sys
import zlib

import pytest

from univigu.containers import check_container
from univigu.errors import VideoError
from univigu.video import read_video


def gif(width, height, frames=1):
    """A GIF with this many frames, each of which changes one pixel of a canvas."""
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00\x2c" + struct.pack("<4H", 0, 0, 1, 1) + b"\x00\x02\x02\x44\x01\x00"
    return (
        b"GIF89a" + struct.pack("<HH", width, height) + b"\xf0\x00\x00" + bytes(3) + b"\xff" * 3 + frame * frames + b";"
    )


def box(kind, *content):
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind) + b"".join(content)


def sample_sizes(count):
    """The boxes of an MP4 with one track that declares this many samples, all of one byte."""
    content = box(b"stsz", struct.pack(">III", 0, 1, count))
    for kind in (b"stbl", b"minf", b"mdia", b"trak"):
        content = box(kind, content)
    return content


START = box(b"ftyp", b"isom", bytes(4))


def test_every_container_is_read_completely(every_container):
    found = {name: len(read_video(path)[0]) for name, path in every_container.items()}
    assert found == dict.fromkeys(every_container, 30)


@pytest.mark.parametrize("share", range(5, 100, 5))
def test_a_truncated_file_is_refused(every_container, share):
    passed = []
    for name, path in every_container.items():
        content = path.read_bytes()
        try:
            read_video(content[: len(content) * share // 100])
            passed.append(name)
        except VideoError as error:
            passed += [name] if error.reason != "damaged" else []
    assert passed == []


def test_a_file_without_its_last_bytes_is_refused_by_its_container(every_container):
    indexed = {"fragments.mp4"}  # it ends with an optional index
    for name, path in every_container.items():
        content = path.read_bytes()[:-9]
        if name not in indexed:
            with pytest.raises(VideoError, match=r"was cut off: .*; get the whole file"):
                check_container(io.BytesIO(content), len(content), "it")


@pytest.mark.parametrize(
    "content",
    [
        START + box(b"moov", sample_sizes(1 << 27)),
        START + box(b"moov", sample_sizes(9_000), sample_sizes(9_000)),
        START + box(b"moof", box(b"traf", box(b"trun", struct.pack(">II", 0, 1 << 31)))),
        START + box(b"moov", box(b"cmov", box(b"cmvd", bytes(4) + zlib.compress(box(b"moov", sample_sizes(1 << 27)))))),
        START + box(b"moov", box(b"cmov", box(b"cmvd", bytes(4) + zlib.compress(bytes(100 << 20))))),
        START + box(b"moov", box(b"cmov", b"no header at all")),
    ],
    ids=["samples", "tracks", "fragment", "compressed", "zeros", "damaged"],
)
def test_a_header_with_more_frames_than_bytes_is_refused(content):
    with pytest.raises(VideoError, match="claims to have") as error:
        check_container(io.BytesIO(content), len(content), "it")
    assert error.value.reason == "too_large"


@pytest.mark.parametrize("side", [16_000, 65_535])
def test_frames_of_billions_of_pixels_are_refused_before_allocation(tmp_path, side):
    path = tmp_path / "bomb.gif"
    assert path.write_bytes(gif(side, side)) < 66
    code = (
        "import resource, sys; from pathlib import Path; from univigu.video import read_video\n"
        "from univigu.errors import VideoError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak()\n"
        "try: read_video(Path(sys.argv[1]))\n"
        "except VideoError as error: print(error.reason, peak() - before)\n"
    )
    output = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    reason, megabytes = output.split()
    assert (reason, int(megabytes) < 100) == ("too_large", True)


def test_too_many_pixels_in_all_frames_are_refused():
    with pytest.raises(VideoError, match="more pixels in all of them") as error:
        read_video(gif(1000, 1000, 40), pixels=20_000_000)
    assert error.value.reason == "too_large"
    assert read_video(gif(1000, 1000, 20), 2, pixels=20_000_000)[0].shape == (2, 1000, 1000, 3)


@pytest.mark.parametrize(
    "behind", [bytes(100), b"\xff" * 100, box(b"junk", bytes(50)) + b"\0\1"], ids=["zeros", "noise", "box"]
)
def test_appended_bytes_after_a_complete_video_are_accepted(every_container, behind):
    assert len(read_video(every_container["mp4"].read_bytes() + behind)[0]) == 30


def test_a_header_of_noise_is_left_to_the_demuxer():
    for start in (
        b"\x1a\x45\xdf\xa3",
        b"RIFF\x10\0\0\0AVI ",
        b"OggS",
        b"FLV\x01",
        b"GIF89a",
        b"\0\0\0\x08ftyp",
        b"YUV4",
    ):
        for noise in (bytes(300), b"\xff" * 300, bytes(range(256)) * 2):
            with pytest.raises(VideoError):
                read_video(start + noise)
