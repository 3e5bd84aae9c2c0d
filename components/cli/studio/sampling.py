"""Generating, captioning, and both jointly: the model that the studio uses, and what a call leaves behind."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.cli import chosen_model
from components.cli.adapters import adapted, find_adapter
from components.cli.known_words import describe_unknown_words
from components.cli.studio import clips, gallery
from components.cli.studio.gallery import Result
from components.cli.studio.guard import LARGEST_UPLOAD_MB
from components.cli.studio.looking import Call, Calls
from components.cli.studio.tracing import LatentColours, Moment, Progress, Stopped, Tracer, fit_colours
from components.cli.studio.work import Studio
from univigu import __version__
from univigu.errors import BadInputError, MissingInputError, VideoError

if TYPE_CHECKING:
    import numpy as np

    from univigu.pipeline import UniViGUPipeline

LONGEST_PROMPT = 4000  # characters
MOST_STEPS = 1000
LARGEST_SEED = 2**53 - 1  # a browser's numbers are exact up to here
LARGEST_FILE = LARGEST_UPLOAD_MB << 20  # bytes of a dropped file


class Made(NamedTuple):
    """A result: its place in the gallery, what the user should know about it, and what was seen on the way."""

    result: Result
    notes: list[str]
    trace: list[Moment]
    words: bool = False  # whether the words of its caption can be asked where they looked


class Model:
    """The champion, or the bundled model where there is none; it is loaded when it is first used.

    If another version has become champion since, this one is loaded instead.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio, self._lock = studio, threading.Lock()
        self._label, self._pipeline, self._folder = "", None, Path()
        self._colours: LatentColours | None = None
        self.calls = Calls()

    def label(self) -> str:
        """Which model the next result is made with; raises `MissingInputError` if there is none."""
        return self._choose()[0]

    def load(self) -> "tuple[UniViGUPipeline, str, Path]":
        """The pipeline, its label, and its folder; raises `MissingInputError` if there is no model."""
        from components.pipeline.lean_imports import import_models

        with self._lock:
            label, address = self._choose()
            if self._pipeline is None or label != self._label:
                with self._studio.store:  # both change global variables
                    import_models()
                    folder = chosen_model.find_model(address, self._studio.name, self._studio.root)
                self._pipeline = None  # its memory is needed
                self._pipeline = chosen_model.load(folder, adapters=True)
                self._label, self._folder, self._colours = label, folder, None
            return self._pipeline, self._label, self._folder

    def colours(self) -> LatentColours:
        """How latents of the loaded model's autoencoder look; fitted when it is first used."""
        with self._lock:
            if self._colours is None:
                # pyrefly: ignore[missing-attribute]
                self._colours = fit_colours(self._pipeline.vae, clips.some_frames(self._studio.root))
            return self._colours

    def _choose(self) -> tuple[str, str]:
        """The label of the model to use, and its address or folder."""
        name, version = self._studio.name, self._champion()
        if version:
            return f"{name} version {version}", f"models:/{name}/{version}"
        bundled = chosen_model.find_bundled(self._studio.root) if name == chosen_model.NAME else None
        if bundled is None:
            raise MissingInputError(
                f"'{name}' has no champion, so there is no model to use; promote a version on the page Models, or "
                "train a model with `make demo`."
            )
        return "the bundled model", str(bundled)

    def _champion(self) -> int:
        """The number of the champion, or 0."""
        with self._studio.store:
            return chosen_model.find_champion(self._studio.name, self._studio.root)


