"""The registered model as code: MLflow runs this file to make the model that `mlflow.pyfunc.load_model` returns.

It travels with the registered version, and the library beside it, so it needs nothing but what the version requires.
A row has a `video` (a file's path, or an mp4 in base64) or a `prompt`, and params choose the task: see
`registry.signature`.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel


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
        from univigu.video import read_video

        limit = self.pipeline.config.num_frames
        videos = [read_video(_video(value), max_frames=limit)[0] for value in _column(rows, "video", "caption")]
        return {"caption": self.pipeline.caption(videos, **settings) if videos else []}

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
    from univigu.errors import MissingInputError

    if len(value) < 4096 and Path(value).is_file():
        return Path(value)
    try:
        return base64.b64decode(value.partition(";base64,")[2] or value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MissingInputError(
            f"There is no video file '{value[:80]}', and it is no base64 either; give one of the two."
        ) from error


set_model(UniViGUModel())
