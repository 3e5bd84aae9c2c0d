"""Generating, captioning, and both jointly: the model that the studio uses, and what a call leaves behind."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.cli import chosen_model
from components.cli.known_words import describe_unknown_words
from components.cli.studio import gallery
from components.cli.studio.gallery import Result
from components.cli.studio.work import Studio
from univigu import __version__
from univigu.errors import BadInputError, MissingInputError, VideoError

if TYPE_CHECKING:
    from univigu.pipeline import UniViGUPipeline

LONGEST_PROMPT = 4000  # characters
MOST_STEPS = 1000
LARGEST_SEED = 2**53 - 1  # a browser's numbers are exact up to here
LARGEST_FILE = 256 << 20  # bytes of a dropped file
TRACED = 64  # text steps whose tokens are kept
LARGEST_TRACE = 1 << 26  # similarities (tokens x vocabulary) up to which tokens are traced: 256 MiB

Progress = Callable[[int], object]  # called with the number of steps that are done


class Token(NamedTuple):
    """A token of a text on the way: its characters, and the probability of this token given its noisy embedding."""

    text: str
    share: float


class Made(NamedTuple):
    """A result: its place in the gallery, what the user should know about it, and its text over time."""

    result: Result
    notes: list[str]
    trace: list[tuple[float, list[Token]]]  # (tau, tokens) after each text step


class Model:
    """The champion, or the bundled model where there is none; it is loaded when it is first used.

    If another version has become champion since, this one is loaded instead.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio, self._lock = studio, threading.Lock()
        self._label, self._pipeline, self._folder = "", None, Path()

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
                self._pipeline = chosen_model.load(folder)
                self._label, self._folder = label, folder
            return self._pipeline, self._label, self._folder

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
    """A video from a prompt. asked: prompt, negative_prompt, steps, guidance (None: the model's own), and seed."""
    asked = _checked(asked)
    if not asked["prompt"]:
        raise BadInputError("The prompt is empty; write what the video should show.")
    pipeline, label, _ = model.load()
    notes = _unknown_words(asked["prompt"], pipeline)
    (frames,) = pipeline.generate(
        asked["prompt"],
        negative_prompt=asked["negative_prompt"] or None,
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance"],
        seed=[asked["seed"]],
        callback_on_step_end=_reporter(progress),
    )
    recipe = _recipe("generate", label, pipeline, asked)
    return Made(gallery.save(studio.root, frames, pipeline.config.fps, recipe, ""), notes, [])


def caption(studio: Studio, model: Model, file: str | None, asked: Mapping[str, Any], progress: Progress) -> Made:
    """A caption of a video file. asked: steps, guidance and temperature (None: the model's own), and seed."""
    from univigu.confidence import assess
    from univigu.confidence_reference import read_reference
    from univigu.video import MAX_FRAMES, read_video

    asked = _checked(asked)
    path = _dropped(file)
    pipeline, label, folder = model.load()
    try:
        frames, fps = read_video(path, pipeline.config.num_frames or MAX_FRAMES)
    except VideoError as error:  # the user knows the file's name, not where it was put
        raise BadInputError(str(error).replace(str(path), path.name)) from error
    if len(frames) == 1:
        raise BadInputError("The video is a single frame, which shows no motion; give two frames or more.")
    tracer = Tracer(pipeline, asked["seed"], asked["steps"] or pipeline.config.caption_steps, progress)
    (text,) = pipeline.caption(
        [frames],
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance"],
        temperature=asked["temperature"],
        seed=[asked["seed"]],
        callback_on_step_end=tracer,
        callback_on_step_end_tensor_inputs=["text_latents"],
    )
    found = assess(pipeline, frames, text, read_reference(folder), asked["seed"])
    notes = [f"This video is unlike the clips that this model knows: {found.warning}. Don't rely on its caption."]
    recipe = _recipe("caption", label, pipeline, {**asked, "file": path.name})
    made = gallery.save(studio.root, frames, fps, recipe, " ".join(text.split()))
    return Made(made, notes if found.warning else [], tracer.trace)


def joint(studio: Studio, model: Model, asked: Mapping[str, Any], progress: Progress) -> Made:
    """A video and its caption. asked: as for `generate`, temperature, text_at (None: the model's own), and in_step."""
    asked = _checked(asked)
    pipeline, label, _ = model.load()
    notes = _unknown_words(asked["prompt"], pipeline)
    steps = max(asked["steps"] or pipeline.config.num_inference_steps, pipeline.config.caption_steps)
    text_steps = steps if asked["in_step"] else pipeline.config.caption_steps
    tracer = Tracer(pipeline, asked["seed"], text_steps, progress)
    (frames,), (text,) = pipeline.joint(
        asked["prompt"],
        negative_prompt=asked["negative_prompt"] or None,
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance"],
        temperature=asked["temperature"],
        text_at=asked["text_at"],
        in_step=asked["in_step"],
        seed=[asked["seed"]],
        output_type="uint8",
        return_dict=False,
        callback_on_step_end=tracer,
        callback_on_step_end_tensor_inputs=["text_latents"],
    )
    recipe = _recipe("joint", label, pipeline, asked)
    made = gallery.save(studio.root, frames, pipeline.config.fps, recipe, " ".join(text.split()))
    return Made(made, notes, tracer.trace)


class Tracer:
    """A callback of the pipeline that keeps the text on the way: after text step i of n it is at tau = (i + 1) / n."""

    def __init__(self, pipeline: Any, seed: int, steps: int, progress: Progress) -> None:
        from univigu.sampling import seeded_noise, token_table

        config, device = pipeline.transformer.config, pipeline._execution_device
        self.trace: list[tuple[float, list[Token]]] = []
        self._progress, self._done = progress, 0
        small = steps <= TRACED and config.tokenizer_length * config.text_length <= LARGEST_TRACE
        self._left = range(1, steps + 1 if small else 1)
        self._before = seeded_noise([seed], "text", (config.text_length, config.text_latent_dim), device)
        self._table = token_table(pipeline.transformer, device)
        self._steps = steps

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        self._done += 1
        self._progress(self._done)
        z = tensors["text_latents"]
        # in a step of the video alone the text stays as it is; after its last step it only becomes clean
        if self._left and not bool((z == self._before).all()):
            self.trace.append(self._read(pipeline, z, self._left[0] / self._steps))
            self._left = self._left[1:]
        self._before = z
        return {}

    def _read(self, pipeline: Any, z: Any, tau: float) -> tuple[float, list[Token]]:
        """The most likely token at each place up to the first EOS, given its noisy embedding alone (eq 8)."""
        import torch

        from univigu import text_space

        weight = text_space.confidence(torch.tensor(tau))
        length = pipeline.transformer.config.tokenizer_length
        shares, ids = (weight * text_space.similarity(z[0], self._table, length)).softmax(-1).max(-1)
        tokens = []
        for token, share in zip(ids.tolist(), shares.tolist(), strict=True):
            if token == pipeline.tokenizer.eos_token_id:
                break
            tokens.append(Token(pipeline.tokenizer.decode([token]), share))
        return tau, tokens


def _reporter(progress: Progress) -> Callable[..., dict[str, Any]]:
    def report(pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        progress(step + 1)
        return {}

    return report


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
    for key, most in (("guidance", 100), ("temperature", 100), ("text_at", 1)):
        value = found.get(key)
        if value is not None and not 0 <= value <= most:
            raise BadInputError(f"The field '{key}' is {value}; give 0 to {most}, or leave it empty.")
    return found


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