def generate(studio: Studio, model: Model, asked: Mapping[str, Any], progress: Progress) -> Made:
    """A video from a prompt.

    asked: prompt, negative_prompt, steps, guidance (None: the model's own), seed, and lora (its name, or "" for none)
    with its lora_scale.
    """
    asked = _checked(asked)
    if not asked["prompt"]:
        raise BadInputError("The prompt is empty; write what the video should show.")
    lora = _lora(studio, asked)
    pipeline, label, _ = model.load()
    steps = asked["steps"] or pipeline.config.num_inference_steps
    tracer = Tracer(pipeline, asked["seed"], progress, model.colours(), steps, 0)
    run = partial(
        pipeline.generate,
        asked["prompt"],
        negative_prompt=asked["negative_prompt"] or None,
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance"],
        seed=[asked["seed"]],
        callback_on_step_end=tracer,
    )
    recipe = _recipe("generate", label, pipeline, asked)
    with adapted(pipeline, *lora):
        found, stopped = _run(run, pipeline, tracer)
    frames = tracer.video(pipeline) if stopped else found[0]
    notes = [*stopped, *_unknown_words(asked["prompt"], pipeline)]
    return Made(gallery.save(studio.root, frames, pipeline.config.fps, recipe | _end(stopped), ""), notes, tracer.trace)


def caption(studio: Studio, model: Model, file: str | None, asked: Mapping[str, Any], progress: Progress) -> Made:
    """A caption of a video file. asked: steps, guidance and temperature (None: the model's own), and seed."""
    from univigu.confidence import assess
    from univigu.confidence_reference import read_reference
    from univigu.video import fit_frames

    asked = _checked(asked)
    path = _dropped(file)
    pipeline, label, folder = model.load()
    frames, fps = _read_dropped(path, pipeline)
    steps = asked["steps"] or pipeline.config.caption_steps
    tracer = Tracer(pipeline, asked["seed"], progress, model.colours(), 0, steps)
    given = {
        "videos": [frames],
        "num_inference_steps": asked["steps"],
        "guidance_scale": asked["guidance"],
        "temperature": asked["temperature"],
        "seed": [asked["seed"]],
    }
    seen = {"callback_on_step_end": tracer, "callback_on_step_end_tensor_inputs": ["text_latents"]}
    found, notes = _run(partial(pipeline.caption, **given, **seen), pipeline, tracer)
    text = tracer.text(pipeline) if notes else found[0]
    recipe = _recipe("caption", label, pipeline, {**asked, "file": path.name}) | _end(notes)
    if not notes:
        doubt = assess(pipeline, frames, text, read_reference(folder), asked["seed"]).warning
        notes = [f"This video is unlike the clips that this model knows: {doubt}. Don't rely on its caption."]
        notes = notes if doubt else []
    made = gallery.save(studio.root, frames, fps, recipe, " ".join(text.split()))
    if not recipe.get("stopped"):
        size = (pipeline.config.num_frames, pipeline.config.height, pipeline.config.width)
        call = Call(label, "caption", given, steps, (None, 1.0), made.caption, fit_frames(frames, *size))
        model.calls.keep(made.id, call)
    return Made(made, notes, tracer.trace, not recipe.get("stopped"))


def joint(studio: Studio, model: Model, asked: Mapping[str, Any], progress: Progress) -> Made:
    """A video and its caption. asked: as for `generate`, temperature, text_at (None: the model's own), in_step."""
    asked = _checked(asked)
    lora = _lora(studio, asked)
    pipeline, label, _ = model.load()
    steps = asked["steps"] or pipeline.config.num_inference_steps
    steps = max(steps, pipeline.config.caption_steps) if asked["in_step"] else steps
    text_steps = steps if asked["in_step"] else pipeline.config.caption_steps
    tracer = Tracer(pipeline, asked["seed"], progress, model.colours(), steps, text_steps)
    given = {
        "prompt": asked["prompt"],
        "negative_prompt": asked["negative_prompt"] or None,
        "num_inference_steps": asked["steps"],
        "guidance_scale": asked["guidance"],
        "temperature": asked["temperature"],
        "text_at": asked["text_at"],
        "in_step": asked["in_step"],
        "seed": [asked["seed"]],
        "output_type": "uint8",
        "return_dict": False,
    }
    seen = {"callback_on_step_end": tracer, "callback_on_step_end_tensor_inputs": list(tracer.inputs)}
    recipe = _recipe("joint", label, pipeline, asked)
    with adapted(pipeline, *lora):
        found, stopped = _run(partial(pipeline.joint, **given, **seen), pipeline, tracer)
    frames, text = (tracer.video(pipeline), tracer.text(pipeline)) if stopped else (found[0][0], found[1][0])
    made = gallery.save(studio.root, frames, pipeline.config.fps, recipe | _end(stopped), " ".join(text.split()))
    if not stopped:
        model.calls.keep(made.id, Call(label, "joint", given, text_steps, lora, made.caption, frames))
    return Made(made, [*stopped, *_unknown_words(asked["prompt"], pipeline)], tracer.trace, not stopped)


