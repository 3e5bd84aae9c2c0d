"""Videos of many formats, made by FFmpeg's encoders and muxers through PyAV: each frame shows its own number."""

from types import SimpleNamespace

import av
import numpy as np
import pytest

OPEN_GOP = {"x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0:bframes=3:b-adapt=0"}


def numbered(count, height=48, width=64, first=0):
    """Frames that show their numbers, below 256, in binary: eight upright bars, dark or bright."""
    bars = np.array(
        [[16, 235][number >> bit & 1] for number in range(first, first + count) for bit in range(8)], np.uint8
    )
    rows = bars.reshape(count, 1, 8, 1).repeat(width // 8, axis=2)
    return list(np.broadcast_to(rows, (count, height, width, 3)))


def numbers(frames):
    """The numbers that frames of `numbered` show, at any size."""
    return [sum(int(bar.mean() > 125) << bit for bit, bar in enumerate(np.split(frame, 8, axis=1))) for frame in frames]


def encode(path, frames, codec="libx264", pixels="yuv420p", fps=25, options=(), matrix=None, aspect=None, **settings):
    """Write RGB frames as a video in the format of the file's name; `settings` are PyAV's names for the codec's."""
    with av.open(str(path), "w", options=settings.pop("muxer", {})) as container:
        container.metadata.update(settings.pop("metadata", {}))
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pixels, dict(options)
        context = stream.codec_context
        context.thread_count = 1
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if aspect:
            context.sample_aspect_ratio = aspect
        for name, value in settings.items():
            setattr(context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def copy_packets(source, path, muxer=(), change=lambda packets: packets):
    """Write a video's packets to another container, after `change`."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=dict(muxer)) as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        for packet in change([packet for packet in given.demux(stream) if packet.dts is not None]):
            packet.stream = copy
            made.mux(packet)
    return path


def cut_at(seconds):
    """The packets of FFmpeg's `-ss` with `-c copy`: from the key frame before, which an edit list hides."""

    def change(packets):
        start = round(seconds / packets[0].time_base)
        first = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= start)
        for packet in packets[first:]:
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
        return packets[first:]

    return change


@pytest.fixture(scope="session")
def videos():
    """The functions above, for tests."""
    return SimpleNamespace(
        numbered=numbered, numbers=numbers, encode=encode, copy_packets=copy_packets, cut_at=cut_at, OPEN_GOP=OPEN_GOP
    )


@pytest.fixture(scope="session")
def every_container(tmp_path_factory):
    """The same thirty frames in every supported container, by its name."""
    folder = tmp_path_factory.mktemp("containers")
    frames = numbered(30, 96, 128)
    texture = np.random.default_rng(0).integers(0, 40, frames[0].shape, dtype=np.uint8)
    frames = [(frame.astype(int) + texture).clip(0, 255).astype(np.uint8) for frame in frames]
    fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    kinds = {
        "mp4": {},
        "fragments.mp4": {"options": {"g": "5"}, "muxer": fragments},
        "faststart.mov": {"muxer": {"movflags": "faststart"}},
        "3gp": {},
        "mkv": {},
        "live.mkv": {"muxer": {"live": "1"}},
        "webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
        "live.webm": {"codec": "libvpx", "options": {"deadline": "realtime"}, "muxer": {"live": "1"}},
        "gif": {"codec": "gif", "pixels": "rgb8", "fps": 10},
        "avi": {"codec": "mpeg4"},
        "h264.avi": {},
        "flv": {},
        "wmv": {"codec": "wmv2"},
        "y4m": {"codec": "wrapped_avframe"},
        "ts": {},
    }
    return {name: encode(folder / f"video.{name}", frames, **kind) for name, kind in kinds.items()}
