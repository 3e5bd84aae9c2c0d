"""Commands that use a trained model: `univigu caption`, `univigu generate` and `univigu joint`.

Cheap checks run before the model is loaded. Standard output holds only the captions; everything else goes to standard
error.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.cli.adapters import adapted, check_adapter
from components.cli.chosen_model import NAME, find_model, load
from components.cli.clip_files import check_output, write_clip, write_error
from components.cli.first_image import FirstImage, read_first_image, warn_of_stretching
from components.cli.known_words import warn_of_unknown_words
from components.cli.messages import say
from components.pipeline.progress import progress
from univigu.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np

PANEL = "Use a trained model"
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif"}
EXAMPLES = {
    "caption": "Examples: `univigu caption clip.mp4`; `univigu caption --json *.mp4`",
    "generate": "Examples: `univigu generate 'a red seven moves to the right'`; "
    "`univigu generate 'a red seven' -o clip.gif --seed 3`",
    "joint": "Examples: `univigu joint 'a blue digit' -o clip.mp4`; `univigu joint -o clip.webm --seed 7`",
}

Model = Annotated[
    str,
    typer.Option(
        metavar="FOLDER",
        help="A trained model's folder, or a hub repository OWNER/NAME, which HF_HUB_OFFLINE=0 lets it fetch. "
        "(default: the registered champion, or the bundled model where there is none)",
    ),
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
InStep = Annotated[
    bool | None,
    typer.Option(
        "--in-step/--in-turn",
        help="Denoise video and text in lockstep (eq 18), or one at a time. (default: the model's)",
        show_default=False,
    ),
]
TextShift = Annotated[
    float | None,
    typer.Option(help="In lockstep: above 1, the text lags behind the video. (default: the model's)"),
]
PromptUntil = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="In lockstep: the text's time, 0 to 1, from which the video follows what it says so far in place of the "
        "prompt. (default: the model's)",
    ),
]
Lora = Annotated[
    Path | None,
    typer.Option(help="A LoRA for the model's base, in safetensors. (default: none)", show_default=False),
]
LoraScale = Annotated[float, typer.Option(min=0, max=10, help="How strong the LoRA is; 1 is as it was trained.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="The mp4, webm or gif file to write; an existing file is replaced. (default: a new mp4 here, named after "
        "the prompt)",
        show_default=False,
    ),
]
Scale = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=64,
        help="Enlarge the clip by this factor; 1 leaves it as the model makes it. (default: small clips are enlarged "
        "to about 256 pixels)",
        show_default=False,
    ),
]


def caption(
    videos: Annotated[list[Path], typer.Argument(help="Videos (mp4, mov, webm, mkv, avi, gif), or folders of them.")],
    model: Model = "",
    name: Name = NAME,
    root: Root = Path("."),
    seed: Seed = 0,
    steps: CaptionSteps = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per video: file and caption.")] = False,
) -> None:
    """Caption videos: one line on standard output per file, in the given order.

    Videos may have any size and length: they are centre-cropped to the model's shape and sampled at even intervals.
    A caption depends on its video and on --seed, not on the other files. A file that can't be read is reported on
    standard error and sets the exit code; the other files are still captioned. So is a clip that differs from what
    the model knows, as far as it carries the measures of held-out clips; --json has the measures of every clip.
    """
    from univigu.confidence_reference import read_reference

    folder = find_model(model, name, root)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "temperature": temperature}
    limit, pipeline, failed = _frames_of(folder), None, []
    reference = read_reference(folder)
    for path in _with_progress(_list_files(videos)):
        try:
            frames = _read_moving(path, limit)
        except BadInputError as error:
            failed.append(error)
            print(f"univigu: {error}", file=sys.stderr)
            continue
        pipeline = pipeline or load(folder)  # loaded only if a file can be read
        from univigu.confidence import assess

        # one at a time: a caption depends on its own clip alone
        (text,) = pipeline.caption([frames], **settings, seed=[seed])
        found = assess(pipeline, frames, text, reference, seed)
        line = " ".join(text.split())
        facts = {"confidence": found.confidence, "fidelity": found.fidelity, "unusual": found.unusual}
        _print_line(json.dumps({"file": str(path), "caption": line, **facts}, ensure_ascii=False) if as_json else line)
        if found.warning:
            say(f"{path} is unlike the clips that this model knows: {found.warning}. Don't rely on its caption.")
    if failed:
        raise typer.Exit(failed[0].exit_code)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video should show.")],
    output: Output = None,
    model: Model = "",
    name: Name = NAME,
    root: Root = Path("."),
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    image: FirstImage = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    scale: Scale = None,
) -> None:
    """Make a video from a prompt, and from a first image where the model's base takes one."""
    if not prompt.strip():
        raise BadInputError("The prompt is empty; write what the video should show.")
    check_output(output)
    check_adapter(lora)
    folder = find_model(model, name, root)
    picture = read_first_image(image, folder)
    pipeline = load(folder, adapters=lora is not None)
    warn_of_unknown_words(prompt, pipeline.tokenizer)
    warn_of_stretching(picture, pipeline.config.height, pipeline.config.width)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "image": picture}
    with adapted(pipeline, lora, lora_scale):
        (frames,) = pipeline.generate(prompt, **settings, seed=[seed])
    write_clip(output, prompt, frames, pipeline.config.fps, scale)


