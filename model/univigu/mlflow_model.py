"""The registered model as code: MLflow runs this file to create the model that `mlflow.pyfunc.load_model` returns.

It is part of the registered version, together with the library, so it needs nothing but the version's requirements.
A row has a `video` (an mp4 in base64, or a file's path) or a `prompt`; params select the task, see
`registration.signature`. The size of a request is checked before anything is decoded or tokenized. Behind MLflow's
server, paths are accepted only in the folder UNIVIGU_VIDEO_FOLDER, if that is set: callers must not choose which files
a server reads.
"""

import base64
import binascii
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

SERVED_PIXELS = 2 * 10**10  # in all frames of a video: five minutes of 1920x1080 at 30 frames per second
SERVED_BYTES = 512 << 20  # of a video in base64
SERVED_ROWS = 64  # of a request, which are all in memory at once
AT_ONCE = 8  # rows that are sampled together
SERVED_CHARACTERS = 10_000  # of a prompt
SERVED_STEPS = 1000
LARGEST_SEED = 2**62  # the sum of seed and row number must fit into 64 bits
LARGEST_SCALE = 1000.0  # guidance, temperature
VIDEO_FOLDER = "UNIVIGU_VIDEO_FOLDER"
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # MLflow's server sets it


class UniViGUModel(PythonModel):
    """caption: `video` -> `caption`; generate: `prompt` -> `video`; joint: `prompt` (may be empty) -> both."""

    def load_context(self, context: Any) -> None:  # the method's name and arguments are MLflow's
        from univigu.registry import load_pipeline

        self.pipeline = load_pipeline(context.artifacts["pipeline"])
        self.pipeline.set_progress_bar_config(disable=True)

    # pyrefly: ignore[bad-override]
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One output row per input row, with the same index; the row at position i has the seed ``seed + i``.

        Raises MLflow's own exception for invalid input: for any other, its server shows callers a stack trace.
        """
        from univigu.errors import UniViGUError

        try:
            return self._predict(model_input, params or {})
        except UniViGUError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error

    def _predict(self, model_input: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        from univigu.errors import BadInputError

        task = params.get("task", "caption")
        tasks = {"caption": self._caption, "generate": self._generate, "joint": self._joint}
        if task not in tasks:
            raise BadInputError(f"There is no task '{str(task)[:40]}'; use one of {', '.join(tasks)}.")
        if len(model_input) > SERVED_ROWS:
            raise BadInputError(
                f"The request has {len(model_input)} rows, more than {SERVED_ROWS}; send fewer at a time."
            )
        settings = _settings(params)
        if task != "generate":  # the temperature applies to text
            settings["temperature"] = _unless_negative("temperature", params)
        return pd.DataFrame(tasks[task](model_input, settings), index=model_input.index)

    def _caption(self, rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, list[str]]:
        videos = [self._read(value) for value in _column(rows, "video", "caption")]
        return {"caption": self.pipeline.caption(videos, **settings, batch_size=AT_ONCE) if videos else []}

    def _read(self, value: str) -> np.ndarray:
        """A row's video with the model's number and size of frames, so that no more of it stays in memory."""
        from univigu.video import fit_frames, read_video

        config = self.pipeline.config
        frames, _ = read_video(_video(value), config.num_frames, SERVED_PIXELS)
        return fit_frames(frames, config.num_frames, config.height, config.width) if len(frames) > 1 else frames

    def _generate(self, rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, list[str]]:
        prompts = _prompts(rows, "generate")
        return {
            "video": [self._mp4(frames) for frames in self.pipeline.generate(prompts, **settings, batch_size=AT_ONCE)]
        }

    def _joint(self, rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, list[str]]:
        given = {"batch_size": AT_ONCE, "output_type": "uint8", "return_dict": False}
        videos, captions = self.pipeline.joint(_prompts(rows, "joint"), **settings, **given)
        return {"caption": captions, "video": [self._mp4(frames) for frames in videos]}

    def _mp4(self, frames: np.ndarray) -> str:
        from univigu.video import encode_mp4

        return base64.b64encode(encode_mp4(frames, self.pipeline.config.fps, "yuv420p")).decode("ascii")


def _settings(params: dict[str, Any]) -> dict[str, Any]:
    """The settings of every task; 0 steps and -1 select the model's own, because MLflow's params can't be optional."""
    from univigu.errors import BadInputError

    steps, seed = int(params.get("steps", 0)), int(params.get("seed", 0))
    if steps > SERVED_STEPS:
        raise BadInputError(f"{steps} steps are more than the limit of {SERVED_STEPS}; use fewer.")
    if abs(seed) > LARGEST_SEED:
        raise BadInputError(f"The seed {seed} is larger than {LARGEST_SEED}; use a smaller one.")
    guidance = _unless_negative("guidance", params)
    return {"num_inference_steps": steps or None, "guidance_scale": guidance, "seed": seed}


def _unless_negative(name: str, params: dict[str, Any]) -> float | None:
    from univigu.errors import BadInputError

    value = float(params.get(name, -1.0))
    if math.isnan(value) or value > LARGEST_SCALE:
        raise BadInputError(f"The {name} is {value}; give a number up to {LARGEST_SCALE}, or -1 for the model's own.")
    return value if value >= 0 else None


def _prompts(rows: pd.DataFrame, task: str) -> list[str]:
    from univigu.errors import BadInputError

    prompts = _column(rows, "prompt", task)
    for text in prompts:
        if len(text) > SERVED_CHARACTERS:
            raise BadInputError(f"A prompt has {len(text)} characters, more than {SERVED_CHARACTERS}; shorten it.")
    return prompts


def _column(rows: pd.DataFrame, name: str, task: str) -> list[str]:
    from univigu.errors import BadInputError

    if name not in rows or not all(isinstance(value, str) for value in rows[name]):
        raise BadInputError(f"The task '{task}' needs a text in the column '{name}' of every row; add it.")
    return list(rows[name])


def _video(value: str) -> Path | bytes:
    """A row's video: the path of a file that may be read, or its bytes, decoded from base64 or a data URL."""
    from univigu.errors import MissingInputError, VideoError

    if len(value) > SERVED_BYTES * 4 // 3:
        raise VideoError(f"A video has more than {SERVED_BYTES >> 20} MiB; send a shorter or smaller one.", "too_large")

    if len(value) < 4096 and _may_read(value) and os.path.isfile(value):  # False for an invalid path
        return Path(value)
    try:
        return base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MissingInputError(
            f"There is no video file '{value[:80]}' that may be read here, and it is not base64 either; give one of "
            f"the two (a server reads files only in its {VIDEO_FOLDER})."
        ) from error


def _may_read(path: str) -> bool:
    """Whether a caller may name this file: any file from Python, only those in `VIDEO_FOLDER` over HTTP."""
    folder = os.environ.get(VIDEO_FOLDER)
    if not folder:
        return os.environ.get(_SERVING) != "true"
    try:
        return Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, ValueError, RuntimeError):  # an invalid path, or circular links
        return False


set_model(UniViGUModel())
