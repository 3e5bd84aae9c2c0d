"""How fast `univigu data import` reads a folder of videos, against decoding alone; and its memory.

The videos are H.264 of 640x360, 10 seconds at 30 frames per second, or copies of an mp4 of one's own, and become clips
of the profile `tiny`, at their own speed, without checks. Of every hundred, four can't be used: one is cut off, one has
the bytes of another, one is too short, and one has no text. Each import runs in a process of its own, with an empty
work root, after a small one that loads libraries.

The made videos are slow pans over pictures with the spectrum of natural ones, whose amplitudes fall with the frequency
(Field 1987, doi:10.1364/JOSAA.4.002379), softened by a lens and with a sensor's noise. Their coded frames are about as
large as those of recorded scenes at the same setting of x264; plain shapes would decode in a third of the time.

``ratio`` is the speed of the import over cores times the speed of one core that only decodes such videos, which takes
``decode_ms`` of CPU time for each, so that other programs don't count. The import encodes clips, probes, scales, hashes
and writes besides; ``cpu_ms`` is what it and its processes need per video. ``kilobytes`` are those of a video.
``memory`` is in MiB, for all videos and for a tenth of them: the largest resident memory of the process itself, and of
it and its children together, sampled, with what they share counted once.
"""

import io
import json
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from components.bench.curation import run_apart
from components.pipeline.processes import usable_cores
from univigu.errors import BadInputError, UniViGUError

