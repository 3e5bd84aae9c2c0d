"""Preflight: check a profile end to end without weights, GPUs or a cluster, to find failures before the real run.

Modules are built on the meta device at full size, from the base's configs or Wan2.1's published ones. Each check is one
line: ``ok``, ``to do`` (something that only the user can provide) or ``failed``, with a message that says what to do.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

from components.planning.meta_models import MetaModels, build_models
from components.planning.rehearsal import environment, model_checks, training
from components.planning.rehearsal.lines import Line, Scene, ToDo
from univigu import wan
from univigu.errors import UniViGUError
from univigu.training.meta_tensors import KnownShapes


def rehearse(scene: Scene, show: Callable[[Line], None] = lambda line: None) -> list[Line]:
    """Run all checks; returns their lines in order, and calls `show` with each as soon as it is known."""
    lines: list[Line] = []
    for subject, check in _checks(scene):
        try:
            with KnownShapes():
                line = Line(subject, "ok", check())
        except ToDo as error:
            line = Line(subject, "to do", str(error))
        except UniViGUError as error:
            line = Line(subject, "failed", str(error), error.exit_code)
        except Exception as error:  # a library's error about a shape or a key is a finding, too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            line = Line(subject, "failed", f"{type(error).__name__}: {reason}", UniViGUError.exit_code)
        lines.append(line)
        show(line)
    return lines


def as_json(scene: Scene, lines: list[Line]) -> str:
    counts = {state: sum(line.state == state for line in lines) for state in ("ok", "to do", "failed")}
    return json.dumps({"profile": scene.name, **counts, "checks": [asdict(line) for line in lines]}, indent=1)


def exit_code(lines: list[Line]) -> int:
    """The exit code of the first check that failed, otherwise 0."""
    return next((line.exit_code for line in lines if line.state == "failed"), 0)


def _checks(scene: Scene) -> Iterator[tuple[str, Callable[[], str]]]:
    profile = scene.profile
    yield "steps", lambda: environment.check_steps(profile)
    yield "prompts", lambda: environment.check_prompts(profile, scene.root)
    yield "generator", lambda: environment.check_generator(profile, scene.root)
    yield "token ranges", lambda: environment.describe_texts(profile)
    yield "checks and captioner", lambda: environment.check_captioner(profile, scene.root)
    models: list[MetaModels] = []

    def build() -> str:
        folder = scene.weights or wan.config_folder(scene.root / profile["base"])
        models.append(build_models(profile, folder))
        sizes = (
            (name, model_checks.count(getattr(models[0], name))) for name in ("transformer", "text_encoder", "vae")
        )
        return f"{folder.name}: " + ", ".join(f"{name} {size / 1e9:.3f} B" for name, size in sizes)

    yield "modules", build
    yield "weights", lambda: model_checks.check_files(profile, scene, models)
    if models:
        model = models[0]
        yield "keys", lambda: model_checks.check_keys(model)
        yield "shapes", lambda: model_checks.check_shapes(profile, model)
        yield "text encoder", lambda: model_checks.check_text_encoder(profile, model)
        yield "autoencoder", lambda: model_checks.check_autoencoder(profile, model)
        trained: set[str] = set()
        for task in training.tasks(profile):
            yield f"training step, {task}", lambda task=task: training.check_task(profile, model, task, trained)
        yield "every weight learns", lambda: training.check_trained(model, trained)
        yield "sampling", lambda: model_checks.check_sampling(profile, model)
        for number in (1, 2):
            yield f"memory, stage {number}", lambda number=number: training.check_memory(scene, model, number)
        yield "time limits", lambda: environment.check_hours(scene, model)
        yield "disk", lambda: environment.check_disk(scene, model)
    for number in (1, 2):
        yield f"DeepSpeed, stage {number}", lambda number=number: training.check_deepspeed(scene, number)
    yield "evaluation", lambda: environment.check_evaluation(profile, scene.root)
    yield "Kubeflow pipeline", lambda: environment.check_pipeline(scene.root)
    yield "TrainJobs", lambda: environment.check_train_jobs(scene)
