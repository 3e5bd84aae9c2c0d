"""Uni-ViGU: one diffusion transformer for video generation, video understanding, and both jointly."""

from importlib import import_module

__version__ = "0.2.0"
_EXPORTS = {
    "UniViGUPipeline": "univigu.pipeline",
    "UniViGUPipelineOutput": "univigu.outputs",
    "export_to_video": "univigu.export",
    "UniViGUTransformer3DModel": "univigu.transformer",
    "TextSpace": "univigu.text_space",
    "ObjectiveConfig": "univigu.tasks",
    "TrainingObjective": "univigu.objective",
}
# pyrefly: ignore[unresolvable-dunder-all]
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    # torch takes seconds to import, so a name loads its module only when it is asked for
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
