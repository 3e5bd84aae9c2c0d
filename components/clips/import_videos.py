"""Import a folder of existing videos and texts in place of the steps that would make clips, prompts and captions.

It writes the outputs of three steps: `data/clips`, and from it `data/curated` and `data/captions`; all later steps run
as usual. Each video becomes a clip of its bucket's size at the profile's frame rate, upright, with square pixels, with
frames chosen by their timestamps. A clip whose caption can't be used for stage 2 (missing, or outside the profile's
range) is used for stage 1, which needs only a prompt.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.clips.buckets import Bucket, Misfit, choose_bucket, list_buckets
from components.clips.import_files import list_videos
from components.clips.import_texts import Fault, Texts, printable, read_texts
from components.pipeline.processes import usable_cores
from components.pipeline.stages import Stage
from components.settings.sections import Video
from univigu.errors import ConfigError, MissingInputError, VideoError
from univigu.files import file_sha256
from univigu.threads import side_threads

if TYPE_CHECKING:
    from components.checks import Finding
    from components.clips.gate import ClipCheck
    from components.pipeline.step import Step

TAR = "clips.tar"
BATCH = 8  # videos that are decoded concurrently, at most, and that a killed run loses
NAME = "import"  # the generator and captioner in the tables
KINDS = ("captions", "prompts")
SAME_SPEED = 0.05  # a clip whose speed differs by no more than this share counts as unchanged

_VIDEOS = Stage(
    "import-videos",
    "components.clips.import_videos:import_videos",
    home="data/clips",
    sources={"base": "base"},
    parameters=("text", "video", "curate_prompts", "synthesize_videos", "import_options", "import_videos"),
    plugins={"components.checks": "synthesize_videos.checks"},
)
_TABLES = {
    "prompts": ("import-prompts", "data/curated"),
    "captions": ("import-captions", "data/captions"),
}


class Clip(NamedTuple):
    """A clip made from a video: its mp4 (empty if the gate rejects it), its size, and the gate's finding."""

    content: bytes
    bucket: Bucket
    finding: "Finding"
    changes: Mapping[str, float]  # noted in its scores: `speed` 2.0 is twice as fast as the video


def import_folder(
    folder: Path, table: Path | None, options: Mapping[str, str], profile: Mapping[str, Any], root: Path
) -> dict[str, Any]:
    """Import a folder into the work root `root`; returns the manifest of the clips.

    options: `licence` and `source` of the whole import, and `texts`, the kind of the texts: `captions` or `prompts`.
    With prompts, `caption-videos` writes the captions. Raises as `run_stage` does, and `ConfigError` for a licence that
    the profile doesn't accept.
    """
    from components.pipeline.runner import run_adhoc_stage

    if options["texts"] not in KINDS:
        raise ConfigError(f"'{options['texts']}' is not a kind of texts; choose one of {', '.join(KINDS)}.")
    licences = profile["curate_prompts"]["licences"]
    if options["licence"] not in licences:
        raise ConfigError(
            f"The licence '{options['licence']}' is not among the profile's ({', '.join(licences)}); add it to "
            "'curate_prompts.licences' if you may train on it."
        )
    if not options["source"].strip():
        raise ConfigError("The source of the videos must not be empty; say where they come from.")
    paths = {"videos": folder.resolve(), **({"table": table.resolve()} if table else {})}
    profile = {**profile, "import_options": dict(options)}
    manifest = run_adhoc_stage(_VIDEOS, profile, root, paths)
    for name in ("prompts", "captions") if options["texts"] == "captions" else ("prompts",):
        step, home = _TABLES[name]
        stage = Stage(
            step,
            f"components.clips.import_videos:import_{name}",
            home,
            inputs={"clips": "synthesize-videos"},
            parameters=("import_videos",),
        )
        run_adhoc_stage(stage, profile, root, {})
    return manifest


def check_place(root: Path) -> None:
    """Raise `ConfigError` if there are generated clips in `root`, which an import would replace."""
    home = root / _VIDEOS.home
    try:
        maker = json.loads((home / "manifest.json").read_text(encoding="utf-8")).get("step")
    except (OSError, ValueError, AttributeError):
        return
    if maker != _VIDEOS.name:
        raise ConfigError(f"{home} has clips made by '{maker}'; choose another --root, or replace them with --replace.")


