"""What people do with a trained model: `univigu caption`, `univigu generate` and `univigu joint`.

Cheap checks come first, then the model. Standard output holds the caption alone; everything else is said on standard
error. A clip is written beside its place and renamed, so whoever finds it finds all of it.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from univigu.errors import BadInputError, DiskFullError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

    from univigu.pipeline import UniViGUPipeline

PANEL = "Use a trained model"
BATCH = 8  # videos in memory at once
EXAMPLES = {
    "caption": "Examples: `univigu caption clip.mp4`; `univigu caption --json *.mp4`",
    "generate": "Example: `univigu generate 'a red seven moves to the right' -o clip.mp4 --seed 3 --scale 8`",
    "joint": "Examples: `univigu joint 'a blue digit' -o clip.mp4`; `univigu joint -o clip.mp4 --seed 7`",
}

Model = Annotated[
    str, typer.Option(metavar="FOLDER", help="A trained model's folder; without it the registered champion is used.")
]
Name = Annotated[str, typer.Option(help="The name whose champion is used.")]
Root = Annotated[Path, typer.Option(help="The work root, where the registry lies (or set MLFLOW_TRACKING_URI).")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Sampling steps; more is slower and finer. (default: the model's)")
]
CaptionSteps = Annotated[int | None, typer.Option(min=1, help="Euler steps; few are enough. (default: the model's)")]
JointSteps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of the video. (default: the model's)")]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="How strictly to follow what is given; 1 is no guidance. (default: the model's)"),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="From 1, as the model found it, down to 0, the likeliest words. (default: the model's)"),
]
TextAt = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="How far the video is, 0 to 1, when its text is written. (default: the model's)"),
]
InStep = Annotated[bool, typer.Option("--in-step", help="Video and text take every step together instead.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The mp4 to write; one of that name is replaced.")]
Scale = Annotated[int, typer.Option(min=1, max=64, help="Enlarge the clip this many times, for small models.")]


def caption(
    videos: Annotated[list[Path], typer.Argument(help="Video files: mp4, mov, webm, mkv, avi or gif.")],
    model: Model = "",
    name: Name = "uni-vigu",
    root: Root = Path("."),
    seed: Seed = 0,
    steps: CaptionSteps = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a video: its file and its caption.")] = False,
) -> None:
    """Say what is in a video: one line on standard output for each file, in the order given.

    Any size and length will do: the video is cut to the model's shape around its centre, and frames are taken evenly
    from all of it. Captions come a few files at a time; each file has a seed of its own, counted up from --seed. A file
    that can't be read is named on standard error and makes the exit code; the others get their captions.
    """
    from univigu.video import MAX_FRAMES

    folder = _folder(model, name, root)
    limit, pipeline, failed = _frames_of(folder) or MAX_FRAMES, None, []
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "temperature": temperature}
    for start in range(0, len(videos), BATCH):
        read = {}
        for number, path in enumerate(videos[start : start + BATCH], start):
            try:
                read[number] = _read_moving(path, limit)
            except BadInputError as error:
                failed.append(error)
                print(f"univigu: {error}", file=sys.stderr)
        if not read:
            continue
        pipeline = pipeline or _load(folder)  # only now: without a good file it isn't needed
        texts = pipeline.caption(list(read.values()), **settings, seed=[seed + number for number in read])
        for number, text in zip(read, texts, strict=True):
            line = " ".join(text.split())
            _say(json.dumps({"file": str(videos[number]), "caption": line}, ensure_ascii=False) if as_json else line)
    if failed:
        raise typer.Exit(failed[0].exit_code)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video should show.")],
    output: Output,
    model: Model = "",
    name: Name = "uni-vigu",
    root: Root = Path("."),
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    scale: Scale = 1,
) -> None:
    """Make a video from a prompt."""
    if not prompt.strip():
        raise BadInputError("The prompt is empty; write what the video should show.")
    _check_output(output)
    pipeline = _load(_folder(model, name, root))
    (frames,) = pipeline.generate(prompt, num_inference_steps=steps, guidance_scale=guidance, seed=seed)
    _write(output, frames, pipeline.config.fps, scale)


def joint(
    output: Output,
    prompt: Annotated[str, typer.Argument(help="What the video should show; may be left out.")] = "",
    model: Model = "",
    name: Name = "uni-vigu",
    root: Root = Path("."),
    seed: Seed = 0,
    steps: JointSteps = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    text_at: TextAt = None,
    in_step: InStep = False,
    scale: Scale = 1,
) -> None:
    """Make a video and its description together, from a prompt or from nothing; the description is printed."""
    _check_output(output)
    pipeline = _load(_folder(model, name, root))
    prompt = prompt if prompt.strip() else ""
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "temperature": temperature}
    (frames,), (text,) = pipeline.joint(prompt, **settings, text_at=text_at, in_step=in_step, seed=seed)
    _write(output, frames, pipeline.config.fps, scale)
    _say(" ".join(text.split()))


def add_to(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    for command in (caption, generate, joint):
        app.command(rich_help_panel=PANEL, epilog=EXAMPLES[command.__name__])(command)


# --- the model -------------------------------------------------------------------------------------------------------


def _folder(model: str, name: str, root: Path) -> Path:
    """The folder of the model to use; the registry is only opened where no folder was given."""
    if model and not model.startswith("models:/"):
        if not Path(model).is_dir():
            raise MissingInputError(f"There is no model folder '{model}'; check the path, or leave --model out.")
        return Path(model)
    from components.tracking import existing_store
    from univigu.registry import pipeline_folder

    return pipeline_folder(model or name, existing_store(root, "a model's folder with --model"))


def _read_moving(path: Path, limit: int) -> "np.ndarray":
    from univigu.video import read_video

    frames, _ = read_video(path, limit)
    if len(frames) == 1 < limit:
        raise BadInputError(f"The video '{path}' is a single frame, which shows no motion; give two frames or more.")
    return frames


def _frames_of(folder: Path) -> int | None:
    """How many frames the model takes, without loading it; None where the folder doesn't say, as loading will tell."""
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["num_frames"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(folder: Path) -> "UniViGUPipeline":
    from univigu.registry import load_pipeline

    pipeline = load_pipeline(folder)
    import torch

    if torch.cuda.is_available():
        pipeline.to("cuda")
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False, desc="sampling")
    return pipeline


