"""Commands that use a trained model: `univigu caption`, `univigu generate` and `univigu joint`.

Cheap checks run before the model is loaded. Standard output holds only the captions; everything else goes to standard
error. A clip is written to a temporary file and renamed, so it is never incomplete.
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
    str, typer.Option(metavar="FOLDER", help="A trained model's folder. (default: the registered champion)")
]
Name = Annotated[str, typer.Option(help="The registered model whose champion is used.")]
Root = Annotated[Path, typer.Option(help="The work root, which contains the registry (or set MLFLOW_TRACKING_URI).")]
Seed = Annotated[int, typer.Option(help="Random seed; the same seed gives the same result.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Sampling steps; more are slower and better. (default: the model's)")
]
CaptionSteps = Annotated[int | None, typer.Option(min=1, help="Euler steps; a few are enough. (default: the model's)")]
JointSteps = Annotated[int | None, typer.Option(min=1, help="Sampling steps of the video. (default: the model's)")]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, help="Scale of classifier-free guidance; 1 is none. (default: the model's)"),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="Sampling temperature: 1 samples, 0 is greedy. (default: the model's)"),
]
TextAt = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="The video's time, 0 (noise) to 1, at which its text is sampled. (default: the model's)"
    ),
]
InStep = Annotated[bool, typer.Option("--in-step", help="Denoise video and text in lockstep instead (eq 18).")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The mp4 file to write; an existing file is replaced.")]
Scale = Annotated[int, typer.Option(min=1, max=64, help="Enlarge the clip by this factor, for small models.")]


def caption(
    videos: Annotated[list[Path], typer.Argument(help="Video files: mp4, mov, webm, mkv, avi or gif.")],
    model: Model = "",
    name: Name = "uni-vigu",
    root: Root = Path("."),
    seed: Seed = 0,
    steps: CaptionSteps = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per video: file and caption.")] = False,
) -> None:
    """Caption videos: one line on standard output per file, in the given order.

    Videos may have any size and length: they are centre-cropped to the model's shape and sampled at even intervals.
    Each file has its own seed, counted up from --seed. A file that can't be read is reported on standard error and
    sets the exit code; the other files are still captioned.
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
        pipeline = pipeline or _load(folder)  # loaded only if a file can be read
        texts = pipeline.caption(list(read.values()), **settings, seed=[seed + number for number in read])
        for number, text in zip(read, texts, strict=True):
            line = " ".join(text.split())
            _print_line(
                json.dumps({"file": str(videos[number]), "caption": line}, ensure_ascii=False) if as_json else line
            )
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
    prompt: Annotated[str, typer.Argument(help="What the video should show; optional.")] = "",
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
    """Make a video and its caption together, with or without a prompt; print the caption."""
    _check_output(output)
    pipeline = _load(_folder(model, name, root))
    prompt = prompt if prompt.strip() else ""
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "temperature": temperature}
    given = {"text_at": text_at, "in_step": in_step, "seed": seed, "output_type": "uint8", "return_dict": False}
    (frames,), (text,) = pipeline.joint(prompt, **settings, **given)
    _write(output, frames, pipeline.config.fps, scale)
    _print_line(" ".join(text.split()))


def add_to(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    for command in (caption, generate, joint):
        app.command(rich_help_panel=PANEL, epilog=EXAMPLES[command.__name__])(command)


# --- the model -------------------------------------------------------------------------------------------------------


def _folder(model: str, name: str, root: Path) -> Path:
    """The folder of the model to use; the registry is opened only if no folder was given."""
    if model and not model.startswith("models:/"):
        if not Path(model).is_dir():
            raise MissingInputError(f"There is no model folder '{model}'; check the path, or omit --model.")
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
    """The model's number of frames, read without loading it; None if it can't be read (loading reports why)."""
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


# --- output ----------------------------------------------------------------------------------------------------------


def _check_output(path: Path) -> None:
    """Raise an error, before anything is computed, if the clip can't be written to `path`."""
    if path.is_dir():
        raise BadInputError(f"'{path}' is a folder; give the name of the mp4 to write, such as {path / 'clip.mp4'}.")
    if not path.parent.is_dir():
        raise MissingInputError(f"There is no folder '{path.parent}' to write the clip to; create it first.")
    if path.exists() and not path.is_file():
        return  # a device or a pipe may have any name
    if path.suffix.lower() != ".mp4":
        raise BadInputError(f"Clips are written as mp4, but '{path}' has another suffix; use '{path.stem}.mp4'.")
    if not os.access(path.parent, os.W_OK):
        raise BadInputError(f"The folder '{path.parent}' is not writable; choose another folder for the clip.")


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
        raise _write_error(f"'{path}'", error) from error
    finally:
        if not special:
            target.unlink(missing_ok=True)
    count, height, width = even.shape[:3]
    print(f"{path}: {count} frames of {width}x{height} at {fps:g} fps", file=sys.stderr)


def _print_line(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _write_error("standard output", error) from error


def _write_error(what: str, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"The disk is full, so {what} could not be written; free some space and run it again.")
    return BadInputError(f"Can't write {what} ({error.strerror}); choose another destination.")