def import_prompts(step: "Step") -> None:
    """Write the prompts of imported clips where `curate-prompts` writes its prompts."""
    _copy_table(step, "prompts")


def import_captions(step: "Step") -> None:
    """Write the captions of imported clips where `caption-videos` writes its captions."""
    _copy_table(step, "captions")


def _copy_table(step: "Step", table: str) -> None:
    rows = step.read("clips", table).to_pylist()
    step.rows_in = len(rows)
    step.write(table, rows)


def import_videos(step: "Step") -> None:
    """Make clips in tar shards, and the tables `clips`, `prompts` and `captions`, from videos and texts."""
    from components.clips.archive import join_tars, write_tar
    from components.clips.gate import gate_digests, load_gate
    from components.pipeline.tables import write_table
    from univigu.wan import check_autoencoder

    video = step.settings.video
    check_autoencoder(step.inputs["base"], list_buckets(video))
    gate = load_gate(step.parameters["synthesize_videos"]["checks"], step.root)
    models = gate_digests(gate)
    plans = [{**plan, "gate_models": models} for plan in plan_clips(step)]

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        def make_batch(batch: Sequence[Mapping[str, Any]], batch_folder: Path) -> list[dict[str, Any]]:
            clips = list(pool.map(partial(make_clip, step.inputs["videos"], video, gate), batch))
            good = [(row, clip) for row, clip in zip(batch, clips, strict=True) if _passes(step, row, clip)]
            # pyrefly: ignore[missing-attribute]
            write_tar(batch_folder / TAR, {f"{row['id']}.mp4": clip.content for row, clip in good})
            # pyrefly: ignore[bad-argument-type]
            return [clip_row(row, clip, video.fps) for row, clip in good]

        made = step.map_batches(shard, BATCH, folder, make_batch)
        join_tars([batch_folder / TAR for batch_folder, _ in made], folder / TAR)
        return [{**row, "shard": f"shards/{folder.name.removeprefix('.')}/{TAR}"} for _, rows in made for row in rows]

    with side_threads(min(BATCH, usable_cores()), "read-videos") as pool:
        clips = step.map_shards(plans, step.settings.import_videos.shard_size, make_shard, unit="videos")
    kept = {row["id"] for row in clips}
    chosen = [plan for plan in plans if plan["id"] in kept]
    write_table(step.out, "prompts", prompt_rows(step, chosen))
    write_table(step.out, "captions", [caption_row(plan) for plan in chosen])
    step.facts |= {
        "captions": dict(sorted(Counter(plan["caption_use"] for plan in chosen).items())),
        "stages": {str(stage): sum(plan["stage"] == stage for plan in chosen) for stage in (1, 2)},
        "buckets": dict(sorted(Counter(f"{row['frames']}x{row['height']}x{row['width']}" for row in clips).items())),
        **count_changes(clips),
    }
    step.write("clips", clips)


# --- before a video is opened ----------------------------------------------------------------------------------------


def plan_clips(step: "Step") -> list[dict[str, Any]]:
    """A plan of each clip from its file's bytes and its texts; videos without a usable text are quarantined."""
    from components.prompts.tokens import count_tokens, load_tokenizer

    folder = step.inputs["videos"]
    videos, unopened = list_videos(folder)
    texts, faults = read_texts(folder, videos, step.inputs.get("table"))
    faults += [Fault(printable(name), *fault) for name, fault in unopened.items()]
    reported = texts.keys() | {fault.id for fault in faults}
    faults += [
        Fault(printable(name), "no_text", "nothing is written about it")
        for name in videos
        if not {name, printable(name)} & reported
    ]
    count = partial(count_tokens, load_tokenizer(step.inputs["base"]))
    plans: dict[str, dict[str, Any]] = {}
    for name in [name for name in texts if name != printable(name)]:
        faults.append(Fault(printable(name), "file_name", "its name is not UTF-8: rename it"))
        del texts[name]
    for name, digest in _digests(step, folder, sorted(texts)):
        if isinstance(digest, OSError):
            faults.append(Fault(printable(name), "unreadable", f"it can't be read ({digest.strerror})"))
            continue
        plan = plan_clip(step, name, digest, texts[name], count)
        if not isinstance(plan, Fault) and plan["id"] in plans:
            plan = Fault(
                printable(name), "duplicate", f"it holds the bytes of '{printable(plans[plan['id']]['file'])}'"
            )
        if isinstance(plan, Fault):
            faults.append(plan)
        else:
            plans[plan["id"]] = plan
    for fault in sorted(faults, key=lambda fault: (fault.id, fault.reason)):
        step.reject(fault.id, fault.reason, fault.detail, fault.row)
    step.rows_in = len(plans) + len(faults)
    return list(plans.values())


