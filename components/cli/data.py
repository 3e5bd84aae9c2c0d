"""`univigu data`: import videos, export and edit clips, tag versions of the dataset, offload latents."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from components.cli.options import Profile, profile_in_use
from components.pipeline.progress import activity
from components.pipeline.stages import EDITS
from univigu.errors import ConfigError

app = typer.Typer(
    help="Import your own videos, export clips, tag versions of the dataset, move latents to an object store."
)

Root = Annotated[Path, typer.Option(help="The work root: a git and DVC repository.")]
Take = Annotated[
    str | None,
    typer.Option(
        help="What becomes of a longer video: its first clip at its own speed (`head`), clip after clip (`windows`), "
        "some spread over it (`uniform`), or all of it sped up (`squeeze`). (default: import_videos.take)",
        show_default=False,
    ),
]
ImportPart = Annotated[
    str, typer.Option("--part", metavar="N/OF", help="Make a part of the clips only; then run the command without it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command(
    "import",
    epilog='Example: `univigu data import ~/videos --captions captions.csv --licence CC-BY-4.0 --source "my own"`',
)
def import_folder(
    folder: Annotated[Path, typer.Argument(help="A folder of videos; its subfolders are searched, too.")],
    licence: Annotated[str, typer.Option(help="Licence of the videos and texts; the profile must accept it.")],
    source: Annotated[str, typer.Option(help="Where they come from; stored with every prompt.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="A CSV or JSONL file with file_name, caption and, optionally, prompt. (default: metadata.jsonl or "
            "metadata.csv in the folder, otherwise clip.txt beside clip.mp4)",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        str,
        typer.Option(
            help="The kind of texts: `captions` (detailed; the model learns to write them) or `prompts` (brief; "
            "`univigu run caption-videos` then writes the captions)."
        ),
    ] = "captions",
    take: Take = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Import nothing; write what would become of each video to --table.")
    ] = False,
    table: Annotated[Path, typer.Option(help="The CSV file that --dry-run writes.")] = Path("import.csv"),
    part: ImportPart = "",
    profile: Profile = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace clips under the root that were not imported.")
    ] = False,
    root: Annotated[Path, typer.Option(help="The work root to import into.")] = Path("."),
) -> None:
    """Import a folder of your own videos, as if they had been generated here.

    Each video becomes clips of the profile's size and frame rate; unusable ones are quarantined with their reason.
    """
    from components.clips.import_videos import check_place, import_folder, import_part
    from components.pipeline.profiles import load_profile, with_settings
    from components.pipeline.workspace import Part

    changes = [f"import_videos.take={take}"] if take else []
    values = load_profile(with_settings(profile_in_use(profile, root), changes))
    options = {"licence": licence, "source": source, "texts": texts}
    if dry_run:
        _examine(folder, captions, options, values, root, table)
        return
    if not replace:
        check_place(root)
    if part:
        made = import_part(folder, captions, options, values, root, Part.parse(part))
        print(f"part {part}: {made['made']} shards made, {made['kept']} kept")
        return
    manifest = import_folder(folder, captions, options, values, root)
    _report(manifest)
    if not manifest["rows_out"]:
        return
    if texts == "captions":
        for line in _about_stages(manifest["facts"]):
            print(line)
    _print_next(texts, profile, root)


def _print_next(texts: str, profile: str | None, root: Path) -> None:
    """Print the steps that follow an import."""
    captioning = ["caption-videos"] if texts == "prompts" else []
    where = "".join(
        f" {option} {value}" for option, value in (("--profile", profile), ("--root", root)) if f"{value or '.'}" != "."
    )
    steps = ["validate-prompts", "validate-clips", *captioning, "validate-pairs", "encode-latents"]
    print("Next: " + ", ".join(f"`univigu run {step}{where}`" for step in steps) + ".")


def _examine(
    folder: Path, captions: Path | None, options: Mapping[str, str], profile: Mapping[str, Any], root: Path, table: Path
) -> None:
    """Print and write what would become of each video."""
    from components.clips.import_report import examine_folder, summarise, write_lines

    lines, videos = examine_folder(folder, captions, options, profile, root)
    write_lines(table, lines)
    for line in summarise(lines, videos):
        print(line)
    print(f"{table} says what would become of each; nothing was imported.")


def _report(manifest: Mapping[str, Any]) -> None:
    """Print what was imported, and what was not."""
    from components.clips.import_report import used_of

    facts, reasons = manifest["facts"], manifest["reasons"]
    why = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    print(
        f"{manifest['rows_out']} clips from {facts['videos']['of']} videos, {manifest['quarantined']} quarantined"
        + (f" ({why}; see data/clips/rejected.parquet)" if why else "")
    )
    print(used_of(facts["videos"]["used"], facts["videos"]["of"], reasons))
    if not manifest["rows_out"]:
        return
    print(
        f"For stage 1: {facts['stages']['1']}, for stage 2: {facts['stages']['2']}; sizes: "
        + ", ".join(facts["buckets"])
    )
    for line in _changes(facts):
        print(line)


def _changes(facts: dict[str, Any]) -> Iterator[str]:
    """One line for each kind of change that was made to fit videos."""
    speed = facts["speed"]
    for word, count, most in (("faster", speed["faster"], speed["most"]), ("slower", speed["slower"], speed["least"])):
        if count:
            yield (
                f"Clips that play {word} than their videos: {count}, up to {most:.3g} times as fast (`speed` in the "
                "column `scores`; 'video.fit.speed' in the profile sets the limits)"
            )
    if facts["seconds"]["unused"] >= 0.05:
        yield (
            f"In no clip: {facts['seconds']['unused']:.1f} of the {facts['seconds']['of']:.1f} seconds of the videos "
            "used ('import_videos.take' in the profile says which parts become clips)"
        )
    if facts["tone_mapped"]:
        yield f"HDR videos that were tone-mapped: {facts['tone_mapped']} ('video.fit.hdr: quarantine' leaves them out)"


def _about_stages(facts: Mapping[str, Any]) -> Iterator[str]:
    """Why clips can't be used in a stage, and what to do about a stage without clips."""
    captions, stages = facts["captions"], facts["stages"]
    unused = {use: count for use, count in captions.items() if use not in ("usable", "none")}
    if unused:
        yield "Captions that stage 2 can't learn from: " + ", ".join(f"{use} {count}" for use, count in unused.items())
    drawn = "by chance ('synthesize_videos.stage_1_share'): import more videos, or change the share."
    if captions.get("usable") and not stages["2"]:
        yield f"All clips with a usable caption ({captions['usable']}) were assigned to stage 1 {drawn}"
    elif not stages["2"]:
        why = {
            ("none",): "No clip has a caption",
            ("is_prompt",): "Every caption says no more than its prompt",
            ("too_long",): "Every caption is longer than 'text.caption_tokens' allows",
            ("too_short",): "Every caption is shorter than 'text.caption_tokens' requires",
        }.get(tuple(captions), "Stage 2 can learn from no caption")
        yield f"{why}: import them with `--texts prompts`; then `univigu run caption-videos` writes detailed captions."
    if not stages["1"]:
        yield f"All clips were assigned to stage 2 {drawn}"


