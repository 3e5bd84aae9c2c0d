"""The scenes of a video: its parts between cuts, found by PySceneDetect's `AdaptiveDetector`.

That detector compares the change between two frames with the changes around it, so a fast camera is no cut. Fades and
dissolves have no frame with a large change, and aren't found. The frames come from our own decoder, so that limits,
hidden frames and the times of frames are those of the clips; PySceneDetect opens no file.
"""

from pathlib import Path

from components.clips.windows import Scene

SIDE = 256  # pixels of a frame's longer side: PySceneDetect scales to this width by default, too


def find_scenes(source: bytes | Path, end: float, threshold: float) -> list[Scene]:
    """The scenes of a video of `end` seconds; the whole video is decoded.

    threshold: how many times the mean change around it a cut's change is, at least. Raises as `read_video` does.
    """
    starts = [0.0, *find_cuts(source, threshold)]
    return [Scene(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True) if stop > start]


def find_cuts(source: bytes | Path, threshold: float) -> list[float]:
    """The times of the first frames after cuts, in seconds from the first frame; raises as `read_video` does."""
    import cv2
    from scenedetect.common import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    from univigu.video import small_frames

    cv2.setNumThreads(1)  # several videos are read at a time
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)
    times: list[float] = []
    cuts: list[float] = []
    for time, frame in small_frames(source, SIDE):
        times.append(time)
        number = FrameTimecode(len(times) - 1, fps=25.0)  # a frame's number; our times are exact where rates vary
        cuts += [times[cut.frame_num] for cut in detector.process_frame(number, frame[..., ::-1])]
    return cuts
