"""Import a folder of existing videos and texts in place of the steps that would make clips, prompts and captions.

It writes the outputs of three steps: `data/clips`, and from it `data/curated` and `data/captions`; all later steps run
as usual. Each video becomes one or more clips (`components.clips.windows`). A video whose caption can't be used for
stage 2 (missing, or outside the profile's range) is used for stage 1, which needs only a prompt.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from components.checks import require_packages
from components.clips.archive import read_tar, stream_tar
from components.clips.buckets import STRETCH, list_buckets
from components.clips.import_clips import NAME, in_processes, make_clips
from components.clips.import_files import Videos, find_videos
from components.clips.import_texts import Fault, Texts, printable, read_members, read_texts
from components.clips.making_ahead import MadeAhead
from components.clips.near_duplicates import COPY_OF, drop_copies
from components.pipeline.processes import usable_cores
from components.pipeline.stages import Stage
from components.pipeline.withdrawn import FILE as WITHDRAWN
from components.pipeline.withdrawn import read_withdrawn
from univigu.errors import ConfigError
from univigu.threads import side_threads

if TYPE_CHECKING:
    from components.pipeline.step import Step
    from components.pipeline.workspace import Part

TAR = "clips.tar"
BATCH = 16  # videos that a killed run loses, at least
KINDS = ("captions", "prompts")

VIDEOS = Stage(
    "import-videos",
    "components.clips.import_videos:import_videos",
    home="data/clips",
    sources={"base": "base"},
    parameters=("text", "video", "curate_prompts", "synthesize_videos", "import_options", "import_videos"),
    plugins={"components.checks": "synthesize_videos.checks"},
)
TABLES = {  # the step that copies each table from the clips, and where to
    "prompts": ("import-prompts", "data/curated"),
    "captions": ("import-captions", "data/captions"),
}


def import_folder(
    folder: Path, table: Path | None, options: Mapping[str, str], profile: Mapping[str, Any], root: Path
) -> dict[str, Any]:
    """Import a folder into the work root `root`; returns the manifest of the clips.

    options: `licence` and `source` of the whole import, and `texts`, the kind of the texts: `captions` or `prompts`.
    With prompts, `caption-videos` writes the captions. Raises as `run_stage` does, and `ConfigError` for a licence that
    the profile doesn't accept.
    """
    from components.pipeline.runner import run_adhoc_stage

    check_options(options, profile, root)
    profile = {**profile, "import_options": dict(options)}
    manifest = run_adhoc_stage(VIDEOS, profile, root, input_paths(folder, table))
    copy_tables(("prompts", "captions") if options["texts"] == "captions" else ("prompts",), profile, root)
    return manifest


def copy_tables(names: Iterable[str], profile: Mapping[str, Any], root: Path) -> None:
    """Write tables of the imported clips (`TABLES`) where later steps read them; raises as `run_stage` does."""
    from components.pipeline.runner import run_adhoc_stage

    for name in names:
        step, home = TABLES[name]
        stage = Stage(
            step,
            f"components.clips.import_videos:import_{name}",
            home,
            inputs={"clips": "synthesize-videos"},
            parameters=("import_videos",),
        )
        run_adhoc_stage(stage, profile, root, {})


def import_part(
    folder: Path, table: Path | None, options: Mapping[str, str], profile: Mapping[str, Any], root: Path, part: "Part"
) -> dict[str, int]:
    """Make the clips of one part of the shards for a later `import_folder` with the same arguments.

    Parts may run at the same time on machines that share `root` and the folder. Returns the numbers of shards made and
    kept; raises as `import_folder` does.
    """
    from components.pipeline.runner import run_adhoc_part

    check_options(options, profile, root)
    return run_adhoc_part(VIDEOS, {**profile, "import_options": dict(options)}, root, input_paths(folder, table), part)


def input_paths(folder: Path, table: Path | None) -> dict[str, Path]:
    """The inputs of the step, besides the profile's."""
    return {"videos": folder.resolve(), **({"table": table.resolve()} if table else {})}


