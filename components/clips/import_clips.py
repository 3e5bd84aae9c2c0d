"""A user's video becomes clips: upright, with square pixels, of a bucket's size, at the profile's frame rate."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.clips.archive import stream_tar
from components.clips.buckets import Misfit
from components.clips.import_files import Videos
from components.clips.windows import Scene, Window, list_windows
from components.pipeline.processes import usable_cores
from components.prompts.records import printable
from components.prompts.workers import TRIES, ProcessDiedError, Processes
from components.settings.sections import ImportVideos, Video
from univigu.errors import BadInputError, MissingInputError, VideoError

if TYPE_CHECKING:
    import numpy as np

    from components.clips.gate import ClipCheck
    from univigu.video import VideoFacts

NAME = "import"  # the generator and captioner in the tables
FEW, SMALL = 16, 2**24  # videos, and bytes of all, that are read in this process: another starts in a third of a second


class Layout(NamedTuple):
    """What becomes of a video."""

    facts: "VideoFacts | None"  # unless it can't be read
    scenes: list[Scene]
    windows: list[Window]
    misfit: Misfit | None  # why there is no window

    @property
    def seconds(self) -> float:
        """The video's duration, if it is used."""
        return self.scenes[-1].end

    @property
    def unused(self) -> float:
        """Seconds of the video that are in no clip."""
        used, reached = 0.0, 0.0
        for window in self.windows:
            used += max(0.0, min(window.end, self.seconds) - max(window.start, reached))
            reached = max(reached, window.end)
        return max(0.0, self.seconds - used)


class Refused(NamedTuple):
    """A video, or a clip of one, that is quarantined: the arguments of `Step.reject`."""

    id: str
    reason: str
    detail: str
    row: Mapping[str, Any]


class Made(NamedTuple):
    """The rows of a video's clips, without `shard`, and what is quarantined of it."""

    clips: list[dict[str, Any]]
    refused: list[Refused]


def lay_out(source: Path | bytes, video: Video, settings: ImportVideos) -> Layout:
    """What becomes of a video; it is decoded only where the profile wants scenes.

    Raises as `read_video` does.
    """
    from components.clips.scenes import find_scenes
    from univigu.video import probe_video

    facts = probe_video(source)
    if misfit := _find_misfit(facts, video, settings):
        return Layout(facts, [], [], misfit)
    end = facts.frames(video.fps) / video.fps
    cut = settings.scenes == "cut"
    scenes = find_scenes(source, end, settings.scene_threshold) if cut else [Scene(0.0, end)]
    windows = list_windows(scenes, facts.height, facts.width, video, settings)
    return Layout(facts, [], [], windows) if isinstance(windows, Misfit) else Layout(facts, scenes, windows, None)


def _find_misfit(facts: "VideoFacts", video: Video, settings: ImportVideos) -> Misfit | None:
    if facts.hdr and video.fit.hdr == "quarantine":
        return Misfit("hdr", f"its colours are HDR ({facts.hdr}), which the profile's 'video.fit.hdr' leaves out")
    if settings.take != "squeeze" and facts.seconds > facts.count:
        detail = f"it shows {facts.count} frames in {facts.seconds:.0f} seconds: clips at its own speed would be still"
        return Misfit("too_long", detail)
    return None


def find_layout(videos: Videos, video: Video, settings: ImportVideos, row: Mapping[str, Any]) -> Layout:
    """`lay_out` of a planned video; whatever makes it unreadable is a `misfit`, too."""
    return _find_layout(videos, video, settings, row)[0]


def _find_layout(
    videos: Videos, video: Video, settings: ImportVideos, row: Mapping[str, Any]
) -> tuple[Layout, Path | bytes]:
    """The layout of a video, and its file or bytes."""
    source: Path | bytes = b""
    try:
        source = videos.open(row["file"])
        return lay_out(source, video, settings), source
    except (MissingInputError, VideoError, OSError) as error:
        return Layout(None, [], [], _misfit(videos, row, error)), source


def make_clips(
    videos: Videos,
    video: Video,
    settings: ImportVideos,
    gate: Sequence["ClipCheck"],
    place: Path,
    row: Mapping[str, Any],
) -> Made:
    """Write the clips of a planned video into a tar at `place`; one clip's frames are in memory at a time.

    A video that turns out to be damaged gives no clip, however late.
    """
    layout, source = _find_layout(videos, video, settings, row)
    if layout.misfit:
        return Made([], [_refuse(row, layout.misfit)])
    made = Made([], [])
    try:
        stream_tar(place, _clips(source, layout, video.fps, gate, row, made))
    except (MissingInputError, VideoError) as error:
        place.unlink()
        return Made([], [_refuse(row, _misfit(videos, row, error))])
    return made


