"""What `univigu data import` would make of each video, without making it: a table for people, and a summary."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from components.clips.import_clips import Layout, find_layout
from components.clips.import_texts import OF_ROWS
from components.clips.import_videos import VIDEOS, check_options, input_paths, plan_videos
from components.prompts.records import printable
from components.settings.sections import Video
from univigu.threads import side_threads

COLUMNS = (
    *("file", "frames", "rate", "seconds", "height", "width"),
    *("scenes", "clips", "bucket", "speed", "cut_off", "unused_seconds", "reason", "detail"),
)
Line = dict[str, Any]  # by `COLUMNS`


def examine_folder(
    folder: Path, table: Path | None, options: Mapping[str, str], profile: Mapping[str, Any], root: Path
) -> tuple[list[Line], int]:
    """A line for each video, and for each unusable row of a table; and the number of videos.

    The decisions are those of the import itself, without the quality gate, which needs the frames. Nothing is written.
    Raises as `import_folder` does.
    """
    from components.pipeline.processes import usable_cores
    from components.pipeline.runner import make_step

    check_options(options, profile, root)
    step = make_step(VIDEOS, {**profile, "import_options": dict(options)}, root.resolve())
    step.inputs = {**step.inputs, **input_paths(folder, table)}
    plans = plan_videos(step)
    lines = [_line(fault.id, reason=fault.reason, detail=printable(fault.detail)) for fault in plans.faults]
    with side_threads(usable_cores(), "read-videos") as pool:
        find = partial(find_layout, plans.videos, step.settings.video, step.settings.import_videos)
        found = step.progress(pool.map(find, plans.usable), len(plans.usable), unit="videos")
        lines += [
            _describe(plan, layout, step.settings.video) for plan, layout in zip(plans.usable, found, strict=True)
        ]
    return sorted(lines, key=lambda line: (line["file"], line["reason"])), plans.found


def _line(file: str, **values: Any) -> Line:
    return {**dict.fromkeys(COLUMNS, ""), "clips": 0, "file": file, **values}


def _describe(plan: Mapping[str, Any], layout: Layout, video: Video) -> Line:
    facts, misfit = layout.facts, layout.misfit
    line = _line(printable(plan["file"]))
    if facts:
        line |= {
            "frames": facts.count,
            "rate": f"{facts.rate:.2f}",
            "seconds": f"{facts.frames(video.fps) / video.fps:.3f}",
        }
        line |= {"height": facts.height, "width": facts.width}
    if misfit or not facts:
        return {**line, "reason": misfit.reason, "detail": printable(misfit.detail)} if misfit else line
    buckets = dict.fromkeys(window.bucket for window in layout.windows)
    speeds = sorted({window.speed for window in layout.windows})
    return {
        **line,
        "scenes": len(layout.scenes),
        "clips": len(layout.windows),
        "bucket": " ".join(map(str, buckets)),
        "speed": " to ".join(dict.fromkeys(f"{speed:.3g}" for speed in (speeds[0], speeds[-1]))),
        "cut_off": f"{max(share_cut_off(facts.height, facts.width, *bucket[1:]) for bucket in buckets):.3f}",
        "unused_seconds": f"{layout.unused:.3f}",
    }


def share_cut_off(height: int, width: int, to_height: int, to_width: int) -> float:
    """The share of a picture that is lost when it covers another size and is cropped around the centre."""
    scale = max(to_height / height, to_width / width)
    return 1 - to_height * to_width / (scale**2 * height * width)


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Write the lines as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


def summarise(lines: Sequence[Line], videos: int) -> Iterator[str]:
    """The lines to print about an import that wasn't carried out."""
    used = [line for line in lines if line["clips"]]
    yield used_of(len(used), videos, Counter(line["reason"] for line in lines if line["reason"]))
    if not used:
        return
    buckets = Counter(bucket for line in used for bucket in line["bucket"].split())
    clips, unused = sum(line["clips"] for line in used), sum(float(line["unused_seconds"]) for line in used)
    yield f"They would become {clips} clips; sizes by videos: " + ", ".join(
        f"{bucket} {count}" for bucket, count in sorted(buckets.items())
    )
    if unused >= 0.05:
        seconds = sum(float(line["seconds"]) for line in used)
        yield f"In no clip: {unused:.1f} of the {seconds:.1f} seconds of these videos"


def used_of(used: int, videos: int, reasons: Mapping[str, int]) -> str:
    """How many videos are used, and why the others aren't; reasons of rows that concern no video are left out."""
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()) if reason not in OF_ROWS)
    return f"Used {used} of {videos} videos" + (f", because: {why}" if why and used < videos else "")