@app.command(epilog="Example: `univigu data export ~/clips --to hf`")
def export(
    folder: Annotated[Path, typer.Argument(help="A new folder to write to.")],
    to: Annotated[
        str,
        typer.Option(
            help="The layout: `folder` (texts beside the clips, and metadata.csv), `webdataset` (tars) or `hf` "
            "(metadata.jsonl, which Hugging Face's datasets read)."
        ),
    ] = "folder",
    root: Annotated[Path, typer.Option(help="The work root, which contains the clips.")] = Path("."),
) -> None:
    """Export all clips with their texts for other tools; `univigu data import` reads what this writes."""
    from components.clips.export_clips import export_clips

    number = export_clips(root, to, folder)
    print(f"{number} clips are in {folder}.")


@app.command(epilog="Example: `univigu data withdraw --video walk.mp4 --report withdrawal.md`")
def withdraw(
    source: Annotated[str, typer.Option(help="All prompts of this source, and all that comes from them.")] = "",
    item: Annotated[str, typer.Option("--id", help="A prompt, a clip or a pair, by its id.")] = "",
    video: Annotated[
        Path | None, typer.Option(help="An imported video, or a clip, by its file.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the report here: Markdown for .md, otherwise JSON.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Withdraw even if nothing is left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; change nothing.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Then run all affected steps again, up to a new registered version.")
    ] = False,
    profile: Profile = None,
    root: Annotated[Path, typer.Option(help="The work root.")] = Path("."),
) -> None:
    """Withdraw data: later runs leave it out, and models that learned from it are named and tagged."""
    from components.registry import withdrawal

    request = withdrawal.Request(source, item, video)
    if retrain:
        from components.cli import retrain as again

        before = withdrawal.withdraw(request, root, all_of_it=everything, dry_run=True)
        again.check_retraining(root, before["outputs"], dry_run)
    with activity("Looking for all that comes from it"):
        found = withdrawal.withdraw(request, root, all_of_it=everything, dry_run=dry_run)
    print("\n".join(withdrawal.describe(found)))
    if report:
        withdrawal.write_report(report, found)
    if retrain:
        again.retrain(root, found["outputs"], profile_in_use(profile, root))


@app.command("score-captions", epilog="Example: `univigu data score-captions --clip model/clip`")
def score_captions(
    clip: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a CLIP-like model. (default: the recogniser of the built-in toy dataset)",
            show_default=False,
        ),
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Clips to read, at most; they are spread over all.")] = 500,
    root: Annotated[Path, typer.Option(help="The work root.")] = Path("."),
) -> None:
    """Let an independent reader say whether captions fit their clips; writes reports/caption-quality.json."""
    from components.bench.caption_quality import measure_captions
    from univigu.files import write_json

    with activity("Reading clips and captions"):
        found = measure_captions(root, clip, most)
    target = root / "reports/caption-quality.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, found)
    quality = found["quality"]
    interval = f"{quality['low']:.3f} to {quality['high']:.3f}"
    print(f"{found['captions']} captions, read by {found['reader']}: {quality['value']:.3f} ({interval})")
    for line in found["lowest"][:3]:
        print(f"lowest: {line['id']} {line['score']:.3f} {line['caption'][:80]}")
    print(f"{target} has more.")


