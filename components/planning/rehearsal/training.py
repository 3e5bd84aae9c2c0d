"""Checks of training at full size on meta tensors: each task's step, GPU memory, DeepSpeed's configuration."""

from typing import Any

from components.planning.cost import plan_memory
from components.planning.meta_models import MetaModels
from components.planning.rehearsal.lines import Profile, Scene
from components.training.train_stage import objective_settings
from univigu import planning
from univigu.errors import BadInputError, ConfigError
from univigu.hardware import find_gpu
from univigu.training.engine import TrainingConfig, engine_settings, init_distributed
from univigu.training.memory import training_loss_without_data


def tasks(profile: Profile) -> list[str]:
    """The tasks with a share above 0 in either stage."""
    shares = [*profile["train_stage_1"]["tasks"].items(), *profile["train_stage_2"]["tasks"].items()]
    return list(dict.fromkeys(task for task, share in shares if share))


def check_task(profile: Profile, models: MetaModels, task: str, trained: set[str]) -> str:
    """Run a full-size training step on meta tensors; adds the parameters that got a gradient to `trained`."""
    import torch

    model, context = models.transformer, profile["text"]["prompt_length"]
    with torch.device("meta"):
        loss = training_loss_without_data(model, task, (1, *models.latents), model.config.text_length, context)
        loss.backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained |= got
    for parameter in model.parameters():
        parameter.grad = None
    tokens = models.video_tokens + model.config.text_length
    return f"forward and backward over {tokens:,} tokens, {len(got)} gradients"


def check_trained(models: MetaModels, trained: set[str]) -> str:
    """The tasks together train every weight."""
    every = {name for name, _ in models.transformer.named_parameters()}
    # the projection of the first guess gets a gradient, although the guess was all zeros above
    if untouched := sorted(every - trained):
        raise BadInputError(f"No task of the profile trains {untouched[0]}; give tasks of both kinds a share.")
    return f"{len(every)} of {len(every)} weights"


def _training_config(profile: Profile, number: int) -> Any:
    section = profile[f"train_stage_{number}"]
    objective_settings(section, profile["model"], profile["seed"])
    return TrainingConfig.from_section(section, profile["seed"])


def check_memory(scene: Scene, models: MetaModels, number: int) -> str:
    """A step fits into the memory of the GPU."""
    config, text = _training_config(scene.profile, number), scene.profile["text"]
    draws = scene.profile[f"train_stage_{number}"]["text_draws"]
    tokens = planning.Tokens(models.video_tokens, text["caption_tokens"][1], text["prompt_length"])
    memory = plan_memory(models, tokens, config, scene.gpus, find_gpu(scene.gpu), None, draws)
    needed, usable = memory["by_stage"][memory["chosen"]]["total"] / 2**30, memory["usable"] / 2**30
    if not memory["fits"]:
        raise ConfigError(
            f"Stage {number} needs {needed:.1f} GiB on each of {scene.gpus} {scene.gpu}, which have {usable:.1f}"
            " usable; `univigu plan` shows what would fit."
        )
    return f"{needed:.1f} GiB of {usable:.1f} on each of {scene.gpus} {scene.gpu}"


def check_deepspeed(scene: Scene, number: int) -> str:
    """DeepSpeed accepts its configuration."""
    from types import SimpleNamespace

    init_distributed()  # a group of one process, which DeepSpeed requires
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _training_config(scene.profile, number)
    settings = engine_settings(config, scene.gpus)
    read = DeepSpeedConfig(settings, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: scene.gpus))
    return (
        f"ZeRO {int(read.zero_config.stage)} in {config.precision}, {read.gradient_accumulation_steps} x"
        f" {read.train_micro_batch_size_per_gpu} samples on each of {scene.gpus} GPUs"
    )
