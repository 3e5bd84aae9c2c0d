"""Writing the frames of an output as a video file, with what the library itself needs installed."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import BadInputError
from .inputs import as_frames
from .video import encode_mp4


def export_to_video(video_frames: Any, output_video_path: str | Path | None = None, fps: float = 16) -> str:
    """Write one video of an output as mp4 (H.264), and return its path; a temporary one if none is given.

    ``video_frames`` is ``output.frames[i]`` of any output type but latents: an array (F, H, W, 3), a tensor
    (F, 3, H, W), or a list of images. This is diffusers' function of that name, without its need for OpenCV or
    imageio. Raises BadInputError for anything else, and for a path that doesn't end in .mp4.
    """
    if isinstance(video_frames, Tensor) and video_frames.ndim == 4 and video_frames.shape[1] == 3:
        video_frames = video_frames.movedim(1, -1)
    frames = as_frames(video_frames)
    if output_video_path is None:
        with tempfile.NamedTemporaryFile(suffix=".mp4", delete=False) as file:
            output_video_path = file.name
    path = Path(output_video_path)
    if path.suffix.lower() != ".mp4":
        raise BadInputError(f"{path} is not an mp4 file: give a path that ends in .mp4.")
    # players expect half the colour resolution, which needs even sizes
    even = frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    path.write_bytes(encode_mp4(frames, fps, "yuv420p" if even else "yuv444p"))
    return str(path)