def check_options(options: Mapping[str, str], profile: Mapping[str, Any], root: Path) -> None:
    """Raise `ConfigError` for an unknown kind of texts, a licence that isn't accepted, or no or a withdrawn source."""
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
    if options["source"] in read_withdrawn(root).sources:
        raise ConfigError(f"The source '{options['source']}' was withdrawn ({WITHDRAWN}); nothing of it is imported.")


def check_place(root: Path) -> None:
    """Raise `ConfigError` if there are generated clips in `root`, which an import would replace."""
    home = root / VIDEOS.home
    try:
        maker = json.loads((home / "manifest.json").read_text(encoding="utf-8")).get("step")
    except (OSError, ValueError, AttributeError):
        return
    if maker != VIDEOS.name:
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
    from components.clips.gate import gate_digests, load_gate
    from components.pipeline.tables import write_table
    from univigu.wan import check_autoencoder

    video, settings = step.settings.video, step.settings.import_videos
    check_autoencoder(step.inputs["base"], list_buckets(video))
    gate = load_gate(step.parameters["synthesize_videos"]["checks"], step.root)
    require_packages(check.module for check in gate)
    models = gate_digests(gate)
    plans = plan_videos(step)
    for fault in plans.faults:
        step.reject(fault.id, fault.reason, fault.detail, fault.row)
    rows = [{**plan, "gate_models": models} for plan in plans.usable]
    own = partial(make_clips, plans.videos, video, settings, gate)
    ahead = 0 if step.part else 2 * usable_cores()  # the next shard isn't this part's
    with (
        TemporaryDirectory(dir=step.out) as folder,
        side_threads(usable_cores(), "read-videos") as pool,
        in_processes(own, plans.videos, rows, gate) as make,
        MadeAhead(pool, make, rows, Path(folder), ahead) as made,
    ):
        clips = step.map_shards(rows, settings.shard_size, partial(_make_shard, step, made), unit="videos")
    by_id = {plan["id"]: plan for plan in plans.usable}

    def reject(clip: Mapping[str, Any], reason: str, detail: str) -> None:
        name = printable(by_id[clip["plan"]]["file"])
        step.reject(name if clip["id"] == clip["plan"] else f"{name} {clip['id']}", reason, detail, clip)

    clips = drop_copies(clips, gate, reject)
    step.rows_in = len(clips) + step.reasons.total()
    used = [by_id[clip_id] for clip_id in sorted({row["plan"] for row in clips})]
    write_table(step.out, "prompts", prompt_rows(step, used))
    write_table(step.out, "captions", [caption_row(row["id"], by_id[row["plan"]]) for row in clips])
    step.facts |= describe(clips, by_id) | {"videos": {"used": len(used), "of": plans.found}}
    step.write("clips", clips)