def plan_clip(
    step: "Step", name: str, digest: str, texts: Texts, count: Callable[[Sequence[str]], list[int]]
) -> dict[str, Any] | Fault:
    """A clip's row before its video is opened; its id is the start of its file's digest, whatever the file's name."""
    from components.clips.synthesize_videos import training_stage
    from components.prompts.filters import text_id

    captioned = step.parameters["import_options"]["texts"] == "captions"
    caption = texts.caption if captioned else ""
    prompt = texts.prompt or (first_sentence(caption) if captioned else texts.caption)
    fewest, most = step.settings.text.prompt_tokens
    (prompt_tokens,), clip_id = count([prompt]), digest[:16]
    if not fewest <= prompt_tokens <= most:
        detail = f"its prompt has {prompt_tokens} tokens and should have {fewest} to {most}"
        return Fault(printable(name), "prompt_range", detail, {"prompt": prompt, "caption": caption})
    caption_tokens = count([caption])[0] if caption else 0
    use = caption_use(prompt, caption, caption_tokens, step.settings.text.caption_tokens)
    stage = training_stage(clip_id, step.settings.synthesize_videos.stage_1_share)
    return {
        "id": clip_id,
        "file": name,
        "source_sha256": digest,
        "prompt_id": text_id(prompt),
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "caption": caption,
        "caption_tokens": caption_tokens,
        "caption_use": use,
        "stage": stage if use == "usable" or not captioned else 1,
        "seed": int(digest[:8], 16),
    }


def caption_use(prompt: str, caption: str, tokens: int, allowed: Sequence[int]) -> str:
    """Whether a caption can be used for stage 2: `usable`, or the reason why not."""
    from components.checks.texts import repeats_prompt

    if not caption:
        return "none"
    if not allowed[0] <= tokens <= allowed[1]:
        return "too_short" if tokens < allowed[0] else "too_long"
    return "is_prompt" if repeats_prompt(prompt, caption) else "usable"


def first_sentence(text: str) -> str:
    """The first sentence of a text in any language; the whole text if no sentence ends in it."""
    import sentencex

    from components.prompts.filters import identify_language

    language, _ = identify_language(text, ())
    return next((part.strip() for part in sentencex.segment(language, text) if part.strip()), text)


def _digests(step: "Step", folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str | OSError]]:
    """Each name in order, and the SHA-256 of its file or the error that it can't be read with."""

    def digest(name: str) -> str | OSError:
        try:
            return file_sha256(folder / name)
        except OSError as error:
            return error

    with side_threads(min(BATCH, usable_cores()), "read-videos") as pool:
        yield from zip(names, step.progress(pool.map(digest, names), len(names), unit="files"), strict=True)


# --- a video becomes a clip ------------------------------------------------------------------------------------------


