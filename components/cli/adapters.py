"""LoRA adapters for a call of a trained model: those of the work root, and one that is added for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from univigu.errors import BadInputError

if TYPE_CHECKING:
    from univigu.pipeline import UniViGUPipeline

FOLDER = "loras"  # of the work root
SUFFIX = ".safetensors"
_NAME = "chosen"


def list_adapters(root: Path) -> list[str]:
    """The names of the files in the work root's folder of adapters."""
    folder = root / FOLDER
    return sorted(path.name for path in folder.glob(f"*{SUFFIX}") if path.is_file()) if folder.is_dir() else []


def find_adapter(root: Path, name: str) -> Path:
    """The file of an adapter that `list_adapters` named; raises `BadInputError` if it isn't there."""
    if name not in list_adapters(root):
        raise BadInputError(f"There is no LoRA '{name}' in {root / FOLDER}; put the file there, or choose another.")
    return root / FOLDER / name


def check_adapter(path: Path | None) -> None:
    """Raise `BadInputError` if there is no such file; nothing of it is read."""
    if path is not None and not (path.is_file() and path.suffix == SUFFIX):
        raise BadInputError(f"There is no LoRA file '{path}'; give a {SUFFIX} file.")


@contextmanager
def adapted(pipeline: "UniViGUPipeline", path: Path | None, scale: float = 1.0) -> Iterator[None]:
    """Within the block, the pipeline has the adapter in a file, with its effect times `scale`; None adds none.

    Raises `BadInputError` if the file isn't there, or is no LoRA for the model's base.
    """
    if path is None:
        yield
        return
    check_adapter(path)
    others = list(getattr(pipeline.transformer, "peft_config", None) or ())
    try:
        # the file's folder and name: as a single path, diffusers would take it for a repository of the hub
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=_NAME)
        pipeline.set_adapters([*others, _NAME], [1.0] * len(others) + [scale])
        yield
    finally:
        if not others:
            pipeline.unload_lora_weights()
        elif _NAME in (getattr(pipeline.transformer, "peft_config", None) or ()):
            pipeline.delete_adapters(_NAME)
            pipeline.set_adapters(others)