def joint(
    prompt: Annotated[str, typer.Argument(help="What the video should show; optional.")] = "",
    output: Output = None,
    model: Model = "",
    name: Name = NAME,
    root: Root = Path("."),
    seed: Seed = 0,
    steps: JointSteps = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    text_at: TextAt = None,
    in_step: InStep = None,
    text_shift: TextShift = None,
    prompt_until: PromptUntil = None,
    image: FirstImage = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    scale: Scale = None,
) -> None:
    """Make a video and its caption together, with or without a prompt; print the caption.

    The text is written part of the way through the video, and the rest of the video follows it. `--in-step` denoises
    both in lockstep instead (eq 18 of the paper).
    """
    check_output(output)
    check_adapter(lora)
    folder = find_model(model, name, root)
    picture = read_first_image(image, folder)
    pipeline = load(folder, adapters=lora is not None)
    prompt = prompt if prompt.strip() else ""
    warn_of_unknown_words(prompt, pipeline.tokenizer)
    warn_of_stretching(picture, pipeline.config.height, pipeline.config.width)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "temperature": temperature, "image": picture}
    path = {"text_at": text_at, "in_step": in_step, "text_shift": text_shift, "prompt_until": prompt_until}
    given = {"seed": seed, "output_type": "uint8", "return_dict": False}
    with adapted(pipeline, lora, lora_scale):
        (frames,), (text,) = pipeline.joint(prompt, **settings, **path, **given)
    write_clip(output, prompt, frames, pipeline.config.fps, scale)
    _print_line(" ".join(text.split()))


def add_to(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    for command in (caption, generate, joint):
        app.command(rich_help_panel=PANEL, epilog=EXAMPLES[command.__name__])(command)


def _with_progress(videos: Sequence[Path]) -> Iterable[Path]:
    """The videos; where their captions don't appear on a terminal, with their progress."""
    return videos if len(videos) == 1 or sys.stdout.isatty() else progress(videos, "caption", unit="videos")


def _list_files(paths: Sequence[Path]) -> list[Path]:
    """The files, with the videos of a folder, at any depth, in its place; raises where a folder has none."""
    from components.clips.import_files import list_videos

    return [file for path in paths for file in ([path / n for n in list_videos(path)[0]] if path.is_dir() else [path])]


def _read_moving(path: Path, limit: int) -> "np.ndarray":
    from univigu.video import read_video

    if path.suffix.lower() in PICTURES and path.is_file():
        raise BadInputError(f"'{path}' is a picture, and a caption needs a clip that moves; give a video.")
    frames, _ = read_video(path, limit)
    if len(frames) == 1 < limit:
        raise BadInputError(f"The video '{path}' is a single frame, which shows no motion; give two frames or more.")
    return frames


def _frames_of(folder: Path) -> int:
    """The model's number of frames, read without loading it; the most if it can't be read (loading reports why)."""
    from univigu.video import MAX_FRAMES

    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["num_frames"] or MAX_FRAMES
    except (OSError, ValueError, KeyError, TypeError):
        return MAX_FRAMES


def _print_line(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise write_error("standard output", error) from error
