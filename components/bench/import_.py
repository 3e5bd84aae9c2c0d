"""How fast `univigu data import` reads a folder of videos, against what codecs alone need; and its memory.

The videos are H.264 of 10 seconds at 30 frames per second, in each of `SIZES`, and become clips of the profile `tiny`,
at their own speed, without checks. Of every hundred, four can't be used: one is cut off, one has the bytes of another,
one is too short, and one has no text. Each import runs in a process of its own, with an empty work root, after a small
one that loads libraries.

For each size, ``against_decoding`` is the speed of the import over cores times the speed of one core that only decodes
such videos, and ``ratio`` over that of one that decodes them and encodes their clips: ``decode_ms`` and ``encode_ms``
per video, in CPU time, so that other programs don't count. The import probes, samples, scales, hashes and writes
besides. The report's own ``ratio`` is the lowest. ``cpu_ms`` is what the import and its processes need per video.
``memory`` is in MiB, for all videos and for a tenth of them: the largest resident memory of the process itself, and of
it and its children together, sampled, with what they share counted once.
"""

import io
import json
import resource
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from components.bench.curation import run_apart
from components.pipeline.processes import usable_cores
from univigu.errors import UniViGUError

VIDEOS = 1000
SECONDS, RATE = 10, 30  # of a video
SIZES = {"640x360": (360, 640), "1280x720": (720, 1280)}  # height and width by name
PICTURES = 10  # different videos; the others differ in their bytes alone
TIMED = 40  # videos and clips that are decoded and encoded on one thread
ROOT = Path(__file__).resolve().parents[2]
TEXT = "a red two moves left"
OPTIONS = {"licence": "CC0-1.0", "source": "a benchmark", "texts": "prompts"}
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def measure(videos: int = VIDEOS) -> dict[str, Any]:
    sizes = {name: measure_size(size, videos) for name, size in SIZES.items()}
    return {"ratio": min(found["ratio"] for found in sizes.values()), "sizes": sizes}


def measure_size(size: tuple[int, int], videos: int) -> dict[str, Any]:
    """The figures of videos of one height and width."""
    few = max(1, videos // 10)
    with tempfile.TemporaryDirectory() as home:
        folders = {name: Path(home) / name for name in ("few", "all")}
        write_videos(folders["few"], few, size)
        write_videos(folders["all"], videos, size)
        found = {name: start_import(folder, Path(home) / f"root-{name}") for name, folder in folders.items()}
        imported = found["all"]
        decode_ms = time_decoding(folders["all"])
        encode_ms = time_encoding(Path(home) / "root-all") * imported["clips"] / imported["used"]
    cores, wall_ms = usable_cores(), 1000 * imported["seconds"] / imported["used"]
    return {
        "ratio": round((decode_ms + encode_ms) / cores / wall_ms, 3),
        "against_decoding": round(decode_ms / cores / wall_ms, 3),
        "seconds": imported["seconds"],
        "decode_ms": round(decode_ms, 2),
        "encode_ms": round(encode_ms, 2),
        "cpu_ms": imported["cpu_ms"],
        "videos": {"used": imported["used"], "of": videos, "because": imported["reasons"]},
        "clips": imported["clips"],
        "memory": {name: {"videos": each["of"], **each["memory"]} for name, each in found.items()},
    }


def write_videos(folder: Path, count: int, size: tuple[int, int], frames: int = SECONDS * RATE) -> None:
    """Write so many videos, each with a text; of every hundred, four can't be used."""
    folder.mkdir()
    pictures = [encode(number, size, frames) for number in range(min(PICTURES, count))]
    short = encode(0, size, 2)
    for number in range(count):
        content = with_bytes(pictures[number % len(pictures)], number)
        kind = number % 100
        if kind == 99:
            content = content[: len(content) // 2 + number]
        elif kind == 98:
            content = with_bytes(pictures[(number - 1) % len(pictures)], number - 1)
        elif kind == 96:
            content = with_bytes(short, number)
        (folder / f"{number:05d}.mp4").write_bytes(content)
        if kind != 95:
            (folder / f"{number:05d}.txt").write_text(TEXT, encoding="utf-8")


@cache
def encode(seed: int, size: tuple[int, int], frames: int) -> bytes:
    """A video of a moving picture, as a camera's file: 4:2:0, x264's default rate factor."""
    import av

    height, width = size
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height // 8 + 1, width // 8 + SECONDS * RATE // 4 + 1, 3), np.uint8)
    wide = picture.repeat(8, axis=0).repeat(8, axis=1)[:height]
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            shown = np.ascontiguousarray(wide[:, 2 * number : 2 * number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
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


def time_encoding(root: Path) -> float:
    """Milliseconds of CPU in which an imported clip is encoded, on one thread."""
    from components.clips.archive import open_clip, read_clips
    from components.pipeline.tables import read_table
    from univigu.video import encode_mp4

    home = root / "data/clips"
    rows = read_table(home, "clips").to_pylist()[:TIMED]
    clips = [open_clip(row, content) for row, content in read_clips(home, rows)]
    began = time.process_time()
    for frames, fps in clips:
        encode_mp4(frames, fps)
    return 1000 * (time.process_time() - began) / len(clips)


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
        write_videos(Path(home) / "videos", 2, SIZES["640x360"], 2 * RATE)
        _import(Path(home) / "videos", Path(home) / "root", profile)
    began, cpu = time.perf_counter(), _cpu_seconds()
    manifest = _import(folder, root, profile)
    seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    found, reasons = manifest["facts"]["videos"], dict(sorted(manifest["reasons"].items()))
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
    print(json.dumps(run_import(Path(sys.argv[1]), Path(sys.argv[2]))))