@app.command(epilog="Example: `univigu data edit --id 3f2a-0 --exclude --dry-run`")
def edit(
    item: Annotated[str, typer.Option("--id", help="The clip, by its id.")] = "",
    caption: Annotated[str, typer.Option(help="The caption that it gets.")] = "",
    exclude: Annotated[bool, typer.Option("--exclude", help="Leave the clip out.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take back the last edit of the clip.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List all edits, oldest first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    profile: Profile = None,
    root: Annotated[Path, typer.Option(help="The work root.")] = Path("."),
) -> None:
    """Edit a clip: another caption, or leave it out; `validate-pairs` applies data/edits.json when it runs again."""
    from components.cli import edits
    from components.pipeline.profiles import load_profile
    from components.tracking import actor

    if show:
        print("\n".join(edits.describe_all(root)))
        return
    if not item or sum((bool(caption), exclude, undo)) != 1:
        raise ConfigError("Give --id, and exactly one of --caption, --exclude and --undo; or --list.")
    values, clip = load_profile(profile_in_use(profile, root)), edits.open_clip(root, item)
    with activity("Counting what the edit changes"):
        if caption:
            proposal = edits.propose_caption(root, values, clip, caption, actor())
        else:
            propose = edits.propose_exclusion if exclude else edits.propose_undo
            proposal = propose(root, values, clip, actor())
    print(", ".join(proposal.describe()))
    if dry_run:
        return
    line = edits.apply(root, proposal)
    print(f"This is line {line.number} of {EDITS}: commit it. Next: `univigu run validate-pairs`.")


@app.command(epilog="Example: `univigu data snapshot --push`")
def snapshot(
    version: Annotated[str, typer.Argument(help="The version, such as v1.2.0. (default: the next minor version)")] = "",
    push: Annotated[bool, typer.Option("--push", help="Also push the data to the default DVC remote.")] = False,
    root: Root = Path("."),
    as_json: Json = False,
) -> None:
    """Tag the dataset of the last `dvc repro`: curated prompts, clips, captions, pairs and latents.

    The tag is `dataset@VERSION`, at the commit that contains dvc.lock. A dataset is tagged only once.
    """
    from components.registry import dataset_versions

    with activity("Verifying the dataset"):
        found, new = dataset_versions.take_snapshot(root, version)
    if push:
        with activity("Pushing the data to the DVC remote"):
            dataset_versions.push_data(root)
    if as_json:
        print(json.dumps({**asdict(found), "new": new, "pushed": push}, indent=1))
        return
    if new:
        print(f"{found.tag}: {found.facts['Pairs']} pairs, dataset {found.digest}, commit {found.commit[:12]}")
        print(f"Share the tag with `git push origin {found.tag}`" + ("." if push else ", and the data with --push."))
    else:
        print(f"This dataset is already {found.tag}, tagged on {found.when[:10]}; no new tag was created.")
    if push:
        print("The data were pushed to the DVC remote.")


@app.command(epilog="Example: `univigu data offload s3://bucket/latents --remove`")
def offload(
    url: Annotated[
        str,
        typer.Argument(help="s3://, gs://, az:// or a folder; keys come from the environment."),
    ],
    remove: Annotated[bool, typer.Option("--remove", help="Delete the local shards; training fetches them.")] = False,
    root: Root = Path("."),
) -> None:
    """Upload the shards of latents to an object store, from which training streams them.

    The rest of the output stays here, including the hashes that each fetched shard is verified against.
    """
    from components.pipeline.manifests import verify
    from components.pipeline.stages import find_stage
    from univigu.training.remote_shards import put_shards

    stage = find_stage("encode-latents")
    folder = root.resolve() / stage.home
    shards = [name for name in verify(folder, stage.name)["files"] if name.startswith("shards/")]
    shards = [name for name in shards if name.endswith("latents.safetensors")]
    with activity("Uploading the latents"):
        size = put_shards(folder, shards, url)
    if remove:
        for name in shards:
            (folder / name).unlink()
    removed = "; the local copies were deleted" if remove else ""
    print(f"{len(shards)} shards, {size / 1e9:.3g} GB, are at {url}{removed}.")


@app.command("list")
def list_datasets(root: Root = Path("."), as_json: Json = False) -> None:
    """List the tagged datasets, newest version first."""
    from components.registry import dataset_versions

    found = dataset_versions.list_snapshots(root)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    if not found:
        print("No dataset is tagged here yet; `univigu data snapshot` tags the one of the last `dvc repro`.")
    for one in found:
        counts = f"{one.facts.get('Prompts', '?'):>7} prompts {one.facts.get('Pairs', '?'):>7} pairs"
        print(f"{one.tag:<16} {one.when[:10]} {counts}  {one.digest[:12]}  {one.commit[:12]}")