def _make_shard(
    step: "Step", videos: MadeAhead, shard: Sequence[Mapping[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """The clips of a shard's videos in one tar; only the clips in progress are in memory."""

    def make_batch(batch: Sequence[Mapping[str, Any]], batch_folder: Path) -> list[dict[str, Any]]:
        found = videos.take(batch, batch_folder)
        for refused in (one for made in found for one in made.refused):
            step.reject(*refused)
        return [row for made in found for row in made.clips]

    batches = step.map_batches(shard, max(BATCH, 2 * usable_cores()), folder, make_batch)
    parts = [place / f"{plan}.tar" for place, rows in batches for plan in dict.fromkeys(row["plan"] for row in rows)]
    stream_tar(folder / TAR, (member for part in parts for member in read_tar(part)))
    shard_name = f"shards/{folder.name.removeprefix('.')}/{TAR}"
    return [{**row, "shard": shard_name} for _, rows in batches for row in rows]


# --- before a video is opened ----------------------------------------------------------------------------------------


class Plans(NamedTuple):
    """What is known of the videos before they are opened."""

    usable: list[dict[str, Any]]
    faults: list[Fault]  # of videos without a usable text, and of rows about no video
    videos: Videos

    @property
    def found(self) -> int:
        """How many videos there are, usable or not."""
        return len(self.videos.names) + len(self.videos.faults)


def plan_videos(step: "Step") -> Plans:
    """A plan of each video from its file's bytes and its texts."""
    from components.prompts.tokens import count_tokens, load_tokenizer

    videos = find_videos(step.inputs["videos"])
    texts, faults = read_texts(videos.folder, videos.names, step.inputs.get("table"), read_members(videos))
    faults += [Fault(printable(name), *fault) for name, fault in videos.faults.items()]
    reported = texts.keys() | {fault.id for fault in faults}
    faults += [
        Fault(printable(name), "no_text", "nothing is written about it")
        for name in videos.names
        if not {name, printable(name)} & reported
    ]
    count = partial(count_tokens, load_tokenizer(step.inputs["base"]))
    plans: dict[str, dict[str, Any]] = {}
    for name in [name for name in texts if name != printable(name)]:
        faults.append(Fault(printable(name), "file_name", "its name is not UTF-8: rename it"))
        del texts[name]
    for name, digest in _digests(step, videos, sorted(texts)):
        if isinstance(digest, OSError):
            faults.append(Fault(printable(name), "unreadable", f"it can't be read ({digest.strerror})"))
            continue
        plan = plan_video(step, name, digest, texts[name], count)
        if not isinstance(plan, Fault) and plan["id"] in plans:
            row = {"scores": {COPY_OF: plan["id"]}, "stage": plan["stage"]}  # no text: the other may be withdrawn
            detail = f"it holds the bytes of '{printable(plans[plan['id']]['file'])}'"
            plan = Fault(printable(name), "duplicate", detail, row)
        if isinstance(plan, Fault):
            faults.append(plan)
        else:
            plans[plan["id"]] = plan
    ordered = sorted(faults, key=lambda fault: (fault.id, fault.reason))
    return Plans(list(plans.values()), ordered, videos)


def plan_video(
    step: "Step", name: str, digest: str, texts: Texts, count: Callable[[Sequence[str]], list[int]]
) -> dict[str, Any] | Fault:
    """A video's row before it is opened; its id is the start of its file's digest, whatever the file's name."""
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
    stage = texts.stage or training_stage(clip_id, step.settings.synthesize_videos.stage_1_share)
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


def _digests(step: "Step", videos: Videos, names: Sequence[str]) -> Iterator[tuple[str, str | OSError]]:
    """Each name in order, and the SHA-256 of its file or the error that it can't be read with."""

    def digest(name: str) -> str | OSError:
        try:
            return videos.digest(name)
        except OSError as error:
            return error

    with side_threads(usable_cores(), "read-videos") as pool:
        yield from zip(names, step.progress(pool.map(digest, names), len(names), unit="files"), strict=True)


def describe(clips: Sequence[Mapping[str, Any]], plans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of an import: how many clips have usable captions, are for which stage, of which size, and so on."""
    spans = {row["plan"]: row["unused"] for row in clips}
    return {
        "captions": dict(sorted(Counter(plans[row["plan"]]["caption_use"] for row in clips).items())),
        **count_clips(clips),
        "seconds": {
            name: round(sum(span[at] for span in spans.values()), 3) for at, name in enumerate(("unused", "of"))
        },
        **count_changes(clips),
    }


def count_clips(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many clips are for which stage, and of which size."""
    return {
        "stages": {str(stage): sum(row["stage"] == stage for row in clips) for stage in (1, 2)},
        "buckets": dict(sorted(Counter(f"{row['frames']}x{row['height']}x{row['width']}" for row in clips).items())),
    }


def count_changes(clips: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many clips are faster or slower than their videos, the extreme speeds, and how many were HDR."""
    scores = [json.loads(row["scores"]) for row in clips]
    speeds = [score["speed"] for score in scores] or [1.0]
    return {
        "speed": {
            "faster": sum(speed > 1 + STRETCH for speed in speeds),
            "slower": sum(speed < 1 - STRETCH for speed in speeds),
            "most": max(speeds),
            "least": min(speeds),
        },
        "tone_mapped": sum("tone_mapped" in score for score in scores),
    }


# --- rows ------------------------------------------------------------------------------------------------------------


def caption_row(clip_id: str, plan: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table `captions`; a stage-1 clip has no caption."""
    wanted = plan["stage"] == 2
    return {
        "clip_id": clip_id,
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
