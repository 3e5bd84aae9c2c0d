"""The registered model as code: MLflow runs this file to make the model that `mlflow.pyfunc.load_model` returns.

It travels with the registered version, and the library beside it, so it needs nothing but what the version requires.
A row has a `video` (a file's path, or an mp4 in base64) or a `prompt`, and params choose the task: see
`registry.signature`.
"""

import base64
import binascii
import os
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

SERVED_PIXELS = 2 * 10**10  # of a video's frames together: five minutes of 1920x1080 at 30 a second
SERVED_BYTES = 512 << 20  # of a video in base64


class UniViGUModel(PythonModel):
    """caption: `video` -> `caption`; generate: `prompt` -> `video`; joint: `prompt` (may be empty) -> both."""

    def load_context(self, context) -> None:  # MLflow asks for these very names
        from univigu.registry import load_pipeline

        self.pipeline = load_pipeline(context.artifacts["pipeline"])
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, context, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One output row an input row, with the same index; the row at position i draws from the seed + i.

        Raises MLflow's own exception for what makes no sense: of any other, its server shows callers a stack trace.
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
            raise BadInputError(f"There is no task '{task}'; choose one of {', '.join(tasks)}.")
        settings = {
            # 0 steps and negative numbers stand for the model's own: MLflow's parameters can't be left open
            "num_inference_steps": params.get("steps") or None,
            "guidance_scale": _unless_negative(params.get("guidance", -1.0)),
            "seed": int(params.get("seed", 0)),
        }
        if task != "generate":  # which writes no words
            settings["temperature"] = _unless_negative(params.get("temperature", -1.0))
        return pd.DataFrame(tasks[task](model_input, settings), index=model_input.index)

    def _caption(self, rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, list[str]]:
        videos = [self._read(value) for value in _column(rows, "video", "caption")]
        return {"caption": self.pipeline.caption(videos, **settings) if videos else []}

    def _read(self, value: str):
        """A row's video as the model takes it, which is all of it that stays in memory."""
        from univigu.video import fit_frames, read_video

        config = self.pipeline.config
        frames, _ = read_video(_video(value), config.num_frames, SERVED_PIXELS)
        return fit_frames(frames, config.num_frames, config.height, config.width) if len(frames) > 1 else frames

    def _generate(self, rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, list[str]]:
        prompts = _column(rows, "prompt", "generate")
        return {"video": [self._mp4(frames) for frames in self.pipeline.generate(prompts, **settings)]}

    def _joint(self, rows: pd.DataFrame, settings: dict[str, Any]) -> dict[str, list[str]]:
        videos, captions = self.pipeline.joint(_column(rows, "prompt", "joint"), **settings)
        return {"caption": captions, "video": [self._mp4(frames) for frames in videos]}

    def _mp4(self, frames) -> str:
        from univigu.video import encode_mp4

        return base64.b64encode(encode_mp4(frames, self.pipeline.config.fps, "yuv420p")).decode("ascii")


def _unless_negative(value: float) -> float | None:
    return value if value >= 0 else None


def _column(rows: pd.DataFrame, name: str, task: str) -> list[str]:
    from univigu.errors import BadInputError

    if name not in rows or not all(isinstance(value, str) for value in rows[name]):
        raise BadInputError(f"The task '{task}' needs a text in the column '{name}' of each row; add it.")
    return list(rows[name])


def _video(value: str) -> Path | bytes:
    """A row's video: the path of a file, or else its bytes from base64 (a data URL will do)."""
    from univigu.errors import MissingInputError, VideoError

    if len(value) > SERVED_BYTES * 4 // 3:
        raise VideoError(f"A video has more than {SERVED_BYTES >> 20} MiB; send a shorter or smaller one.", "too_large")

    if len(value) < 4096 and os.path.isfile(value):  # which, unlike Path's, is False for what is no name at all
        return Path(value)
    try:
        return base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MissingInputError(
            f"There is no video file '{value[:80]}', and it is no base64 either; give one of the two."
        ) from error


set_model(UniViGUModel())
