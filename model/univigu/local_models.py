"""Third-party models in transformers' layout, from local folders: safetensors only, and no remote code."""

import json
from pathlib import Path

from univigu.errors import BadInputError

# Arguments of every `from_pretrained`. Without `trust_remote_code=False`, transformers asks the user whether to run the
# code in a folder.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
WEIGHTS = {**LOCAL, "use_safetensors": True}
_INDEX = "model.safetensors.index.json"
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def require_safetensors(folder: Path) -> None:
    """Raise `BadInputError` where loading the model in `folder` would unpickle a file or read another folder."""
    if (folder / "adapter_config.json").is_file():
        raise BadInputError(f"The model at {folder} can't be read: it is an adapter of another; merge the two first.")
    if (folder / _INDEX).is_file():
        for name in _indexed(folder / _INDEX):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BadInputError(
                    f"The model at {folder} can't be read: its index lists '{name}', which is no safetensors file "
                    "beside it; save the model there again."
                )
    elif not (folder / "model.safetensors").is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        found = (
            f"{pickled[0]} and no model.safetensors, and nothing is unpickled" if pickled else "no model.safetensors"
        )
        raise BadInputError(
            f"The model at {folder} can't be read: it holds {found}; save it there again with `save_pretrained`."
        )


def _indexed(index: Path) -> list[str]:
    """The files that an index of weights lists."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInputError(f"{index} is damaged; save the model there again.") from error