# --- what comes out --------------------------------------------------------------------------------------------------


def _check_output(path: Path) -> None:
    """Refuse, before anything is computed, a place where no clip can be written."""
    if path.is_dir():
        raise BadInputError(f"'{path}' is a folder; give the name of the mp4 to write, such as {path / 'clip.mp4'}.")
    if not path.parent.is_dir():
        raise MissingInputError(f"There is no folder '{path.parent}' to write the clip to; make it, or choose another.")
    if path.exists() and not path.is_file():
        return  # a device or a pipe takes any name
    if path.suffix.lower() != ".mp4":
        raise BadInputError(f"Clips are written as mp4, and '{path}' is named otherwise; call it '{path.stem}.mp4'.")
    if not os.access(path.parent, os.W_OK):
        raise BadInputError(f"The folder '{path.parent}' can't be written to; choose another for the clip.")


def _write(path: Path, frames: "np.ndarray", fps: float, scale: int) -> None:
    from univigu.video import encode_mp4

    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    content = encode_mp4(even, fps, "yuv420p")
    special = path.exists() and not path.is_file()
    target = path if special else path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with target.open("wb") as stream:
            stream.write(content)
            stream.flush()
            if not special:
                os.fsync(stream.fileno())
        if not special:
            target.replace(path)
    except OSError as error:
        raise _write_error(f"the clip to '{path}'", error) from error
    finally:
        if not special:
            target.unlink(missing_ok=True)
    count, height, width = even.shape[:3]
    print(f"{path}: {count} frames of {width}x{height} at {fps:g} a second", file=sys.stderr)


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _write_error("to standard output", error) from error


def _write_error(what: str, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"The disk is full, so it was not possible to write {what}; make room and run it again.")
    return BadInputError(f"It was not possible to write {what} ({error.strerror}); choose another place.")
