"""Which model `univigu caption`, `generate` and `joint` use: a given one, the champion, or the bundled one."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli.known_folders import known_folder
from components.cli.messages import say
from components.pipeline.lean_imports import import_models, without
from components.pipeline.progress import activity, progress
from univigu.errors import MissingInputError

if TYPE_CHECKING:
    from univigu.pipeline import UniViGUPipeline

NAME = "uni-vigu"
BUNDLED = Path("model/tiny-univigu")
CLONE = Path(__file__).resolve().parents[2]
ROOM = 1.25  # memory for the weights and a sample over that of the weights; `univigu plan --task` counts it exactly


def find_model(model: str, name: str, root: Path) -> Path:
    """The folder of the model to use.

    model: a folder or a link to one, a hub repository's ``owner/name``, a ``models:/`` address, or "" for the champion
    of `name`. A hub repository is fetched only with HF_HUB_OFFLINE=0; otherwise its download must be there. Where
    `name` is the default one and has no champion, the bundled model is used, and the command says so. Raises
    `MissingInputError` where there is none.
    """
    if model and not model.startswith("models:/"):
        return Path(model) if Path(model).is_dir() else _from_hub(model)
    if model:
        return _registered(model, root)
    try:
        return _registered(f"models:/{name}@champion", root)
    except MissingInputError:
        bundled = find_bundled(root)
        if name != NAME or bundled is None or find_champion(name, root):
            raise
    say(f"Using the bundled model {bundled}; `make demo` trains your own.")
    return bundled


def find_bundled(root: Path) -> Path | None:
    """The folder of the bundled model, in the work root or else in the clone of this command; None without one."""
    places = (root / BUNDLED, CLONE / BUNDLED)
    return next((place for place in places if (place / "model_index.json").is_file()), None)


def _from_hub(model: str) -> Path:
    """The download of a hub repository, fetched first if the environment allows it."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise MissingInputError(f"There is no model folder '{model}'; check the path, or omit --model.")
    fetched = os.environ.get("HF_HUB_OFFLINE") == "0"
    if fetched:
        say(f"Fetching what is missing of {model} from the hub.")
    from univigu.wan import local_folder

    try:
        return local_folder(model, local_files_only=not fetched)
    except MissingInputError as error:
        if fetched:
            raise
        raise MissingInputError(
            f"There is no model folder '{model}', and no download of a hub repository of that name; check the path, or "
            "set HF_HUB_OFFLINE=0 to fetch it from the hub."
        ) from error


def _registered(address: str, root: Path) -> Path:
    from components.tracking import store_to_read

    store = store_to_read(root, "a model's folder with --model")

    def look_up() -> Path:
        with activity("Reading the registry"), without("scipy"):  # which MLflow imports where it is installed
            from univigu.registry import pipeline_folder

            return pipeline_folder(address, store)

    return known_folder(address, store, root, look_up)


def find_champion(name: str, root: Path) -> int:
    """The number of the version of `name` that is champion; 0 for none."""
    from components.tracking import existing_store

    try:
        store = existing_store(root)
    except MissingInputError:
        return 0
    from univigu.registry import CHAMPION, version_at

    found = version_at(name, CHAMPION, store)
    return int(found.version) if found else 0


def load(folder: Path, adapters: bool = False) -> "UniViGUPipeline":
    """The pipeline in a folder, on the GPU if there is one; it shows the progress of sampling.

    adapters: whether LoRA adapters will be added to it.
    """
    with activity("Loading the model"):
        pipeline = read(folder, adapters)
    place(pipeline)
    pipeline.progress_bar = lambda steps: progress(steps, "sampling", unit="steps")
    return pipeline


def read(folder: Path, adapters: bool = False) -> "UniViGUPipeline":
    """The pipeline in a folder, on the CPU; adapters: as for `load`."""
    adapters = adapters or any(folder.glob("*lora*"))
    with without(*([] if adapters else ["peft"])):
        import_models()
        from univigu.pipeline import UniViGUPipeline

        return UniViGUPipeline.from_pretrained(folder)


def place(pipeline: "UniViGUPipeline") -> None:
    """Move a pipeline to the GPU, if there is one.

    If it has too little free memory for all parts, each is there only while it runs: the text encoder, which is larger
    than the smaller Wan, gives way before sampling begins.
    """
    import torch

    if torch.cuda.is_available():
        _move_to_gpu(pipeline, torch.cuda.mem_get_info()[0])


def remove_from_gpu(pipeline: "UniViGUPipeline") -> None:
    """Move a pipeline back to the CPU, so that another one has its place on the GPU."""
    import torch

    if torch.cuda.is_available():
        pipeline.remove_all_hooks()
        pipeline.to("cpu")
        torch.cuda.empty_cache()


def _move_to_gpu(pipeline: "UniViGUPipeline", free: int) -> None:
    if fits(pipeline, free):
        pipeline.to("cuda")
        return
    say("The GPU is too small for all parts of the model at a time, so each is moved there when it runs.")
    pipeline.enable_model_cpu_offload()


def fits(pipeline: "UniViGUPipeline", free: int) -> bool:
    """Whether all parts of a pipeline, and a sample, fit into `free` bytes."""
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    weights = (weight for part in parts if part is not None for weight in part.parameters())
    return ROOM * sum(weight.numel() * weight.element_size() for weight in weights) <= free
