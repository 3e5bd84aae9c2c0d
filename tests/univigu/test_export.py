"""Writing the frames of an output as a video file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from univigu import export_to_video
from univigu.errors import BadInputError
from univigu.video import decode_mp4

FRAMES = np.linspace(0, 1, 5 * 32 * 48 * 3, dtype=np.float32).reshape(5, 32, 48, 3)
UINT8 = (FRAMES * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    "frames", [FRAMES, UINT8, torch.from_numpy(FRAMES).movedim(-1, 1), [Image.fromarray(one) for one in UINT8]]
)
def test_frames_of_every_output_type_become_a_video(frames, tmp_path):
    path = export_to_video(frames, tmp_path / "video.mp4", fps=8)
    read, fps = decode_mp4(tmp_path / "video.mp4")
    assert (path, read.shape, fps) == (str(tmp_path / "video.mp4"), UINT8.shape, 8)
    assert np.abs(read.astype(int) - UINT8).mean() < 4


def test_a_path_is_made_where_none_is_given_and_odd_sizes_work():
    path = export_to_video(UINT8[:, :31, :47])
    assert decode_mp4(Path(path).read_bytes())[0].shape == (5, 31, 47, 3)


def test_what_is_no_video_is_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"ends in \.mp4"):
        export_to_video(FRAMES, tmp_path / "video.avi")
    with pytest.raises(BadInputError, match="decode it"):
        export_to_video(torch.zeros(16, 3, 8, 8, 2), tmp_path / "video.mp4")
