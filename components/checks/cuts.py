"""Clips with a cut: one scene follows another, as PySceneDetect's `AdaptiveDetector` finds it.

That detector compares the change between two frames with the changes around it, so a fast camera is no cut. Fades and
dissolves have no frame with a large change, and aren't found; nor is a cut within two frames of the start or the end.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from components.checks import Finding

DEFAULTS = {
    "threshold": 3.0,  # a cut's change is this many times as large as the changes around it
    "max_cuts": 0,
}
SIDE = 256  # pixels of a frame's longer side, about: PySceneDetect scales to this width by default, too


def check(frames: np.ndarray, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Finding]:
    """The finding for each clip of frames uint8 (B, F, H, W, 3): the number of `cuts`, also the reason if too many."""
    return [_examine(clip, settings["threshold"], settings["max_cuts"]) for clip in frames]


def _examine(clip: np.ndarray, threshold: float, most: int) -> Finding:
    step = max(1, max(clip.shape[1:3]) // SIDE)
    found = list(find_cuts(clip[:, ::step, ::step], threshold))
    scores = {"cuts": len(found)}
    if len(found) > most:
        return Finding(scores, "cuts", f"another scene begins at frame {', '.join(map(str, found))}")
    return Finding(scores)


def find_cuts(frames: Iterable[np.ndarray], threshold: float) -> Iterator[int]:
    """The numbers of the first frames after cuts; frames uint8 (H, W, 3)."""
    import cv2
    from scenedetect.common import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    cv2.setNumThreads(1)  # several videos are read at a time
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)
    for number, frame in enumerate(frames):
        at = FrameTimecode(number, fps=25.0)
        yield from (cut.frame_num for cut in detector.process_frame(at, np.ascontiguousarray(frame[..., ::-1])))