def make_clip(folder: Path, video: Video, gate: Sequence["ClipCheck"], row: Mapping[str, Any]) -> Clip | Misfit:
    """A video as a clip of its bucket's size with the gate's finding, or why it can't become one.

    Frames are sampled evenly over the whole length by their timestamps, so the video's own frame rate, which may vary,
    doesn't matter.
    """
    import numpy as np

    from components.clips.gate import judge
    from univigu.video import encode_mp4, probe_video, sample_video

    path, fps = folder / row["file"], video.fps
    try:
        facts = probe_video(path)
        if facts.hdr and video.fit.hdr == "quarantine":
            return Misfit("hdr", f"its colours are HDR ({facts.hdr}), which the profile's 'video.fit.hdr' leaves out")
        count = facts.frames(fps)
        bucket = choose_bucket(count, facts.height, facts.width, video)
        if isinstance(bucket, Misfit):
            return bucket
        # In the middle of each frame's interval, because timestamps are not exact.
        times = (np.linspace(0, count - 1, bucket.frames).round() + 0.5) / fps
        frames = sample_video(path, times.tolist(), bucket.height, bucket.width)
    except MissingInputError:
        return Misfit("damaged", f"'{row['file']}' is no longer there; import again")
    except VideoError as error:  # without the path of the folder, which must not end up in the data
        return Misfit(error.reason, str(error).replace(str(path), row["file"]))
    (finding,) = judge(frames[None], [row], gate)
    changes = {"speed": round(count / bucket.frames, 3), **({"tone_mapped": 1} if facts.hdr else {})}
    return Clip(b"" if finding.reason else encode_mp4(frames, fps), bucket, finding, changes)


def _passes(step: "Step", row: Mapping[str, Any], clip: Clip | Misfit) -> bool:
    """Whether a clip is kept; otherwise it is quarantined under its file's name."""
    fault = clip if isinstance(clip, Misfit) else clip.finding
    if fault.reason:
        scores = {} if isinstance(clip, Misfit) else {"scores": clip.finding.scores}
        step.reject(printable(row["file"]), fault.reason, printable(fault.detail), {**row, **scores})
    return not fault.reason


def count_changes(clips: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many clips are faster or slower than their videos, the extreme speeds, and how many were HDR."""
    scores = [json.loads(row["scores"]) for row in clips]
    speeds = [score["speed"] for score in scores] or [1.0]
    return {
        "speed": {
            "faster": sum(speed > 1 + SAME_SPEED for speed in speeds),
            "slower": sum(speed < 1 - SAME_SPEED for speed in speeds),
            "most": max(speeds),
            "least": min(speeds),
        },
        "tone_mapped": sum("tone_mapped" in score for score in scores),
    }


# --- rows ------------------------------------------------------------------------------------------------------------


def clip_row(row: Mapping[str, Any], clip: Clip, fps: float) -> dict[str, Any]:
    """A row of the table `clips`, without `shard`, which the caller adds."""
    return {
        **{key: row[key] for key in ("id", "prompt_id", "prompt", "stage", "seed")},
        "generator": NAME,
        "generator_digest": row["source_sha256"],
        **clip.bucket._asdict(),
        "fps": fps,
        "sha256": hashlib.sha256(clip.content).hexdigest(),
        "scores": json.dumps({**clip.finding.scores, **clip.changes}, sort_keys=True),
        "member": f"{row['id']}.mp4",
    }


def caption_row(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table `captions`; a stage-1 clip has no caption."""
    wanted = plan["stage"] == 2
    return {
        "clip_id": plan["id"],
        "text": plan["caption"] if wanted else None,
        "n_tokens": plan["caption_tokens"] if wanted else 0,
        "status": "success" if wanted else "skipped",
        "attempts": 0,
        "captioner": NAME,
        "captioner_digest": hashlib.sha256(plan["caption"].encode()).hexdigest(),
        "template_version": "1",
    }


def prompt_rows(step: "Step", plans: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table `prompts`: each prompt once, with the licence and source of the import."""
    from components.prompts.filters import identify_language

    languages, options = step.settings.curate_prompts.languages, step.parameters["import_options"]
    prompts = {plan["prompt_id"]: plan for plan in plans}
    return [
        {
            "id": prompt_id,
            "text": plan["prompt"],
            "source": options["source"],
            "licence": options["licence"],
            "language": identify_language(plan["prompt"], languages)[0],
            "n_tokens": plan["prompt_tokens"],
            "scores": "{}",
            "verdict": "keep",
        }
        for prompt_id, plan in prompts.items()
    ]