VIDEOS = 1000
SECONDS, RATE = 10, 30  # of a video
HEIGHT, WIDTH = 360, 640
PICTURES = 4  # different videos; the others differ in their bytes alone
CONTRAST, COLOUR = 52, 0.4  # grey levels, and the contrast of colours as a share of it
SOFTNESS, NOISE = 1.0, 3.0  # pixels, and grey levels: standard deviations of a small camera's blur and noise
PAN = 1.3  # pixels from a frame to the next; of a whole number, x264 would need no more than the first frame
TIMED = 40  # videos that are decoded on one thread
ROOT = Path(__file__).resolve().parents[2]
TEXT = "a red two moves left"
OPTIONS = {"licence": "CC0-1.0", "source": "a benchmark", "texts": "prompts"}
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def measure(videos: int = VIDEOS, video: Path | None = None) -> dict[str, Any]:
    contents = [_read(video)] if video else [encode(number) for number in range(PICTURES)]
    few = max(1, videos // 10)
    with tempfile.TemporaryDirectory() as home:
        folders = {name: Path(home) / name for name in ("few", "all")}
        write_videos(folders["few"], few, contents)
        write_videos(folders["all"], videos, contents)
        found = {name: start_import(folder, Path(home) / f"root-{name}") for name, folder in folders.items()}
        decode_ms = time_decoding(folders["all"])
    imported = found["all"]
    return {
        "ratio": round(decode_ms / usable_cores() / (1000 * imported["seconds"] / imported["used"]), 3),
        "seconds": imported["seconds"],
        "decode_ms": round(decode_ms, 2),
        "cpu_ms": imported["cpu_ms"],
        "kilobytes": round(sum(map(len, contents)) / len(contents) / 1000),
        "videos": {"used": imported["used"], "of": videos, "because": imported["reasons"]},
        "clips": imported["clips"],
        "memory": {name: {"videos": each["of"], **each["memory"]} for name, each in found.items()},
    }


def _read(video: Path) -> bytes:
    """An mp4's bytes; raises as `read_video` does, and `BadInputError` for a file of another format."""
    from univigu.video import probe_video

    probe_video(video)
    content = video.read_bytes()
    if content[4:8] != b"ftyp":
        raise BadInputError(f"{video} is no mp4, whose copies can get different bytes; convert it to one.")
    return content


def write_videos(folder: Path, count: int, contents: Sequence[bytes]) -> None:
    """Write so many copies of videos, each with bytes and a text of its own; of every hundred, four can't be used."""
    folder.mkdir()
    short = encode(0, 2)
    for number in range(count):
        content = with_bytes(contents[number % len(contents)], number)
        kind = number % 100
        if kind == 99:
            content = content[: len(content) // 2 + number]
        elif kind == 98:
            content = with_bytes(contents[(number - 1) % len(contents)], number - 1)
        elif kind == 96:
            content = with_bytes(short, number)
        (folder / f"{number:05d}.mp4").write_bytes(content)
        if kind != 95:
            (folder / f"{number:05d}.txt").write_text(TEXT, encoding="utf-8")


def natural_picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Grey levels (height, width, 3), not clipped, whose amplitudes are as the inverse of their spatial frequencies."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = np.inf
    amplitudes = np.exp(-2 * (np.pi * SOFTNESS * frequencies) ** 2) / frequencies
    spectra = np.fft.rfft2(rng.standard_normal((4, height, width))) * amplitudes
    light, *colours = np.fft.irfft2(spectra, (height, width))
    picture = light[..., None] + COLOUR * np.stack(colours, axis=-1)
    return 128 + CONTRAST * picture / picture.std()


@cache
def encode(seed: int, frames: int = SECONDS * RATE) -> bytes:
    """A video as a camera's file: 4:2:0, x264's default rate factor."""
    import av

    rng = np.random.default_rng(seed)
    wide = natural_picture(rng, HEIGHT, WIDTH + math.ceil(PAN * frames) + 1)
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            part, left = math.modf(PAN * number)
            shown, beside = (wide[:, at : at + WIDTH] for at in (int(left), int(left) + 1))
            shown = (1 - part) * shown + part * beside + rng.normal(0, NOISE, (HEIGHT, WIDTH, 1))
            pixels = shown.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def with_bytes(content: bytes, number: int) -> bytes:
    """The mp4 with a box at its end that players skip: another file with the same video."""
    return content + (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")


def time_decoding(folder: Path) -> float:
    """Milliseconds of CPU in which PyAV decodes a video, on one thread."""
    import av

    paths = [path for path in sorted(folder.glob("*.mp4")) if int(path.stem) % 100 < 95][:TIMED]
    began = time.process_time()
    for path in paths:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass
    return 1000 * (time.process_time() - began) / len(paths)


def start_import(folder: Path, root: Path) -> dict[str, Any]:
    """The figures of an import in a process of its own."""
    found, peak = run_apart([sys.executable, "-m", __name__, str(folder), str(root)])
    return {**found, "memory": {**found["memory"], "with_children": round(peak / 2**20)}}


def run_import(folder: Path, root: Path) -> dict[str, Any]:
    """Import a folder with the profile `tiny`, in this process."""
    from components.pipeline.profiles import load_profile

    profile = load_profile("tiny")
    profile["synthesize_videos"]["checks"] = {}
    with tempfile.TemporaryDirectory() as home:
        write_videos(Path(home) / "videos", 2, [encode(0, 2 * RATE)])
        _import(Path(home) / "videos", Path(home) / "root", profile)
    began, cpu = time.perf_counter(), _cpu_seconds()
    manifest = _import(folder, root, profile)
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    found, reasons = manifest["facts"]["videos"], dict(sorted(manifest["reasons"].items()))
    if not found["used"]:
        raise BadInputError(f"None of the videos can be used ({reasons}); give one that an import takes.")
    if found["used"] + sum(reasons.values()) != found["of"]:
        raise UniViGUError(f"{found['used']} used and {reasons} don't add up to {found['of']} videos; report this.")
    return {
        "seconds": round(seconds, 2),
        "cpu_ms": round(1000 * cpu / found["used"], 2),
        "used": found["used"],
        "of": found["of"],
        "clips": manifest["rows_out"],
        "reasons": reasons,
        "memory": {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)},
    }


def _cpu_seconds() -> float:
    """The CPU time of this process and of its children that have ended."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, WHO))


def _import(folder: Path, root: Path, profile: dict[str, Any]) -> dict[str, Any]:
    from components.clips.import_videos import import_folder

    shutil.copytree(ROOT / profile["base"], root / profile["base"])
    return import_folder(folder, None, OPTIONS, profile, root)


if __name__ == "__main__":
    try:
        print(json.dumps(run_import(Path(sys.argv[1]), Path(sys.argv[2]))))
    except UniViGUError as error:
        sys.exit(str(error))
