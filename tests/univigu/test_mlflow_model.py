"""The input of the served model: files and base64 within limits, and one sentence for anything else."""

import base64
import contextlib
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
    captions = [
        model.predict(None, pd.DataFrame({"video": [value]}), {"seed": 3})["caption"][0]
        for value in (str(tmp_path / "clip.mp4"), in_base64(content), "data:video/mp4;base64," + in_base64(content))
    ]
    frames, _ = read_video(content, model.pipeline.config.num_frames)
    assert captions == model.pipeline.caption(frames, seed=3) * 3
    np.testing.assert_array_equal(fit_frames(fit_frames(frames, 9, 32, 32), 9, 32, 32), fit_frames(frames, 9, 32, 32))


def gif(side, frames):
    """A GIF with a large canvas, of which each frame changes one pixel."""
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
def test_a_video_beyond_the_limits_is_refused_in_one_sentence(model, monkeypatch, value, message):
    monkeypatch.setattr(mlflow_model, "SERVED_PIXELS", 20_000_000)
    with pytest.raises(MlflowException, match=message) as error:
        model.predict(None, pd.DataFrame({"video": [value]}))
    assert error.value.get_http_status_code() == 400


def test_a_large_body_is_refused_before_it_is_decoded(model, monkeypatch):
    monkeypatch.setattr(mlflow_model, "SERVED_BYTES", 3000)
    with pytest.raises(MlflowException, match="more than 0 MiB; send a shorter or smaller one"):
        model.predict(None, pd.DataFrame({"video": ["A" * 4001]}))


@pytest.mark.parametrize(
    ("rows", "params", "message"),
    [
        ({"prompt": ["a"] * 65}, {"task": "generate"}, "65 rows, more than 64"),
        ({"video": ["a"] * 65}, {}, "65 rows, more than 64"),
        ({"prompt": ["a " * 5001]}, {"task": "joint"}, "10002 characters, more than 10000"),
        ({"prompt": ["a"]}, {"task": "generate", "steps": 1001}, "1001 steps are more than the limit of 1000"),
        ({"prompt": ["a"]}, {"task": "generate", "steps": -1}, "steps"),
        ({"prompt": ["a"]}, {"task": "generate", "seed": 2**63 - 1}, "seed 9223372036854775807 is larger than"),
        ({"prompt": ["a"]}, {"task": "generate", "guidance": float("inf")}, "guidance is inf"),
        ({"prompt": ["a"]}, {"task": "joint", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": [None]}, {"task": "joint"}, "needs a text in the column 'prompt'"),
        ({"video": [7]}, {}, "needs a text in the column 'video'"),
        ({"prompt": ["a"]}, {"task": "x" * 10**6}, "no task 'x{40}'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_request_beyond_the_limits_is_refused_in_one_sentence(model, rows, params, message):
    with pytest.raises(MlflowException, match=message) as error:
        model.predict(None, pd.DataFrame(rows), params)
    assert error.value.get_http_status_code() == 400
    assert len(error.value.message) < 400


def test_a_server_reads_only_files_in_its_folder(model, tmp_path, monkeypatch):
    inside, outside = tmp_path / "videos/clip.mp4", tmp_path / "private.mp4"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(encode_mp4(np.zeros((9, 32, 32, 3), np.uint8), 8))
    (inside.parent / "link.mp4").symlink_to(outside)
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")

    def is_read(path):
        with contextlib.suppress(MlflowException):
            return bool(model.predict(None, pd.DataFrame({"video": [str(path)]}))["caption"][0])

    assert not is_read(inside)
    monkeypatch.setenv("UNIVIGU_VIDEO_FOLDER", str(inside.parent))
    assert is_read(inside)
    for path in (outside, inside.parent / "../private.mp4", inside.parent / "link.mp4", tmp_path / "none.mp4"):
        assert not is_read(path)