@contextmanager
def in_processes(
    make: Callable[[Path, Mapping[str, Any]], Made],
    videos: Videos,
    rows: Sequence[Mapping[str, Any]],
    gate: Sequence["ClipCheck"],
) -> Iterator[Callable[[Path, Mapping[str, Any]], Made]]:
    """`make_clips` in one process per core, if `rows` are worth starting them; called from as many threads.

    Threads of one process share Python's lock, which costs a part of each core. A video that ends each process that
    reads it is quarantined.
    """
    few = len(rows) <= FEW and sum(videos.size(row["file"]) for row in rows) <= SMALL
    if few or any(map(_has_model, gate)):  # each process would hold the models
        yield make
        return
    with Processes(make, usable_cores()) as call:

        def make_apart(place: Path, row: Mapping[str, Any]) -> Made:
            try:
                return call(place, row)
            except ProcessDiedError as error:
                place.unlink(missing_ok=True)
                detail = f"the process that read it {error}, {TRIES} times; convert the file, or leave it out"
                return Made([], [_refuse(row, Misfit("crashed", detail))])

        yield make_apart


def _has_model(check: "ClipCheck") -> bool:
    return "model" in check.settings or hasattr(check.module, "REQUIRES")


def _clips(
    source: Path | bytes, layout: Layout, fps: float, gate: Sequence["ClipCheck"], row: Mapping[str, Any], made: Made
) -> Iterator[tuple[str, bytes]]:
    """Each clip's name in the tar and its mp4; rows are added to `made`."""
    from components.clips.gate import judge
    from univigu.video import encode_mp4

    for window, frames in _sample(source, layout):
        about = _about(row, window)
        (finding,) = judge(frames[None], [about], gate)
        if finding.reason:
            refused = _refuse({**about, "scores": finding.scores}, Misfit(finding.reason, finding.detail))
            made.refused.append(refused if len(layout.windows) == 1 else refused._replace(id=_part(row, window)))
            continue
        content = (own_clip(source, frames, fps) if window.whole else None) or encode_mp4(frames, fps)
        changes = {"speed": window.speed, "start": round(window.start, 3), "end": round(window.end, 3)}
        changes |= {"tone_mapped": 1} if layout.facts and layout.facts.hdr else {}
        made.clips.append(clip_row(about, window, content, fps, {**finding.scores, **changes}))
        made.clips[-1]["unused"] = [round(layout.unused, 3), round(layout.seconds, 3)]
        yield made.clips[-1]["member"], content


def own_clip(source: Path | bytes, frames: "np.ndarray", fps: float) -> bytes | None:
    """The bytes of a video that is a clip of ours with just these frames, or None: encoding it again would change it.

    It has one stream, as `encode_mp4` makes it, and is smaller than its frames.
    """
    from univigu.decoding import open_video
    from univigu.video import decode_mp4

    with open_video(source) as video:
        ours = (len(video.container.streams), video.stream.codec.name, video.stream.pix_fmt) == (1, "h264", "yuv444p")
    if not ours or (len(source) if isinstance(source, bytes) else source.stat().st_size) > frames.nbytes:
        return None
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        shown, rate = decode_mp4(content)
    except BadInputError:
        return None
    return content if rate == fps and shown.shape == frames.shape and bool((shown == frames).all()) else None


def _sample(source: Path | bytes, layout: Layout) -> Iterator[tuple[Window, "np.ndarray"]]:
    """Each window and its frames; one pass over the video for each size of frames."""
    from univigu.video import sample_windows

    stamps = layout.facts.stamps if layout.facts else None
    for height, width in sorted({window.bucket[1:] for window in layout.windows}):
        alike = [window for window in layout.windows if window.bucket[1:] == (height, width)]
        frames = sample_windows(source, [window.times for window in alike], height, width, stamps)
        yield from zip(alike, frames, strict=True)


def _about(row: Mapping[str, Any], window: Window) -> Mapping[str, Any]:
    """A video's row as that of a clip: a part of the video has an id and a seed of its own."""
    if window.whole:
        return {**row, "plan": row["id"]}
    clip_id = f"{row['id']}-{round(window.start * 1000):08d}"
    seed = int(hashlib.sha256(clip_id.encode()).hexdigest()[:8], 16)
    return {**row, "plan": row["id"], "id": clip_id, "seed": seed}


def clip_row(
    about: Mapping[str, Any], window: Window, content: bytes, fps: float, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the table `clips`, without `shard`, which the caller adds."""
    return {
        **{key: about[key] for key in ("id", "prompt_id", "prompt", "stage", "seed", "plan")},
        "generator": NAME,
        "generator_digest": about["source_sha256"],
        **window.bucket._asdict(),
        "fps": fps,
        "sha256": hashlib.sha256(content).hexdigest(),
        "scores": json.dumps(scores, sort_keys=True),
        "member": f"{about['id']}.mp4",
    }


def _refuse(row: Mapping[str, Any], misfit: Misfit) -> Refused:
    return Refused(printable(row["file"]), misfit.reason, printable(misfit.detail), row)


def _part(row: Mapping[str, Any], window: Window) -> str:
    return f"{printable(row['file'])} {window.start:.2f}-{window.end:.2f} s"


def _misfit(videos: Videos, row: Mapping[str, Any], error: Exception) -> Misfit:
    """What an error says, without the path of the folder, which must not end up in the data."""
    if isinstance(error, VideoError):
        return Misfit(error.reason, str(error).replace(str(videos.folder / row["file"]), row["file"]))
    return Misfit("damaged", f"'{row['file']}' is no longer there; import again")
