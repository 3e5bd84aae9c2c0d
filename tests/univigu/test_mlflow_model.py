"""What the served model takes for a video: files and base64, within bounds, and one sentence for anything else."""

import base64
import struct

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from univigu import mlflow_model
from univigu.registry import load_pipeline
from univigu.video import encode_mp4, fit_frames, read_video


@pytest.fixture(scope="module")
def model(speaking_model):
    model = mlflow_model.UniViGUModel()
    model.pipeline = load_pipeline(speaking_model)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def in_base64(content):
    return base64.b64encode(content).decode()


def test_a_video_is_captioned_from_a_path_and_from_base64_as_by_the_pipeline(model, tmp_path):
    rng = np.random.default_rng(0)
    content = encode_mp4(rng.integers(0, 256, (40, 96, 54, 3), dtype=np.uint8), 8)
    (tmp_path / "clip.mp4").write_bytes(content)
    said = [
        model.predict(None, pd.DataFrame({"video": [value]}), {"seed": 3})["caption"][0]
        for value in (str(tmp_path / "clip.mp4"), in_base64(content), "data:video/mp4;base64," + in_base64(content))
    ]
    frames, _ = read_video(content, model.pipeline.config.num_frames)
    assert said == model.pipeline.caption(frames, seed=3) * 3
    np.testing.assert_array_equal(fit_frames(fit_frames(frames, 9, 32, 32), 9, 32, 32), fit_frames(frames, 9, 32, 32))


def gif(side, frames):
    """A GIF that claims a large canvas, and changes one pixel of it a frame."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c" + struct.pack("<4H", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HH", side, side) + b"\xf0\0\0" + bytes(6) + frame * frames + b";"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (in_base64(gif(16_000, 1)), "larger than the .* pixels that are read"),
        (in_base64(gif(1000, 40)), "more pixels in all of them, than are read of one file"),
        ("x" * 4100, "not possible to read the video"),
        ("/no/such/video.mp4", "no video file '/no/such/video.mp4'"),
        ("a" * 300 + "!", "no video file"),
        ("clip\0.mp4", "no video file"),
        (in_base64(encode_mp4(np.zeros((1, 32, 32, 3), np.uint8), 8)), "single frame"),
    ],
    ids=["canvas", "canvases", "noise", "path", "long name", "nul", "one frame"],
)
def test_what_can_not_be_read_within_bounds_is_refused_in_one_sentence(model, monkeypatch, value, message):
    monkeypatch.setattr(mlflow_model, "SERVED_PIXELS", 20_000_000)
    with pytest.raises(MlflowException, match=message) as error:
        model.predict(None, pd.DataFrame({"video": [value]}))
    assert error.value.get_http_status_code() == 400


def test_a_body_that_is_too_large_is_refused_before_it_is_decoded(model, monkeypatch):
    monkeypatch.setattr(mlflow_model, "SERVED_BYTES", 3000)
    with pytest.raises(MlflowException, match="more than 0 MiB; send a shorter or smaller one"):
        model.predict(None, pd.DataFrame({"video": ["A" * 4001]}))