def _run(run: Callable[[], Any], pipeline: Any, tracer: Tracer) -> tuple[Any, list[str]]:
    """What a call of the pipeline returns; or, if the user stopped it, None and a sentence about what is kept."""
    try:
        return run(), []
    except Stopped:
        pipeline.maybe_free_model_hooks()
        return None, [f"Stopped after step {tracer.done}: this is what was predicted there."]


def _end(stopped: list[str]) -> dict[str, str]:
    return {"stopped": stopped[0].partition(":")[0].lower().replace("stopped ", "")} if stopped else {}


def _read_dropped(path: Path, pipeline: Any) -> "tuple[np.ndarray, float]":
    from univigu.video import MAX_FRAMES, read_video

    try:
        frames, fps = read_video(path, pipeline.config.num_frames or MAX_FRAMES)
    except VideoError as error:  # the user knows the file's name, not where it was put
        raise BadInputError(str(error).replace(str(path), path.name)) from error
    if len(frames) == 1:
        raise BadInputError("The video is a single frame, which shows no motion; give two frames or more.")
    return frames, fps


def _checked(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, with texts stripped; raises `BadInputError` for a value out of its range."""
    found: dict[str, Any] = {key: value.strip() if isinstance(value, str) else value for key, value in asked.items()}
    longest = max(len(str(found.get(key) or "")) for key in ("prompt", "negative_prompt"))
    if longest > LONGEST_PROMPT:
        raise BadInputError(f"A prompt has at most {LONGEST_PROMPT} characters, not {longest}; shorten it.")
    steps, seed = found.get("steps"), found.get("seed")
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise BadInputError(f"The number of steps is {steps}; give 1 to {MOST_STEPS}, or leave it empty.")
    if seed is None or not 0 <= seed <= LARGEST_SEED:
        raise BadInputError(f"The seed is {seed}; give a whole number from 0 to {LARGEST_SEED}.")
    for key, most in (("guidance", 100), ("temperature", 100), ("text_at", 1), ("lora_scale", 10)):
        value = found.get(key)
        if value is not None and not 0 <= value <= most:
            raise BadInputError(f"The field '{key}' is {value}; give 0 to {most}, or leave it empty.")
    return found


def _lora(studio: Studio, asked: Mapping[str, Any]) -> tuple[Path | None, float]:
    """The file of the LoRA that was asked for, or None, and its scale; raises `BadInputError` if it isn't there."""
    scale = asked.get("lora_scale")
    return find_adapter(studio.root, asked["lora"]) if asked.get("lora") else None, 1.0 if scale is None else scale


def _dropped(file: str | None) -> Path:
    if not file:
        raise BadInputError("There is no file yet; drop a video into the field, or choose one.")
    path = Path(file)
    if path.stat().st_size > LARGEST_FILE:
        raise BadInputError(f"The file has more than {LARGEST_FILE >> 20} MB; cut it into shorter ones.")
    return path


def _unknown_words(prompt: str, pipeline: Any) -> list[str]:
    said = describe_unknown_words(prompt, pipeline.tokenizer)
    return [said] if said else []


def _recipe(task: str, label: str, pipeline: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is needed to make the result again; the model's own values stand where none was given."""
    own = {"steps": "caption_steps" if task == "caption" else "num_inference_steps"}
    own |= {"guidance": "caption_guidance_scale" if task == "caption" else "guidance_scale"}
    own |= {"temperature": "caption_temperature"}
    values = {key: pipeline.config[own[key]] if value is None and key in own else value for key, value in asked.items()}
    given = {key: value for key, value in values.items() if value not in (None, "")}
    return {"task": task, "model": label, "univigu": __version__, **given}
