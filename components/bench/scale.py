"""Does Wan at its real size fit? Peak memory of one GPU, counted on meta tensors at real shapes; nothing is timed.

Each cell is a profile of Wan2.1 at a size of clip, on a number of GPUs that train together. It has the GiB of a
training step, of the held-out losses (``evaluation``), and of the captions and videos that a run shows (``caption``,
``generate``), all with the run's weights and optimizer state beside them, as `univigu plan` and the check before each
training count them. A cell ``fits`` if the largest leaves `SPARE` of `BUDGET_GIB` free, which is what 80 GB GPUs have
for tensors. Where a clip is too large for that, more and more GPUs share its tokens (`sequence_parallel`, one of
`SHARING`), until it fits. The batch has at least one sample per GPU, or per group of GPUs that share: `batch_size` is
raised where the profile's has fewer.

Wan2.1 I2V is counted with the settings of `wan-14b`: a model starts from it in code of one's own, not in a profile.

``alone`` is one sample of the trained model on one GPU: all models resident, and with each in CPU memory while another
runs. ``profiles`` states for each profile that the project ships, at its own size, on which numbers of GPUs it fits;
``without_base`` names those whose base isn't here. `ratio` is the largest peak of a shipped profile, on the most GPUs,
over what it may need.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BUDGET_GIB, SPARE = 74.0, 0.1
GPUS = (8, 16, 64)
SHARING = (1, 2, 4, 8)
MODELS = {  # profile and base, where it is not the profile's own
    "wan-1.3b": ("wan-1.3b", None),
    "wan-5b": ("wan-5b", None),
    "wan-14b": ("wan-14b", None),
    "wan-14b, I2V": ("wan-14b", "model/Wan2.1-I2V-14B-480P-Diffusers"),
}
SIZES = {"480p": (480, 832), "720p": (720, 1280)}  # height, width
UNITS = {"wan-5b": 32}  # pixels of a patch, where they aren't 16
ROOT = Path(__file__).resolve().parents[2]


def measure() -> dict[str, Any]:
    from components.pipeline.profiles import load_profile, profile_names

    cells, alone = [], []
    for model, (name, base) in MODELS.items():
        for size, sides in SIZES.items():
            profile = load_profile(name)
            profile["base"] = base or profile["base"]
            unit = UNITS.get(model, 16)
            height, width = (side // unit * unit for side in sides)
            profile["video"] = {**profile["video"], "height": height, "width": width}
            cells += [{"model": model, "size": size, **count(profile, gpus)} for gpus in GPUS]
            alone += [{"model": model, "size": size, **count_alone(profile, task)} for task in ("caption", "generate")]
    known, without_base = profiles_with_base(profile_names())
    shipped = {name: {gpus: count(load_profile(name), gpus) for gpus in GPUS} for name in known}
    profiles = {
        name: {"fits_on": [gpus for gpus, cell in found.items() if cell["fits"]], "peak_gib": found[GPUS[-1]]["peak"]}
        for name, found in shipped.items()
    }
    return {
        "ratio": round(max(found["peak_gib"] for found in profiles.values()) / (BUDGET_GIB * (1 - SPARE)), 4),
        "budget_gib": BUDGET_GIB,
        "spare": SPARE,
        "profiles": profiles,
        "without_base": without_base,
        "cells": cells,
        "alone": alone,
    }


def profiles_with_base(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The profiles whose base is on this disk or has bundled configs, and the others, such as one yet to be made."""
    from components.pipeline.profiles import load_profile
    from univigu import wan
    from univigu.errors import MissingInputError

    found: tuple[list[str], list[str]] = ([], [])
    for name in names:
        try:
            wan.config_folder(ROOT / load_profile(name)["base"])
        except MissingInputError:
            found[1].append(name)
        else:
            found[0].append(name)
    return found


def count(profile: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """The first of `SHARING` with which a run on so many GPUs fits, or the last that divides the model's heads."""
    from components.planning.meta_models import build_any_models
    from univigu import wan

    models = build_any_models(profile, wan.config_folder(ROOT / profile["base"]))
    heads = models.transformer.config.num_attention_heads
    found: dict[str, Any] = {}
    for sharing in SHARING:
        if heads % sharing == 0 and not found.get("fits"):
            found = count_shared(profile, models, gpus, sharing)
    return found


def count_shared(profile: Mapping[str, Any], models: Any, gpus: int, sharing: int) -> dict[str, Any]:
    """The GiB of each task on one of so many GPUs, in the costlier of the two stages, and whether the most fits."""
    from univigu.training.engine import TrainingConfig
    from univigu.training.memory_check import count_trainable, needed_by_task

    found: dict[str, float] = {}
    for number in (1, 2):
        section = {**profile[f"train_stage_{number}"], "sequence_parallel": sharing}
        groups = gpus // sharing
        section["batch_size"] = -(-max(section["batch_size"], groups) // groups) * groups
        config, shape = TrainingConfig.from_section(section, profile["seed"]), models.transformer.config
        tasks = needed_by_task(
            shape,
            config,
            video_tokens=models.video_tokens,
            context_tokens=profile["text"]["prompt_length"],
            world_size=gpus,
            trainable=count_trainable(shape, config),
            text_draws=section["text_draws"],
        )
        for task, parts in tasks.items():
            found[task] = max(found.get(task, 0.0), round(parts["total"] / 2**30, 2))
    peak = max(found.values())
    return {
        "gpus": gpus,
        "sequence_parallel": sharing,
        "video_tokens": models.video_tokens,
        "zero_stage": profile["train_stage_1"]["zero_stage"],
        "gib": found,
        "peak": peak,
        "fits": fits(peak),
    }


def count_alone(profile: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The GiB of one sample of the trained model on one GPU, and whether each way to hold the models fits."""
    from components.planning.inference import inference_memory
    from components.planning.meta_models import build_any_models
    from univigu import wan

    models = build_any_models(profile, wan.config_folder(ROOT / profile["base"]))
    totals = inference_memory(profile, models, task)["totals"]
    gib = {way: round(size / 2**30, 2) for way, size in totals.items()}
    return {"task": task, "gib": gib, "fits": {way: fits(size) for way, size in gib.items()}}


def fits(gib: float) -> bool:
    return gib <= BUDGET_GIB * (1 - SPARE)
