"""Small video files as cameras and people make them."""

import io
import os
import signal
import struct
from fractions import Fraction

import av
import numpy as np

from components.clips.import_clips import make_clips


def write_video(path, times, height=32, width=32, pixel=None, dark=40):
    """A video whose brightness is `dark` at the time 0 and grows by 80 a second, its frames shown at `times`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "4"}
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if pixel:
            stream.codec_context.sample_aspect_ratio = pixel
        for time in times:
            level = np.full((height, width, 3), round(dark + 80 * time) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(level, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(content):
    """The bytes of an mp4 with metadata that rotates it clockwise by 90 degrees."""
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    return content[:at] + clockwise + content[at + len(clockwise) :]


def sound():
    """The bytes of an mp4 that holds sound and no video."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 44100
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return target.getvalue()


def make_clips_or_crash(*arguments):
    """`make_clips`, as if a file whose name starts with "crash" crashed its decoder."""
    if arguments[-1]["file"].startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return make_clips(*arguments)
