"""Clips with too little or too much motion, by the motion vectors of FFmpeg's motion estimation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "min_displacement": 0.0005,  # mean motion of a block between two frames, as a share of the frame's height
    "max_displacement": 0.08,
}
HEIGHT = 128  # pixels; larger frames are scaled down to it, so that the search range is the same for all clips
REACH = 16  # search range in pixels, in each direction
BLOCK = 8  # pixels per side


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): `displacement`, `still` or `hectic` beyond limits."""
    return [_examine(clip, settings["min_displacement"], settings["max_displacement"]) for clip in frames]


def _examine(clip: np.ndarray, least: float, most: float) -> Finding:
    displacement = float(np.mean([np.hypot(*vectors.T).mean() for vectors in motion_vectors(clip)] or [0.0]))
    scores = {"displacement": round(displacement, 5)}
    if len(clip) > 1 and displacement < least:
        return Finding(scores, "still", f"blocks move by {displacement:.3%} of the height between two frames")
    if displacement > most:
        return Finding(scores, "hectic", f"blocks move by {displacement:.1%} of the height between two frames")
    return Finding(scores)


def motion_vectors(clip: np.ndarray) -> Iterator[np.ndarray]:
    """Motion of the blocks since the previous frame, for each frame but the first and the last.

    (blocks, 2): x and y as shares of the frame's height, by FFmpeg's filter `mestimate` (EPZS) on brightness.
    """
    import av
    from av.video.reformatter import VideoReformatter

    _, height, width, _ = clip.shape
    tall = min(height, HEIGHT)
    wide = max(BLOCK, round(width * tall / height))
    graph = av.filter.Graph()
    source = graph.add("buffer", f"video_size={wide}x{tall}:pix_fmt=gray:time_base=1/1:pixel_aspect=1/1")
    estimate = graph.add("mestimate", f"method=epzs:mb_size={BLOCK}:search_param={REACH}")
    sink = graph.add("buffersink")
    source.link_to(estimate)
    estimate.link_to(sink)
    graph.configure()
    reformatter = VideoReformatter()  # one for all frames: setting it up takes longer than using it
    for number, frame in enumerate(clip):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = reformatter.reformat(picture, width=wide, height=tall, format="gray", interpolation="AREA")
        picture.pts = number
        source.push(picture)
        if number < 2:  # the filter needs the next frame, and the first frame has no previous one
            if number:
                sink.pull()
            continue
        found = sink.pull().side_data.get("MOTION_VECTORS")
        if found is not None:
            vectors = found.to_ndarray()
            vectors = vectors[vectors["source"] < 0]  # from the previous frame; those from the next frame repeat them
            moved = (vectors["dst_x"] - vectors["src_x"], vectors["dst_y"] - vectors["src_y"])
            yield np.stack(moved, axis=1) / tall
