"""Checks of everything but the models: steps, prompts, captioner, disk, evaluation, pipeline and jobs."""

import inspect
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from components.captions.captioners import load_captioner
from components.checks import load_caption_checks, require_packages
from components.clips.gate import load_gate
from components.orchestration.train_job import Settings, build
from components.pipeline.profiles import require_longer_captions
from components.pipeline.stages import STAGES, find_stage
from components.planning.cost import plan_hours, plan_storage
from components.planning.meta_models import MetaModels
from components.planning.rehearsal.lines import Profile, Scene, ToDo
from components.prompts.sources import raw_files, read_batches
from univigu import wan
from univigu.errors import BadInputError, ConfigError, MissingInputError


def check_steps(profile: Profile) -> str:
    """Every step's function can be imported."""
    for stage in STAGES:
        module, _, function = stage.function.partition(":")
        if not callable(getattr(import_module(module), function, None)):
            raise ConfigError(f"The step '{stage.name}' names {stage.function}, which doesn't exist; fix stages.py.")
    return f"{len(STAGES)} steps and all their inputs"


def check_generator(profile: Profile, root: Path) -> str:
    """The pipeline that makes the clips, if it is here, makes them from text alone."""
    import diffusers

    folder = root / profile["generator"]
    try:
        name = str(wan.read_json(wan.config_folder(folder) / "model_index.json").get("_class_name"))
    except MissingInputError as error:
        raise ToDo(f"put the generator at {folder}, in diffusers' layout") from error
    kind = getattr(diffusers, name, None)
    known = inspect.signature(kind.__call__).parameters if isinstance(kind, type) else {}
    if "image" in known and known["image"].default is inspect.Parameter.empty:
        raise BadInputError(
            f"The generator {folder.name} is {name}, which needs an image for each clip, and the steps have prompts"
            " alone; use a text-to-video pipeline as `generator`."
        )
    return f"{folder.name}, {name}"


def describe_texts(profile: Profile) -> str:
    """Describe the token ranges. Raises `ConfigError` if a caption may be as short as a prompt."""
    text = profile["text"]
    require_longer_captions(profile)
    (_, longest), (fewest, most) = text["prompt_tokens"], text["caption_tokens"]
    return f"prompts up to {longest} of {text['prompt_length']}, captions {fewest} to {most}"


def check_captioner(profile: Profile, root: Path) -> str:
    """The captioner and all named checks exist, with their packages, and the captioner's variables are set."""
    settings = profile["caption_videos"]
    require_packages(check.module for check in load_gate(profile["synthesize_videos"]["checks"], root))
    load_caption_checks(settings["checks"])
    load_caption_checks(profile["validate_data"]["caption_checks"])
    quality = profile["validate_data"].get("caption_quality", {})
    model = quality.get("model") if quality.get("mode") in ("score", "enforce") else ""
    if model and not (root / model).is_dir():
        raise ToDo(f"put the model of 'validate_data.caption_quality' into {root / model}")
    unset = [name for name in _variables(settings) if not os.environ.get(name)]
    if unset:
        raise ToDo(f"set {' and '.join(unset)} where '{settings['captioner']}' will run")
    with tempfile.TemporaryDirectory() as answers:
        load_captioner(
            settings["captioner"], {**settings, "seed": profile["seed"], "root": root, "answers": Path(answers)}
        )
    return f"captioner '{settings['captioner']}'"


def _variables(settings: Mapping[str, Any]) -> list[str]:
    """The environment variables that a section names, under keys that end in ``_env``."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _variables(value)
        elif key.endswith("_env") and value:
            found.append(value)
    return found


def check_disk(scene: Scene, models: MetaModels) -> str:
    """The work root has enough free disk space."""
    wanted, free = plan_storage(scene.profile, models)["total"], shutil.disk_usage(scene.root).free
    if wanted > free:
        raise ToDo(f"provide {wanted / 1e9:,.0f} GB for the work root; {scene.root} has {free / 1e9:,.0f} GB free")
    return f"{wanted / 1e9:,.2g} GB of {free / 1e9:,.0f} free"


def check_evaluation(profile: Profile, root: Path) -> str:
    """The benchmark exists, and so do the files that it and its scorers read."""
    from components.evaluation.evaluate_model import load_benchmark

    settings = profile["evaluate_model"]
    load_benchmark(settings["benchmark"])
    for what, path in {"heldout": profile["heldout"], **settings["scorers"]}.items():
        if not (root / path).exists():
            raise ToDo(f"put {what} at {root / path}, where the evaluation looks for it")
    return f"benchmark '{settings['benchmark']}', scorers: {', '.join(settings['scorers']) or 'none'}"


def check_prompts(profile: Profile, root: Path) -> str:
    """There are at least as many raw prompts as clips to make (curation will remove some of them)."""
    folder, wanted = root / profile["raw_prompts"], profile["synthesize_videos"]["clips"]
    try:
        here = folder.exists() and raw_files(folder)
    except MissingInputError:
        here = False
    if not here:
        raise ToDo(f"put your prompts, as JSONL, CSV or Parquet, into {folder}")
    rows = 0
    for batch in read_batches(folder, profile["curate_prompts"]["sources"]):
        number, first = batch.rows[0]
        if not number:  # a fault of the file itself
            raise BadInputError(f"Curation would skip a file: {first.why}")
        rows += len(batch.rows)
    if rows < wanted:
        raise ToDo(f"put more prompts into {folder}: there are {rows:,} for {wanted:,} clips")
    return f"{rows:,} for {wanted:,} clips"


def check_hours(scene: Scene, models: MetaModels) -> str:
    """The long steps would end within their time limits on a cluster."""
    found = []
    for name, hours in plan_hours(scene.profile, models, scene.gpus, scene.gpu).items():
        limit = find_stage(name).resources.hours
        if hours > limit:
            raise ToDo(f"use more GPUs: {name} takes {hours:,.0f} hours on {scene.gpus} and is stopped after {limit}")
        found.append(f"{name} {hours:,.3g} of {limit}")
    return "hours: " + ", ".join(found)


def check_pipeline(root: Path) -> str:
    """The pipeline compiles to the file in infra."""
    from components.orchestration.kfp_pipeline import compile_to

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "pipeline.yaml"
        compile_to(made)
        committed = root / "infra" / "pipeline.yaml"
        if committed.is_file() and committed.read_bytes() != made.read_bytes():
            raise ConfigError("infra/pipeline.yaml doesn't match the steps; run `univigu pipeline compile`.")
        return f"{len(made.read_bytes()) // 1024} KiB of YAML"


def check_train_jobs(scene: Scene) -> str:
    """Both stages form valid TrainJobs on nodes of up to eight GPUs, without a field that the API would drop."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    nodes, each = max(1, scene.gpus // 8), min(8, scene.gpus)
    if nodes * each != scene.gpus:
        raise ConfigError(f"{scene.gpus} GPUs don't fill nodes of {each}; use a multiple of {each}.")
    for name in ("train-stage-1", "train-stage-2"):
        settings = Settings(nodes=nodes, gpus=each, claim="work")
        job = build(find_stage(name), "0" * 64, scene.name, scene.root.resolve(), settings)
        # pyrefly: ignore[missing-attribute]
        if TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job:
            raise ConfigError(f"The TrainJob of '{name}' has a field that the API doesn't know; fix train_job.py.")
    return f"2, on {nodes} node{'s' * (nodes > 1)} of {each} GPUs"
